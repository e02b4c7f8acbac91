// The samples behind the percentiles, of the chosen metric, at each point.
"use strict";

{
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];

  const metric = choice("samples-metric",
    Object.entries(data.samples).map(([name, of]) => [name, of.title]), distributions);
  const workload = choice("samples-workload", workloadOptions(), distributions);
  const shape = at("samples-shape"), scale = at("samples-scale");
  shape.addEventListener("change", distributions);
  scale.addEventListener("change", distributions);
  if (data.workloads.length === 1) workload.parentElement.hidden = true;
  if (data.points.length > 8) workload.value = data.workloads[0];
  const claimed = data.metrics[data.claims[0]?.metric]?.samples;
  if (data.samples[claimed]) metric.value = claimed;
  redraws.push(distributions);

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
    const style = styling(points);
    const series = points.map((p) => ({ p, ...style(p), ...of.points[p.key] }));
    const all = series.flatMap(({ ms }) => ms).filter((v) => v > 0);
    const slo_ms = 1000 * data.slo[metric.value];
    const inReach = slo_ms && slo_ms <= 1.6 * Math.max(...all);
    draw("samples", series.map(violins ? violin : shareBelow), {
      ...(inReach ? sloMark(slo_ms, log) : {}),
      ...sizes(violins, series.length),
      margin: { l: 10, r: 14, t: 14, b: 46 },
      showlegend: !violins,
      xaxis: axis({ title: { text: `${of.title} (ms)` }, tickformat: ",~r", ...(log ? logAxis(all)
        : { type: "linear", rangemode: "tozero" }) }),
      yaxis: violins ? axis({ autorange: "reversed", showgrid: false })
                     : axis({ title: { text: "share of samples below (%)" }, range: [0, 101] }),
    });
    at("samples-said").textContent =
      `${of.title} of the requests each figure counts, all repeats together, through at most ` +
      `${Math.max(...series.map(({ ms }) => ms.length), 0)} quantiles a point.` +
      (slo_ms && !inReach ? ` The SLO, ${milliseconds(slo_ms)}, lies beyond the picture.` : "");
  }

  /** Point -> its line's colour and dash: a colour for each variant, where there are several. */
  function styling(points) {
    const several = new Set(points.map((p) => p.variant)).size > 1;
    const load = (p) => `${p.workload} ${p.kind} ${p.level}`;
    const loads = [...new Set(points.map(load))];
    const dash = (place) => DASHES[place % DASHES.length];
    return (p) => {
      const place = loads.indexOf(load(p)), count = data.colours.length;
      return several ? { tint: ofVariant(p.variant), dash: dash(place) }
        : { tint: colour(place % count), dash: dash(Math.floor(place / count)) };
    };
  }

  function violin({ p, ms, tint }) {
    return {
      type: "violin", x: ms, name: plain(p.name), orientation: "h", line: { color: tint },
      points: false, box: { visible: true }, meanline: { visible: true }, spanmode: "hard",
      scalemode: "width", width: 0.8, showlegend: false, hoveron: "violins", hoverinfo: "x+name",
    };
  }

  function shareBelow({ p, ms, n, tint, dash }) {
    const alone = ms.length === 1;
    return {
      x: ms, y: ms.map((_, place) => (alone ? 100 : (100 * place) / (ms.length - 1))),
      mode: alone ? "markers" : "lines", name: `${plain(p.name)} (${n.toLocaleString("en")})`,
      line: { color: tint, dash, width: 2 }, marker: { color: tint },
      hovertemplate: `${plain(p.name)}<br>%{y:.0f}% below %{x:,.4~r} ms<extra></extra>`,
    };
  }

  function sizes(violins, count) {
    const narrow = at("samples").clientWidth < 600;
    return {
      height: violins ? 110 + 46 * count : 400 + (narrow ? 20 * count : 0),
      legend: narrow ? { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top" }
                     : { orientation: "v", x: 1.02, xanchor: "left", y: 1, yanchor: "top",
                         title: { text: "point (samples)" } },
    };
  }

  function logAxis(all) {
    const ticks = logTicks(Math.min(...all), Math.max(...all));
    return { type: "log", tickvals: ticks, ticktext: ticks.map(digits) };
  }

  function sloMark(slo_ms, log) {
    return {
      shapes: [{ type: "line", x0: slo_ms, x1: slo_ms, y0: 0, y1: 1, yref: "paper",
                 line: { color: css("--soft"), dash: "dot", width: 1.5 } }],
      annotations: [{ text: `SLO ${milliseconds(slo_ms)}`, yref: "paper", y: 0.02, yanchor: "bottom",
                      x: log ? Math.log10(slo_ms) : slo_ms, xanchor: "right", xshift: -4,
                      showarrow: false, bgcolor: css("--paper"), font: { color: css("--soft") } }],
    };
  }
}
