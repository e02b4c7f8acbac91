// Every request of a trial on a timeline, and the first ten of its window in a table. Times of a trial's
// requests are in tenths of a millisecond.
"use strict";

{
  data.trials.filter((trial) => !trial.failed).forEach(unpack);
  const point = choice("trial-point", data.points.map((p) => [p.key, p.name]), () => {
    offerRepeats();
    timeline();
  });
  const repeat = at("trial-repeat"), order = at("trial-order");
  repeat.addEventListener("change", timeline);
  order.addEventListener("change", timeline);
  if (data.claims.length) point.value = data.claims[0].point;
  offerRepeats();
  redraws.push(timeline);

  const dms = (value) => (value === null || value === undefined ? "–" : milliseconds(value / 10));
  const inSeconds = (value) => value / 10000;

  function offerRepeats() {
    const trials = data.trials.filter((t) => t.point === point.value);
    repeat.replaceChildren(...trials.map((t) =>
      new Option(t.failed ? `${t.repeat} (failed)` : t.repeat, t.repeat)));
  }

  /** Columns of one value, numbers in a row, and errors are written once: here they are as many as requests. */
  function unpack(trial) {
    const rows = Array.from({ length: trial.shown }, (_, i) => i);
    data.columns.forEach((name, n) => {
      const packed = trial.columns[n];
      trial[name] = Array.isArray(packed) ? packed : rows.map((i) => (name === "index" ? packed + i : packed));
    });
    trial.long ??= [];
    trial.errors = Object.fromEntries(Object.entries(trial.errors ?? {}).map(([i, n]) => [i, data.errors[n]]));
  }

  function timeline() {
    const trial = data.trials.find((t) =>
      t.point === point.value && String(t.repeat) === repeat.value);
    const rows = at("trial-table").tBodies[0];
    rows.replaceChildren();
    if (!trial || trial.failed) {
      at("trial-said").textContent = trial ? `This trial failed: ${trial.failed}` : "Not played.";
      Plotly.purge(at("timeline"));
      return;
    }
    const places = inOrder(trial);
    const long = new Set(trial.long);
    at("trial-said").textContent = summary(trial);
    const counted = places.filter((i) => trial.counted[i] || trial.errors[i]);
    rows.replaceChildren(...counted.slice(0, 10).map((i) => tableRow(trial, i, long)));
    sortable(at("trial-table"));
    // of some requests alone, nobody could tell how many were in decode
    const decoding = trial.index.length < trial.sent ? null : inDecode(trial);
    const traces = [...bars(trial, places, long), ...(decoding ? [decodeTrace(decoding)] : [])];
    draw("timeline", traces, timelineLayout(trial, places.length, decoding && Math.max(1, ...decoding.counts)));
  }

  /** The places of a trial's requests, in the order that is chosen. */
  function inOrder(trial) {
    const length = {
      start: (i) => -trial.start_dms[i],
      e2e: (i) => trial.first_dms[i] === null ? Infinity : trial.last_dms[i],
      ttft: (i) => trial.first_dms[i] ?? Infinity,
      gap: (i) => trial.gap_dms[i] ?? -1,
    }[order.value];
    return trial.index.map((_, i) => i).sort((a, b) =>
      length(a) === length(b) ? a - b : length(b) - length(a));
  }

  /** What a limit on the engine's queue refused has not failed. */
  const isRefusal = (error) => error.startsWith("turned away");

  function wrong(trial) {
    const refused = Object.values(trial.errors).filter(isRefusal).length;
    return ["failed", "turned away or failed", "turned away"][
      refused === 0 ? 0 : refused < Object.keys(trial.errors).length ? 1 : 2];
  }

  function summary(trial) {
    const [queue, prefill, decode] = trial.engine_ms.map(milliseconds);
    const shown = trial.index.length;
    const refused = Object.values(trial.errors).filter(isRefusal).length;
    const failed = Object.keys(trial.errors).length - refused;
    return `${trial.sent.toLocaleString("en")} requests` +
      (shown < trial.sent ? `, the ${shown.toLocaleString("en")} longest of them shown` : "") +
      (refused ? `, ${refused} of these turned away` : "") +
      (failed ? `, ${failed} of these failed` : "") +
      `. The engine's own means over this trial: queue ${queue}, prefill ${prefill}, decode ${decode}.`;
  }

  function remark(trial, i, long) {
    const error = trial.errors[i];
    return [error && !isRefusal(error) ? `failed: ${error}` : error,
            long.has(i) ? "long prompt" : "",
            trial.counted[i] || trial.errors[i] ? "" : "outside the window"].filter(Boolean).join("; ");
  }

  function tableRow(trial, i, long) {
    const row = document.createElement("tr");
    const tokens = (v) => (v === null ? "–" : `${v.toLocaleString("en")} tok`);
    for (const text of [
      String(trial.index[i]), dms(trial.start_dms[i]), dms(trial.first_dms[i]),
      dms(trial.last_dms[i]), dms(trial.tpot_dms[i]), dms(trial.gap_dms[i]),
      tokens(trial.prompt[i]), tokens(trial.output[i]), remark(trial, i, long) || "–",
    ]) row.insertCell().textContent = text;
    return row;
  }

  function underPointer(trial, i, long) {
    const remarks = remark(trial, i, long);
    return `request ${trial.index[i]}` +
      `<br>${trial.prompt[i] ?? "–"} prompt, ${trial.output[i] ?? "–"} output tokens` +
      `<br>first token after ${dms(trial.first_dms[i])}, all after ${dms(trial.last_dms[i])}` +
      (trial.open_loop ? `<br>sent ${dms(trial.sent_dms[i])} late` : "") +
      `<br>TPOT ${dms(trial.tpot_dms[i])}, longest pause ${dms(trial.gap_dms[i])}` +
      (remarks ? `<br>${wrapped(remarks, 60).map(plain).join("<br>")}` : "");
  }

  /** A row's bar for each phase of its request; faint outside the window, hatched if it is long. */
  function bars(trial, places, long) {
    const hovertext = places.map((i) => underPointer(trial, i, long));
    const opacity = places.map((i) => (trial.counted[i] || trial.errors[i] ? 1 : 0.35));
    const hatched = { pattern: { shape: places.map((i) => (long.has(i) ? "/" : "")),
                                 fgcolor: "#000000", fillmode: "overlay", size: 5 } };
    const bar = (name, color, from, to, pattern = {}) => ({
      type: "bar", orientation: "h", name, y: places.map((_, row) => row + 1),
      base: places.map((i) => inSeconds(trial.start_dms[i] + (from(i) ?? 0))),
      x: places.map((i) => (from(i) === null || to(i) === null ? null : inSeconds(to(i) - from(i)))),
      marker: { color, opacity, line: { width: 0 }, ...pattern },
      hovertext, hovertemplate: "%{hovertext}<extra></extra>",
    });
    const sent = (i) => trial.sent_dms[i];
    const ofGood = (times) => (i) => (trial.errors[i] ? null : times[i]);
    const ofFailed = (time) => (i) => (trial.errors[i] ? time(i) : null);
    const waiting = `waiting and prefill${long.size ? " (hatched: long prompt)" : ""}`;
    const [first, last] = [ofGood(trial.first_dms), ofGood(trial.last_dms)];
    return [
      ...(trial.open_loop ? [bar("late to be sent", colour(3), () => 0, sent)] : []),
      bar(waiting, colour(1), ofGood(trial.sent_dms), first, long.size ? hatched : {}),
      bar("decode", colour(0), first, last),
      ...(Object.keys(trial.errors).length ? [bar(wrong(trial), data.predicted, ofFailed(sent),
        ofFailed((i) => trial.last_dms[i] ?? trial.sent_dms[i] + 100))] : []),
    ];
  }

  /** How many requests were in decode, from each time at which that changed. */
  function inDecode(trial) {
    const changes = trial.index.flatMap((_, i) => trial.first_dms[i] === null ? [] : [
      [trial.start_dms[i] + trial.first_dms[i], 1], [trial.start_dms[i] + trial.last_dms[i], -1]])
      .sort((a, b) => a[0] - b[0]);
    let count = 0;
    return { times: changes.map(([time]) => inSeconds(time)), counts: changes.map(([, by]) => (count += by)) };
  }

  function decodeTrace({ times, counts }) {
    return {
      x: [0, ...times], y: [0, ...counts], yaxis: "y2", mode: "lines", name: "in decode",
      line: { shape: "hv", color: colour(2), width: 1.5 }, showlegend: false,
      fill: "tozeroy", fillcolor: `${colour(2)}33`,
      hovertemplate: "%{y} in decode at %{x:.2f} s<extra></extra>",
    };
  }

  /** `most` in decode at once; null where that is not drawn. */
  function timelineLayout(trial, count, most) {
    const [from, to] = trial.window_s;
    const narrow = at("timeline").clientWidth < 600;
    return {
      height: Math.min(Math.max(7 * count + 240, 380), 900),
      barmode: "overlay", bargap: count > 80 ? 0 : 0.25,
      margin: { l: 10, r: 14, t: narrow ? 70 : 44, b: 46 },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.0, yanchor: "bottom", traceorder: "normal" },
      xaxis: axis({ title: { text: "seconds from the start of the trial" }, rangemode: "tozero", anchor: "y" }),
      yaxis: axis({ title: { text: order.value === "start" ? "requests as sent" : "requests in this order" },
                    range: [count + 0.7, 0.3], domain: [0, most ? 0.8 : 0.94], showgrid: false, tickformat: "d", nticks: 6 }),
      ...(most ? { yaxis2: axis({ title: { text: "in decode" }, domain: [0.84, 1], rangemode: "tozero",
                                  tick0: 0, dtick: Math.ceil(most / 2) }) } : {}),
      shapes: [{ type: "rect", x0: from, x1: to, y0: 0, y1: 1, yref: "paper", layer: "below",
                 line: { width: 1, dash: "dot", color: css("--soft") }, fillcolor: css("--raised"), opacity: 0.6 }],
      annotations: [{ text: "measured window", x: (from + to) / 2, y: most ? 0.82 : 0.97, yref: "paper", yanchor: "middle",
                      showarrow: false, font: { color: css("--soft"), size: 11 } }],
    };
  }
}
