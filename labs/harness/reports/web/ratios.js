// Of a run's page: each measured ratio with its interval, on what was predicted.
"use strict";

{
  const LINE = 15, MARK = 26, BETWEEN = 8; // px: of a label's line, of a mark, between two rows

  if (data.claims.length) redraws.push(() => ratios("claims", data.claims, "treatment / baseline"));
  if (at("forecasts")) redraws.push(() => ratios("forecasts", data.forecasts, "measured / predicted"));

  function ratios(id, items, title) {
    const rows = placed(items, at(id).clientWidth);
    const height = rows.at(-1)?.end ?? 4;
    const [low, high] = reach(items);
    const ticks = logTicks(low, high);
    draw(id, ratioTraces(rows), {
      height: height + 84,
      margin: { l: 12, r: 14, t: 34, b: 46 },
      shapes: [...rows.map((row) => bearsItOut(row, low, high)), lineAtOne()],
      annotations: [...rows.map(label), ...rows.filter(({ item }) => item.value === null).map(noRatio)],
      xaxis: axis({ type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: ticks,
                    ticktext: ticks.map((t) => `${t}x`), title: { text: title } }),
      yaxis: { range: [height, 0], visible: false, fixedrange: true },
    });
  }

  /** A row for each item: its label's lines, then its mark; in px from the top. */
  function placed(items, width) {
    let top = 4;
    return items.map((item) => {
      const where = item.where ? wrapped(item.where, width / 6.3) : [];
      const lines = [
        ...wrapped(item.title, width / 7).map(plain),
        ...where.map((line) => `<span style="color:${css("--soft")};font-size:11px">${plain(line)}</span>`),
      ];
      const middle = top + lines.length * LINE + MARK / 2;
      const row = { item, lines, top, middle, end: middle + MARK / 2 + BETWEEN };
      top = row.end;
      return row;
    });
  }

  /** The ends of the axis: one very wide interval leaves it, not to press all others together. */
  function reach(items) {
    const firm = items.flatMap((item) => [item.value, item.predicted, item.least, item.largest, 1])
      .filter((ratio) => ratio > 0);
    const whiskers = items.flatMap(({ low, high }) => [low, high]).filter((ratio) =>
      ratio > Math.min(...firm) / 4 && ratio < Math.max(...firm) * 4);
    return [Math.min(...firm, ...whiskers) / 1.25, Math.max(...firm, ...whiskers) * 1.25];
  }

  function ratioTraces(rows) {
    const measured = rows.filter(({ item }) => item.value !== null);
    const length = (end, start) => (end === null || start === null ? 0 : end - start);
    return [
      { name: "predicted", x: rows.map(({ item }) => item.predicted), y: rows.map(({ middle }) => middle),
        mode: "markers", hoverinfo: "skip",
        marker: { symbol: "line-ns", size: 15, line: { width: 3, color: data.predicted },
                  color: data.predicted } },
      { name: "measured, 95% interval", mode: "markers",
        x: measured.map(({ item }) => item.value), y: measured.map(({ middle }) => middle),
        error_x: { type: "data", symmetric: false, thickness: 2, width: 5, color: colour(0),
                   array: measured.map(({ item }) => length(item.high, item.value)),
                   arrayminus: measured.map(({ item }) => length(item.value, item.low)) },
        marker: { size: 10, color: colour(0),
                  symbol: measured.map(({ item }) => (item.valid ? "circle" : "circle-open")) },
        hovertext: measured.map(underPointer), hovertemplate: "%{hovertext}<extra></extra>" },
    ];
  }

  function underPointer({ item }) {
    const predicted = item.where ? `predicted ${digits(item.predicted)}x` : "";
    return plain(item.title) + (item.where ? `<br>${plain(item.where)}` : "") +
      `<br><b>${digits(item.value)}x</b>` +
      (item.low === null ? "" : ` (${digits(item.low)} to ${digits(item.high)})`) +
      wrapped([predicted, item.verdict].filter(Boolean).join("; "), 60).map((line) => `<br>${plain(line)}`).join("");
  }

  function bearsItOut({ item, middle }, low, high) {
    return {
      type: "rect", layer: "below", line: { width: 0 }, fillcolor: data.predicted, opacity: 0.25,
      x0: Math.max(item.least ?? low, low), x1: item.largest ?? high,
      y0: middle - MARK / 2 + 4, y1: middle + MARK / 2 - 4,
    };
  }

  function lineAtOne() {
    return { type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper",
             line: { color: css("--soft"), width: 1 }, layer: "below" };
  }

  function label({ lines, top }) {
    return { text: lines.join("<br>"), xref: "paper", x: 0, xanchor: "left", align: "left",
             y: top, yanchor: "top", showarrow: false, bgcolor: css("--paper") };
  }

  function noRatio({ item, middle }) {
    return { text: "– (no ratio)", x: Math.log10(item.predicted || 1), y: middle, xanchor: "left",
             xshift: 10, showarrow: false, font: { color: css("--soft") } };
  }
}
