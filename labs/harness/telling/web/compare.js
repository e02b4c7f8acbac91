// A comparison's pictures: the ratio B / A of every figure, with its interval.
"use strict";

{
  const OUTCOMES = [  // told apart by shape as well as by colour
    ["differs", 1, "diamond"],
    ["same", 0, "circle"],
    ["undecided", -1, "circle-open"],
  ];
  const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100];
  const ROW = 21;  // pixels

  data.comparisons.forEach((found, place) => {
    const id = `ratios-${place}`;
    const differ = found.rows.filter((row) => row.outcome === "differs");
    const kinds = [...new Set(found.rows.map((row) => row.kind))];
    const shown = choice(`figures-${place}`, [
      ["", `all (${found.rows.length})`],
      ...(differ.length ? [["differs", `those that differ (${differ.length})`]] : []),
      ...kinds.map((kind) => [`kind ${kind}`, kind]),
    ], redraw);
    redraws.push(redraw);

    function redraw() {
      const chosen = found.rows.filter((row) => shown.value === "" ||
        (shown.value === "differs" ? row.outcome === "differs" : `kind ${row.kind}` === shown.value));
      if (!chosen.length) return;
      const rows = kinds.flatMap((kind) => chosen.filter((row) => row.kind === kind));
      // a line for each kind of figure, one for each row; where it is narrow, a row's name above it
      const narrow = at(id).clientWidth < 600;
      const lines = [];
      for (const row of rows) {
        if (lines.at(-1)?.kind !== row.kind) lines.push({ kind: row.kind, text: `<b>${plain(row.kind)}</b>` });
        if (narrow) lines.push({ kind: row.kind, text: plain(row.where) });
        lines.push(narrow ? row : { ...row, text: plain(row.where) });
      }
      // one very wide interval must not press all others together: it leaves the picture
      const values = rows.map((row) => row.value);
      const ends = rows.flatMap((row) => [row.low, row.high]).filter((v) =>
        v > Math.min(...values) / 2 && v < Math.max(...values) * 2);
      const low = Math.min(0.95, ...values, ...ends) / 1.04, high = Math.max(1.05, ...values, ...ends) * 1.04;
      const ticks = apart(low, high, (narrow ? 0.9 : 0.6) * at(id).clientWidth);
      const y = lines.map((_, line) => line);
      const traces = OUTCOMES.map(([outcome, tint, symbol]) => {
        const mine = y.filter((line) => lines[line].outcome === outcome);
        const of = (name) => mine.map((line) => lines[line][name]);
        const colouring = tint < 0 ? css("--soft") : tint ? data.differs : colour(tint);
        return {
          name: outcome, mode: "markers", x: of("value"), y: mine,
          marker: { size: 9, symbol, color: colouring, line: { width: 1.5, color: colouring } },
          error_x: { type: "data", symmetric: false, thickness: 1.6, width: 4, color: colouring,
                     array: mine.map((line) => lines[line].high - lines[line].value),
                     arrayminus: mine.map((line) => lines[line].value - lines[line].low) },
          hovertext: mine.map((line) => hover(lines[line])), hovertemplate: "%{hovertext}<extra></extra>",
        };
      });
      draw(id, traces, {
        height: 86 + ROW * lines.length,
        margin: { l: 10, r: 14, t: 34, b: 46 },
        shapes: [{ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", layer: "below",
                   line: { color: css("--soft"), width: 1.5 } }],
        xaxis: axis({ type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: ticks,
                      ticktext: ticks.map((step) => `${step}x`), title: { text: "B / A" } }),
        annotations: !narrow ? [] : y.filter((line) => lines[line].text).map((line) => ({
          text: lines[line].text, xref: "paper", x: 0, xanchor: "left", y: line, showarrow: false,
          font: { size: 11 }, bgcolor: css("--paper") })),
        yaxis: axis({ range: [lines.length - 0.4, -0.6], tickvals: y, fixedrange: true, ticks: "",
                      tickfont: { size: 11 }, showgrid: false, visible: !narrow,
                      ticktext: lines.map((line) => line.text) }),
      });
    }
  });

  // From 1 outwards, so far from one another that they can be read.
  function apart(low, high, pixels) {
    const ticks = [1];
    const distance = (one, two) => (Math.abs(Math.log(one / two)) / Math.log(high / low)) * pixels;
    const outwards = (step) => Math.abs(Math.log(step));
    for (const step of [...STEPS].sort((one, two) => outwards(one) - outwards(two))) {
      const inside = step >= low && step <= high;
      if (inside && ticks.every((tick) => distance(tick, step) >= 44)) ticks.push(step);
    }
    return ticks.sort((one, two) => one - two);
  }

  function hover(row) {
    return `${plain(row.kind)}<br>${plain(row.where)}<br><b>${digits(row.value)}x</b>` +
      ` (${digits(row.low)} to ${digits(row.high)})<br>A ${row.a}, B ${row.b}<br>${row.outcome}`;
  }
}
