// Two figures of one's choice over the load, a line for each variant.
"use strict";

{
  const AXIS_TITLES = { concurrent: "requests in flight", waves: "requests in each wave",
                        poisson: "requests/s", constant: "requests/s" };  // of loads with one number
  const BOUND_NAMES = { ceiling: ", at most", floor: ", at least", point: "" };

  const FORECAST = "#888888", FORECAST_BAND = "rgba(136, 136, 136, 0.45)";  // on light and dark

  const workload = choice("figures-workload", workloadOptions(), both);
  if (data.workloads.length === 1) workload.parentElement.parentElement.hidden = true;
  const first = data.points.filter((p) => p.workload === data.workloads[0]);
  if (new Set(first.map((p) => p.kind + p.level)).size > 2) workload.value = data.workloads[0];
  const options = Object.entries(data.metrics).map(([name, of]) => [name, of.title]);
  const left = choice("left-metric", options, both);
  const right = choice("right-metric", options, both);
  if (data.shown_first.length) left.value = data.shown_first[0];
  const beside = [data.claims[0]?.metric, ...data.shown_first, ...Object.keys(data.metrics)]
    .find((name) => name in data.metrics && name !== left.value);
  if (beside) right.value = beside;
  redraws.push(both);

  function both() {
    overLoad("left", left.value);
    overLoad("right", right.value);
  }

  function overLoad(id, metric) {
    if (!data.metrics[metric]) return;
    const points = data.points.filter((p) => workload.value === "" || p.workload === workload.value);
    const place = places(points, at(id).clientWidth);
    const shown = { metric, ...scaling(data.metrics[metric].unit), place };
    const groups = Map.groupBy(points, (p) => JSON.stringify([p.variant, p.kind, p.workload]));
    const traces = [...groups.values()].flatMap((group) => [
      ...forecasts(group, shown), ...means(group, shown), ...repeats(group, shown),
      ...predictions(group, shown),
    ]);
    named(traces);
    draw(id, traces, {
      height: 380 + place.slanted,
      scattermode: "group",
      margin: { l: 10, r: 10, t: 10, b: 40 },
      xaxis: axis({ type: "category", tickangle: place.crowded ? -45 : 0, categoryorder: "array",
                    categoryarray: [...new Set(points.map(place))], title: { text: place.title } }),
      yaxis: axis({ title: { text: data.metrics[metric].title + shown.unit }, rangemode: "tozero",
                    tickformat: ",~r" }),
      showlegend: data.variants.length > 1 || traces.some((trace) => ["forecast", "predicted"].includes(trace.legendgroup)),
    });
  }

  /** Point -> its place on the axis, as short as it can be; where it is crowded, on one line. */
  function places(points, width) {
    const sameKind = new Set(points.map((p) => p.kind)).size === 1;
    const sameWorkload = new Set(points.map((p) => p.workload)).size === 1;
    const longest = Math.max(...points.flatMap((p) => [p.workload.length, p.load.length]));
    const count = new Set(points.map((p) => p.key.replace(/^.*?\//, ""))).size;
    const crowded = width < Math.max(80, 6.5 * longest) * count;  // px; 6.5 a letter
    const between = crowded ? ", " : "<br>";
    const numbered = sameKind && AXIS_TITLES[points[0].kind];
    const place = (p) => [
      ...(sameWorkload ? [] : [plain(p.workload)]), numbered ? p.level : plain(p.load),
    ].join(between);
    const title = (sameWorkload ? "" : "workload, ") + (numbered || "load");
    const letters = Math.max(...points.map((p) => place(p).length));
    const slanted = crowded ? Math.max(0, 4.5 * letters - 60) : 0;  // px that slanted names need more
    return Object.assign(place, { crowded, slanted, title });
  }

  /** Times in ms, with their unit; `scaled` keeps what is missing missing. */
  function scaling(unit) {
    const factor = { s: 1000, share: 100 }[unit] ?? 1;
    return {
      unit: { s: " (ms)", share: " (%)", 1: "" }[unit] ?? ` (${unit})`,
      scaled: (value) => (isAbsent(value) ? null : value * factor),
    };
  }

  const isAbsent = (value) => value === null || value === undefined;

  function figureOf(p, metric) {
    const [value = null, low = null, high = null, ...each] = p.figures[metric] ?? [];
    return { value, low, high, each };
  }

  function means(group, { metric, unit, scaled, place }) {
    const tint = ofVariant(group[0].variant);
    const figures = group.map((p) => ({ name: p.name, ...figureOf(p, metric) }));
    const hover = ({ name, value, low, high }) =>
      `${plain(name)}<br><b>${value === null ? "–" : digits(scaled(value))}</b>${unit}` +
      (isAbsent(low) ? "" : `<br>${digits(scaled(low))} to ${digits(scaled(high))}`);
    return [{
      name: plain(group[0].variant), legendgroup: group[0].variant, offsetgroup: group[0].variant,
      x: group.map(place), y: figures.map(({ value }) => scaled(value)),
      mode: "lines+markers", line: { color: tint, width: 2 }, marker: { size: 9, color: tint },
      error_y: { type: "data", symmetric: false, thickness: 1.5, width: 4,
        array: figures.map(({ value, high }) => (isAbsent(high) ? 0 : scaled(high - value))),
        arrayminus: figures.map(({ value, low }) => (isAbsent(low) ? 0 : scaled(value - low))) },
      hovertext: figures.map(hover), hovertemplate: "%{hovertext}<extra></extra>",
    }];
  }

  /** A small dot for each repeat, where there are more than the mean. */
  function repeats(group, { metric, scaled, place }) {
    const { variant } = group[0];
    const each = group.flatMap((p) =>
      figureOf(p, metric).each.map((value) => [place(p), scaled(value)]));
    if (each.length <= group.length) return [];
    return [{
      x: each.map(([x]) => x), y: each.map(([, y]) => y), mode: "markers", hoverinfo: "skip",
      offsetgroup: variant, legendgroup: variant, showlegend: false,
      marker: { size: 4, color: ofVariant(variant), opacity: 0.55 },
    }];
  }

  /** What was forecast before any engine started: a short line on a wide band. */
  function forecasts(group, { metric, unit, scaled, place }) {
    const known = group.filter((p) => p.in_virtual_time[metric])
      .map((p) => {
        const [value, low, high] = p.in_virtual_time[metric];
        return { name: p.name, x: place(p), value, low, high };
      });
    if (!known.length) return [];
    const hover = ({ name, value, low, high }) =>
      `${plain(name)}<br>forecast ${digits(scaled(value))}${unit}` +
      `<br>${digits(scaled(low))} to ${digits(scaled(high))}`;
    return [{
      name: "forecast, with its band", legendgroup: "forecast", legendrank: 1999,
      offsetgroup: group[0].variant, x: known.map(({ x }) => x),
      y: known.map(({ value }) => scaled(value)), mode: "markers",
      marker: { symbol: "line-ew", size: 12, line: { width: 2, color: FORECAST }, color: FORECAST },
      error_y: { type: "data", symmetric: false, thickness: 10, width: 0, color: FORECAST_BAND,
        array: known.map(({ value, high }) => scaled(high - value)),
        arrayminus: known.map(({ value, low }) => scaled(value - low)) },
      hovertext: known.map(hover), hovertemplate: "%{hovertext}<extra></extra>",
    }];
  }

  function predictions(group, { metric, unit, scaled, place }) {
    const predicted = group.filter((p) => p.predicted[metric]);
    if (!predicted.length) return [];
    const value = (p) => scaled(p.predicted[metric].value);
    return [{
      name: `predicted${BOUND_NAMES[predicted[0].predicted[metric].kind]}`,
      legendgroup: "predicted", legendrank: 2000, offsetgroup: group[0].variant,
      x: predicted.map(place), y: predicted.map(value), mode: "markers",
      marker: { symbol: "line-ew", size: 16, line: { width: 3, color: data.predicted },
                color: data.predicted },
      hovertext: predicted.map((p) => `${plain(p.name)}<br>predicted ${digits(value(p))}${unit}`),
      hovertemplate: "%{hovertext}<extra></extra>",
    }];
  }

  /** Puts a group into the legend once. */
  function named(traces) {
    const groups = new Set();
    for (const trace of traces) {
      trace.showlegend ??= !groups.has(trace.legendgroup);
      groups.add(trace.legendgroup);
    }
  }
}
