// A run's pictures, drawn by Plotly from the page's own data.
"use strict";

{
  const ofVariant = (name) => colour(data.variants.indexOf(name));
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];

  function ms(value) {
    if (value === null || value === undefined) return "–";
    return Math.abs(value) < 999.5 ? `${digits(value)} ms` : `${digits(value / 1000)} s`;
  }

  const dms = (value) => (value === null || value === undefined ? "–" : ms(value / 10));

  // -------------------------------------------------- ratios on predictions: claims and forecasts

  function ratios(id, items, title) {
    const width = at(id).clientWidth;
    const labels = items.map((item) => {
      const lines = wrapped(item.title, width / 7).map((line) => plain(line));
      const where = item.where ? wrapped(item.where, width / 6.3).map((line) =>
        `<span style="color:${css("--soft")};font-size:11px">${plain(line)}</span>`) : [];
      return [...lines, ...where];
    });
    // every row: its label's lines, then the mark; in pixels from the top
    const LINE = 15, MARK = 26;
    const tops = [];
    let height = 4;
    labels.forEach((lines) => { tops.push(height); height += lines.length * LINE + MARK + 8; });
    const bound = (item, sign) => item.predicted * (1 + sign * item.tolerance);
    const firm = items.flatMap((i) => [i.value, i.predicted, bound(i, 1), bound(i, -1), 1])
      .filter((v) => v > 0);
    // one very wide interval must not press all others together: it leaves the picture
    const whiskers = items.flatMap((i) => [i.low, i.high]).filter((v) =>
      v > Math.min(...firm) / 4 && v < Math.max(...firm) * 4);
    const low = Math.min(...firm, ...whiskers) / 1.25, high = Math.max(...firm, ...whiskers) * 1.25;
    const middle = (row) => tops[row] + labels[row].length * LINE + MARK / 2;
    const shapes = items.map((item, row) => ({
      type: "rect", layer: "below", line: { width: 0 }, fillcolor: data.predicted, opacity: 0.25,
      x0: item.kind === "ceiling" ? low : Math.max(bound(item, -1), low),
      x1: item.kind === "floor" ? high : bound(item, 1),
      y0: middle(row) - MARK / 2 + 4, y1: middle(row) + MARK / 2 - 4,
    }));
    shapes.push({ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper",
                  line: { color: css("--soft"), width: 1 }, layer: "below" });
    const there = items.map((item, row) => ({ item, row })).filter(({ item }) => item.value !== null);
    const missing = items.map((item, row) => ({ item, row })).filter(({ item }) => item.value === null);
    const hover = ({ item }) => plain(item.title) + (item.where ? `<br>${plain(item.where)}` : "") +
      `<br><b>${digits(item.value)}x</b>` +
      (item.low === null ? "" : ` (${digits(item.low)} to ${digits(item.high)})`) +
      `<br>${item.where ? `predicted ${digits(item.predicted)}x<br>` : ""}` +
      wrapped(item.verdict, 60).map(plain).join("<br>");
    const traces = [
      { name: "predicted", x: items.map((i) => i.predicted), y: items.map((_, row) => middle(row)),
        mode: "markers", hoverinfo: "skip",
        marker: { symbol: "line-ns", size: 15, line: { width: 3, color: data.predicted },
                  color: data.predicted } },
      { name: "measured, 95 % interval", mode: "markers",
        x: there.map(({ item }) => item.value), y: there.map(({ row }) => middle(row)),
        error_x: { type: "data", symmetric: false, thickness: 2, width: 5,
                   color: colour(0),
                   array: there.map(({ item }) => (item.high === null ? 0 : item.high - item.value)),
                   arrayminus: there.map(({ item }) => (item.low === null ? 0 : item.value - item.low)) },
        marker: { size: 10, color: colour(0),
                  symbol: there.map(({ item }) => (item.valid ? "circle" : "circle-open")) },
        hovertext: there.map(hover), hovertemplate: "%{hovertext}<extra></extra>" },
    ];
    const ticks = logTicks(low, high);
    draw(id, traces, {
      height: height + 84,
      margin: { l: 12, r: 14, t: 34, b: 46 },
      shapes,
      annotations: [
        ...labels.map((lines, row) => ({
          text: lines.join("<br>"), xref: "paper", x: 0, xanchor: "left", align: "left",
          y: tops[row], yanchor: "top", showarrow: false, bgcolor: css("--paper"),
        })),
        ...missing.map(({ item, row }) => ({
          text: "– (no ratio)", x: Math.log10(item.predicted || 1), y: middle(row), xanchor: "left",
          xshift: 10, showarrow: false, font: { color: css("--soft") },
        })),
      ],
      xaxis: axis({ type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: ticks,
                    ticktext: ticks.map((t) => `${t}x`), title: { text: title } }),
      yaxis: { range: [height, 0], visible: false, fixedrange: true },
    });
  }

  if (data.claims.length) redraws.push(() => ratios("claims", data.claims, "treatment / baseline"));
  if (at("forecasts")) {
    redraws.push(() => ratios("forecasts", data.forecasts, "measured / predicted"));
  }

  // -------------------------------------------------------------------------------- distributions

  {
    const workloads = [["", "all"], ...data.workloads.map((name) => [name, name])];
    const redraw = () => distributions();
    const metric = choice("samples-metric",
      Object.entries(data.samples).map(([name, of]) => [name, of.title]), redraw);
    const workload = choice("samples-workload", workloads, redraw);
    if (data.workloads.length === 1) workload.parentElement.hidden = true;
    const asked = data.metrics[data.claims[0]?.metric]?.samples;
    if (data.samples[asked]) metric.value = asked;
    if (data.points.length > 8) workload.value = data.workloads[0];
    const shape = at("samples-shape"), scale = at("samples-scale");
    shape.addEventListener("change", redraw);
    scale.addEventListener("change", redraw);

    function distributions() {
      const of = data.samples[metric.value];
      const points = data.points.filter((p) =>
        of?.points[p.key] && (workload.value === "" || p.workload === workload.value));
      if (!points.length) {
        at("samples-said").textContent = "No request that counts has such a figure here.";
        Plotly.purge(at("samples"));
        return;
      }
      const violins = shape.value === "violin";
      scale.parentElement.hidden = violins;
      const log = !violins && scale.value === "log";
      const several = new Set(points.map((p) => p.variant)).size > 1;
      const rest = [...new Set(points.map((p) => `${p.workload} ${p.kind} ${p.level}`))];
      const style = (p) => {
        const place = rest.indexOf(`${p.workload} ${p.kind} ${p.level}`);
        return several
          ? { colour: ofVariant(p.variant), dash: DASHES[place % DASHES.length] }
          : { colour: colour(place % data.colours.length), dash: DASHES[Math.floor(place / data.colours.length) % DASHES.length] };
      };
      const drawn = points.map((p) => ({ p, ...style(p), ...of.points[p.key] }));
      const traces = drawn.map(({ p, ms, n, colour: c, dash }) => violins
        ? { type: "violin", x: ms, name: plain(p.name), orientation: "h", line: { color: c },
            points: false, box: { visible: true }, meanline: { visible: true }, spanmode: "hard",
            scalemode: "width", width: 0.8, showlegend: false, hoveron: "violins",
            hoverinfo: "x+name" }
        : { x: ms, y: ms.map((_, i) => (ms.length === 1 ? 100 : (100 * i) / (ms.length - 1))),
            mode: ms.length === 1 ? "markers" : "lines", name: `${plain(p.name)} (${n.toLocaleString("en")})`,
            line: { color: c, dash, width: 2 }, marker: { color: c },
            hovertemplate: `${plain(p.name)}<br>%{y:.0f} % below %{x:,.4~r} ms<extra></extra>` });
      const all = drawn.flatMap(({ ms }) => ms).filter((v) => v > 0);
      const ticks = log ? logTicks(Math.min(...all), Math.max(...all)) : null;
      const limit = data.slo[metric.value];
      const inReach = limit && 1000 * limit <= 1.6 * Math.max(...all);
      const shapes = inReach ? [{ type: "line", x0: 1000 * limit, x1: 1000 * limit, y0: 0, y1: 1,
        yref: "paper", line: { color: css("--soft"), dash: "dot", width: 1.5 } }] : [];
      const annotations = inReach ? [{ text: `SLO ${ms(1000 * limit)}`, yref: "paper", y: 0.02,
        yanchor: "bottom", x: log ? Math.log10(1000 * limit) : 1000 * limit, xanchor: "right",
        xshift: -4, showarrow: false, bgcolor: css("--paper"), font: { color: css("--soft") } }] : [];
      const narrow = at("samples").clientWidth < 600;
      draw("samples", traces, {
        height: violins ? 110 + 46 * drawn.length
          : 400 + (narrow ? 20 * drawn.length : 0),
        shapes, annotations,
        margin: { l: 10, r: 14, t: 14, b: 46 },
        showlegend: !violins,
        legend: narrow ? { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top" }
                       : { orientation: "v", x: 1.02, xanchor: "left", y: 1, yanchor: "top",
                           title: { text: "point (samples)" } },
        xaxis: axis({ type: log ? "log" : "linear", title: { text: `${of.title} (ms)` },
                      tickformat: ",~r", ...(log ? { tickvals: ticks, ticktext: ticks.map(digits) } : { rangemode: "tozero" }) }),
        yaxis: violins ? axis({ autorange: "reversed", showgrid: false })
                       : axis({ title: { text: "share of samples below (%)" }, range: [0, 101] }),
      });
      at("samples-said").textContent =
        `${of.title} of the requests each figure counts, all repeats together, through at most ` +
        `${Math.max(...drawn.map(({ ms: q }) => q.length), 0)} quantiles a point.` +
        (limit && !inReach ? ` The SLO, ${ms(1000 * limit)}, lies beyond the picture.` : "");
    }
    redraws.push(distributions);
  }

  // ------------------------------------------------------------------------ figures over the load

  {
    const redraw = () => both();
    const workload = choice("figures-workload",
      [["", "all"], ...data.workloads.map((name) => [name, name])], redraw);
    if (data.workloads.length === 1) workload.parentElement.parentElement.hidden = true;
    const loads = (name) => new Set(data.points.filter((p) => p.workload === name)
      .map((p) => p.kind + p.level)).size;
    if (loads(data.workloads[0]) > 2) workload.value = data.workloads[0];
    const options = Object.entries(data.metrics).map(([name, of]) => [name, of.title]);
    const has = (name) => name in data.metrics;
    const left = choice("left-metric", options, redraw);
    const right = choice("right-metric", options, redraw);
    if (has("output_tokens_per_s")) left.value = "output_tokens_per_s";
    const beside = [data.claims[0]?.metric, "tpot_mean_s", "ttft_mean_s", "ttft_p50_s", ...Object.keys(data.metrics)]
      .find((name) => has(name) && name !== left.value);
    if (beside) right.value = beside;

    function one(id, metric) {
      const of = data.metrics[metric];
      if (!of) return;
      const factor = of.unit === "s" ? 1000 : 1;
      const unit = { s: " (ms)", 1: "" }[of.unit] ?? ` (${of.unit})`;
      const points = data.points.filter((p) => workload.value === "" || p.workload === workload.value);
      const sameKind = new Set(points.map((p) => p.kind)).size === 1;
      const sameWorkload = new Set(points.map((p) => p.workload)).size === 1;
      const crowded = at(id).clientWidth < 80 * new Set(points.map((p) => p.key.replace(/^.*?\//, ""))).size;
      const place = (p) => [
        ...(sameWorkload ? [] : [plain(p.workload)]),
        ...(sameKind ? [p.level] : [p.kind, p.level]),
      ].join(crowded ? (sameKind ? ", " : " ") : "<br>");
      const places = [...new Set(points.map(place))];
      const groups = Map.groupBy(points, (p) => JSON.stringify([p.variant, p.kind, p.workload]));
      const named = new Set();
      const traces = [];
      for (const mine of groups.values()) {
        const { variant } = mine[0];
        const found = mine.map((p) => ({ p, ...(p.figures[metric] ?? { value: null, each: [] }) }));
        const scaled = (v) => (v === null || v === undefined ? null : v * factor);
        traces.push({
          name: plain(variant), legendgroup: variant, showlegend: !named.has(variant),
          offsetgroup: variant, x: found.map(({ p }) => place(p)), y: found.map((f) => scaled(f.value)),
          mode: "lines+markers", line: { color: ofVariant(variant), width: 2 },
          marker: { size: 9, color: ofVariant(variant) },
          error_y: { type: "data", symmetric: false, thickness: 1.5, width: 4,
            array: found.map((f) => (f.high ?? null) === null ? 0 : scaled(f.high - f.value)),
            arrayminus: found.map((f) => (f.low ?? null) === null ? 0 : scaled(f.value - f.low)) },
          hovertext: found.map((f) => `${plain(f.p.name)}<br><b>${f.value === null ? "–" : digits(scaled(f.value))}</b>${unit}` +
            ((f.low ?? null) === null ? "" : `<br>${digits(scaled(f.low))} to ${digits(scaled(f.high))}`)),
          hovertemplate: "%{hovertext}<extra></extra>",
        });
        named.add(variant);
        const each = found.flatMap((f) => (f.each ?? []).map((v) => [place(f.p), scaled(v)]));
        if (each.length > found.length) traces.push({
          x: each.map(([x]) => x), y: each.map(([, y]) => y), mode: "markers", hoverinfo: "skip",
          offsetgroup: variant, legendgroup: variant, showlegend: false,
          marker: { size: 4, color: ofVariant(variant), opacity: 0.55 },
        });
        const foretold = mine.filter((p) => p.predicted[metric]);
        if (foretold.length) traces.push({
          name: `predicted${{ ceiling: ", at most", floor: ", at least", point: "" }[foretold[0].predicted[metric].kind]}`,
          legendgroup: "predicted", legendrank: 2000, showlegend: !named.has(" predicted"), offsetgroup: variant,
          x: foretold.map(place), y: foretold.map((p) => scaled(p.predicted[metric].value)),
          mode: "markers", marker: { symbol: "line-ew", size: 16, line: { width: 3, color: data.predicted }, color: data.predicted },
          hovertext: foretold.map((p) => `${plain(p.name)}<br>predicted ${digits(scaled(p.predicted[metric].value))}${unit}`),
          hovertemplate: "%{hovertext}<extra></extra>",
        });
        if (foretold.length) named.add(" predicted");
      }
      const title = { concurrent: "requests in flight", waves: "requests a wave",
                      poisson: "requests/s", constant: "requests/s" };
      draw(id, traces, {
        height: 380,
        scattermode: "group",
        margin: { l: 10, r: 10, t: 10, b: 40 },
        xaxis: axis({ type: "category", tickangle: crowded ? -45 : 0, categoryorder: "array", categoryarray: places,
                      title: { text: (sameWorkload ? "" : "workload, ") +
                                     (sameKind ? title[points[0].kind] ?? points[0].kind : "load") } }),
        yaxis: axis({ title: { text: of.title + unit }, rangemode: "tozero", tickformat: ",~r" }),
        showlegend: data.variants.length > 1 || named.has(" predicted"),
      });
    }
    function both() {
      one("left", left.value);
      one("right", right.value);
    }
    redraws.push(both);
  }

  // --------------------------------------------------------------------------------- every request

  {
    const redraw = () => timeline();
    const point = choice("trial-point", data.points.map((p) => [p.key, p.name]), () => {
      repeats();
      timeline();
    });
    const repeat = at("trial-repeat"), order = at("trial-order");
    repeat.addEventListener("change", redraw);
    order.addEventListener("change", redraw);
    if (data.claims.length) point.value = data.claims[0].point;
    repeats();

    function repeats() {
      const mine = data.trials.filter((t) => t.point === point.value);
      repeat.replaceChildren(...mine.map((t) =>
        new Option(t.failed ? `${t.repeat} (failed)` : t.repeat, t.repeat)));
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
      const length = { start: (i) => -trial.start_dms[i],
                       e2e: (i) => trial.first_dms[i] === null ? Infinity : trial.last_dms[i],
                       ttft: (i) => trial.first_dms[i] ?? Infinity,
                       gap: (i) => trial.gap_dms[i] ?? -1 }[order.value];
      const sorted = trial.index.map((_, i) => i).sort((a, b) =>
        length(a) === length(b) ? a - b : length(b) - length(a));
      const long = new Set(trial.long);
      at("trial-said").textContent = said(trial);
      rows.replaceChildren(...sorted.slice(0, 10).map((i) => tableRow(trial, i, long)));
      sortable(at("trial-table"));
      bars(trial, sorted, long);
    }

    function said(trial) {
      const [queue, prefill, decode] = trial.engine_ms;
      const shown = trial.index.length;
      const failed = Object.keys(trial.errors).length;
      return `${trial.sent.toLocaleString("en")} requests` +
        (shown < trial.sent ? `, the ${shown.toLocaleString("en")} longest of them shown` : "") +
        (failed ? `, ${failed} failed` : "") +
        `. The engine's own means over this trial: queue ${ms(queue)}, prefill ${ms(prefill)}, decode ${ms(decode)}.`;
    }

    function remark(trial, i, long) {
      return [trial.errors[i] ? `failed: ${trial.errors[i]}` : "",
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

    function bars(trial, sorted, long) {
      const s = (v) => v / 10000;
      const y = sorted.map((_, row) => row + 1);
      const hover = sorted.map((i) =>
        `request ${trial.index[i]}` +
        `<br>${trial.prompt[i] ?? "–"} prompt, ${trial.output[i] ?? "–"} output tokens` +
        `<br>first token after ${dms(trial.first_dms[i])}, all after ${dms(trial.last_dms[i])}` +
        (trial.open_loop ? `<br>sent ${dms(trial.sent_dms[i])} late` : "") +
        `<br>TPOT ${dms(trial.tpot_dms[i])}, longest pause ${dms(trial.gap_dms[i])}` +
        (remark(trial, i, long) ? `<br>${wrapped(remark(trial, i, long), 60).map(plain).join("<br>")}` : ""));
      const faint = sorted.map((i) => (trial.counted[i] || trial.errors[i] ? 1 : 0.35));
      const bar = (name, c, from, to, pattern) => ({
        type: "bar", orientation: "h", name, y,
        base: sorted.map((i) => s(trial.start_dms[i] + (from(i) ?? 0))),
        x: sorted.map((i) => (from(i) === null || to(i) === null ? null : s(to(i) - from(i)))),
        marker: { color: c, opacity: faint, line: { width: 0 },
                  ...(pattern ? { pattern: { shape: sorted.map((i) => (long.has(i) ? "/" : "")),
                                             fgcolor: "#000000", fillmode: "overlay", size: 5 } } : {}) },
        hovertext: hover, hovertemplate: "%{hovertext}<extra></extra>",
      });
      const ok = (v) => (i) => (trial.errors[i] ? null : v[i]);
      const zero = () => 0;
      const traces = [
        bar(long.size ? "waiting and prefill (hatched: long prompt)" : "waiting and prefill", colour(1),
            ok(trial.sent_dms), ok(trial.first_dms), long.size > 0),
        bar("decode", colour(0), ok(trial.first_dms), ok(trial.last_dms)),
      ];
      if (trial.open_loop) {
        traces.unshift(bar("late to be sent", colour(3), zero, (i) => trial.sent_dms[i]));
      }
      if (Object.keys(trial.errors).length) {
        traces.push(bar("failed", data.predicted, (i) => (trial.errors[i] ? trial.sent_dms[i] : null),
                        (i) => (trial.errors[i] ? trial.last_dms[i] ?? trial.sent_dms[i] + 100 : null)));
      }
      const edges = trial.index.flatMap((_, i) => trial.first_dms[i] === null ? [] : [
        [trial.start_dms[i] + trial.first_dms[i], 1], [trial.start_dms[i] + trial.last_dms[i], -1]])
        .sort((a, b) => a[0] - b[0]);
      let level = 0;
      const steps = edges.map(([, change]) => (level += change));
      traces.push({ x: [0, ...edges.map(([t]) => s(t))], y: [0, ...steps], yaxis: "y2",
        mode: "lines", line: { shape: "hv", color: colour(2), width: 1.5 }, name: "in decode",
        showlegend: false, fill: "tozeroy", fillcolor: `${colour(2)}33`,
        hovertemplate: "%{y} in decode at %{x:.2f} s<extra></extra>" });
      const [from, to] = trial.window_s;
      const n = sorted.length;
      const narrow = at("timeline").clientWidth < 600;
      draw("timeline", traces, {
        height: Math.min(Math.max(7 * n + 240, 380), 900),
        barmode: "overlay", bargap: n > 80 ? 0 : 0.25,
        margin: { l: 10, r: 14, t: narrow ? 70 : 44, b: 46 },
        legend: { orientation: "h", x: 0, xanchor: "left", y: 1.0, yanchor: "bottom", traceorder: "normal" },
        xaxis: axis({ title: { text: "seconds from the start of the trial" }, rangemode: "tozero", anchor: "y" }),
        yaxis: axis({ title: { text: order.value === "start" ? "requests as sent" : "requests in this order" },
                      range: [n + 0.7, 0.3], domain: [0, 0.8], showgrid: false, tickformat: "d", nticks: 6 }),
        yaxis2: axis({ title: { text: "in decode" }, domain: [0.84, 1], rangemode: "tozero", tick0: 0,
                       dtick: Math.ceil(Math.max(1, ...steps) / 2) }),
        shapes: [{ type: "rect", x0: from, x1: to, y0: 0, y1: 1, yref: "paper", layer: "below",
                   line: { width: 1, dash: "dot", color: css("--soft") }, fillcolor: css("--raised"), opacity: 0.6 }],
        annotations: [{ text: "measured window", x: (from + to) / 2, y: 0.82, yref: "paper", yanchor: "middle",
                        showarrow: false, font: { color: css("--soft"), size: 11 } }],
      });
    }
    redraws.push(timeline);
  }

  drawn();
}
