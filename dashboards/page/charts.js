// A panel's frames as Plotly draws them, or as a table. A figure is {traces, layout, height_rem}.
import { overridden } from "./frames.js";

const TICK_FORMATS = { percentunit: ".1~%" };
const UNITS = { watt: "W", hertz: "Hz", bytes: "B", flops: "FLOP/s", joule: "J", currencyUSD: "USD",
                short: "", percentunit: "" };
const INVISIBLE = "rgba(0,0,0,0)";

/** A function name, properties -> colour: the one its dashboard gives, else one that it keeps. */
export function colouring(colours) {
  const given = new Map();
  return (name, properties) => {
    const fixed = properties.color?.fixedColor;
    if (fixed) return fixed;
    if (!given.has(name)) given.set(name, colours[given.size % colours.length]);
    return given.get(name);
  };
}

/** The page's own colour of this name, in the reader's scheme. */
export function pageColour(name) {
  const probe = document.createElement("i"); // light-dark() resolves only on a real property
  probe.style.cssText = `color: var(${name}); display: none`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

/** A node with these fields and children. */
export function element(kind, fields = {}, ...children) {
  const node = Object.assign(document.createElement(kind), fields);
  node.append(...children);
  return node;
}

// ------------------------------------------------------------------------------------- figures

/** Lines over time, one for each frame. */
export function timeseries(panel, frames, colourOf, range) {
  const lines = frames.map((frame) => {
    const [times, numbers] = frame.fields;
    const name = numbers.config.displayNameFromDS || numbers.labels.__name__ || "value";
    return { name, times: times.values, values: numbers.values, refId: frame.refId };
  }).filter(({ values }) => values.some((value) => value !== null));
  const scale = scaled(panel, Math.max(0, ...lines.flatMap(({ values }) => values)));
  const traces = lines.map(({ name, times, values, refId }) => {
    const properties = overridden(panel.fieldConfig.overrides, { name, refId });
    return {
      name, legendgroup: name, showlegend: !properties["custom.hideFrom"]?.legend,
      x: times.map((at) => new Date(at)), y: values.map((value) => value === null ? null : value * scale.factor),
      type: "scatter", mode: values.filter((value) => value !== null).length < 3 ? "markers" : "lines", connectgaps: false,
      line: { color: colourOf(name, properties), width: properties["custom.lineWidth"] ?? 1.5,
              dash: properties["custom.lineStyle"] ? "dash" : "solid" },
      hovertemplate: `${wrapped(name, 40)}: ${scale.hover}<extra></extra>`,
    };
  });
  const layout = {
    ...baseLayout(),
    xaxis: { ...axis(), range: [new Date(range.from * 1000), new Date(range.to * 1000)] },
    yaxis: valueAxis(panel, scale),
    hovermode: "x unified",
    shapes: limits(panel, scale, false),
  };
  return { traces, layout };
}

/** A group of bars for each row of a table, in it one for each column of numbers. */
export function barchart(panel, frames, colourOf) {
  if (!frames.length) return { traces: [] };
  const frame = sorted(frames[0]);
  const flat = panel.options.orientation === "horizontal";
  const groups = frame.fields.find(({ type }) => type === "string").values;
  const columns = frame.fields.filter(({ type }) => type === "number");
  const scale = scaled(panel, Math.max(0, ...columns.flatMap(({ values }) => values)));
  const ticks = groups.map((name) => wrapped(name, flat ? 34 : 16));
  const traces = columns.map(({ name, values }) => {
    const properties = overridden(panel.fieldConfig.overrides, { name });
    const unseen = properties["custom.fillOpacity"] === 0;
    const heights = values.map((value) => value === null ? null : value * scale.factor);
    return {
      name, type: "bar", orientation: flat ? "h" : "v", x: flat ? heights : ticks, y: flat ? ticks : heights,
      showlegend: !properties["custom.hideFrom"]?.legend, hoverinfo: unseen ? "skip" : "all",
      marker: { color: unseen ? INVISIBLE : colourOf(name, properties) },
    };
  });
  const layout = {
    ...baseLayout(),
    xaxis: flat ? valueAxis(panel, scale) : axis(),
    yaxis: flat ? { ...axis(), autorange: "reversed" } : valueAxis(panel, scale),
    hovermode: flat ? "y unified" : "x unified",
    barmode: panel.options.stacking === "normal" ? "stack" : "group",
    shapes: limits(panel, scale, flat),
  };
  return { traces, layout, height_rem: flat ? 3 + 2.6 * groups.length : 17 };
}

/** How a panel's figures are shown: in ms where they are less than a second. */
function scaled(panel, largest) {
  const unit = panel.fieldConfig.defaults.unit ?? "short";
  const inMs = unit === "s" && largest < 1;
  const suffix = unit.startsWith("suffix:") ? unit.slice(7).trim() : inMs ? "ms" : UNITS[unit] ?? unit;
  const format = TICK_FORMATS[unit];
  return { factor: inMs ? 1000 : 1, largest, suffix, format,
           hover: format ? `%{y:${format}}` : `%{y:.3~g} ${suffix}` };
}

function axis() {
  const line = pageColour("--line");
  return { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
}

/** The axis of the figures: from zero, as far as the panel says at least. */
function valueAxis(panel, { factor, largest, suffix, format }) {
  const least = panel.fieldConfig.defaults.custom?.axisSoftMax;
  return {
    ...axis(), rangemode: "tozero", title: { text: suffix, standoff: 6 },
    ...(format ? { tickformat: format } : {}),
    ...(least ? { range: [0, 1.05 * factor * Math.max(largest, least)] } : {}),
  };
}

function baseLayout() {
  return {
    font: { color: pageColour("--ink"), size: 11 }, paper_bgcolor: INVISIBLE, plot_bgcolor: INVISIBLE,
    margin: { l: 50, r: 10, t: 24, b: 30 },
    hoverlabel: { bgcolor: pageColour("--paper") },
    legend: { orientation: "h", y: 1, yanchor: "bottom", x: 1, xanchor: "right", font: { size: 10 } },
  };
}

/** A line at each threshold, across the panel. */
function limits(panel, scale, flat) {
  const { custom, thresholds } = panel.fieldConfig.defaults;
  const steps = custom?.thresholdsStyle ? thresholds.steps.filter(({ value }) => value !== null) : [];
  return steps.map(({ value, color }) => {
    const at = value * scale.factor;
    const ends = flat ? { x0: at, x1: at, y0: 0, y1: 1, yref: "paper" }
      : { y0: at, y1: at, x0: 0, x1: 1, xref: "paper" };
    return { type: "line", line: { color, dash: "dash", width: 1 }, ...ends };
  });
}

/** Lines of about so many letters, for Plotly, which reads its texts as a little HTML. */
function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length > width) lines.push("");
    lines[lines.length - 1] = `${lines.at(-1)} ${word}`.trim();
  }
  return lines.map((line) => line.replace(/[<>&]/g, "")).join("<br>");
}

// -------------------------------------------------------------------------------------- tables

/** A table with a column for each field, in its unit; null where there is no row. */
export function table(panel, frames) {
  if (!frames.length) return null;
  const { fields } = sorted(frames[0]);
  const kind = ({ type }) => type === "number" ? "figure" : "";
  const heads = fields.map((field) =>
    element("th", { textContent: field.name, scope: "col", className: kind(field) }));
  const unit = ({ name }) => {
    const own = overridden(panel.fieldConfig.overrides, { name }).unit ?? "";
    return own.startsWith("suffix:") ? own.slice(7) : "";
  };
  const rows = fields[0].values.map((_, row) => element("tr", {}, ...fields.map((field) => {
    const value = field.values[row];
    const content = field.name === "Report" && value ? linked(value) : figure(value, unit(field));
    return element("td", { className: kind(field) || value || "" }, content); // a verdict has its own
  })));
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

/** A frame whose rows are in order, column by column, and 2 before 16. */
function sorted(frame) {
  const columns = frame.fields.filter(({ type }) => type === "string").map(({ values }) => values);
  const order = frame.fields[0].values.map((_, row) => row).sort((a, b) => {
    for (const values of columns) {
      const difference = (values[a] ?? "").localeCompare(values[b] ?? "", undefined, { numeric: true });
      if (difference) return difference;
    }
    return 0;
  });
  return { ...frame, fields: frame.fields.map((field) =>
    ({ ...field, values: order.map((row) => field.values[row]) })) };
}

function figure(value, unit) {
  if (typeof value !== "number") return value || "–";
  if (Math.abs(value) >= 1e6) {
    return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 }) + unit;
  }
  return (Math.abs(value) >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 })
    : value.toPrecision(3)) + unit;
}

const linked = (report) =>
  element("a", { textContent: report, href: `reports/${report.replace(/[^/]*$/, "")}` });
