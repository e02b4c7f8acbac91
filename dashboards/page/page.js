// Draws the dashboards that dashboards/ builds for Grafana, with what Prometheus answers. It knows
// the kinds of panel, the variables and the transformations that those dashboards use, no others.
"use strict";

const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999"];
const DARK = window.matchMedia("(prefers-color-scheme: dark)"), BRIGHTER = { "#0072B2": "#2188CC" };
const LIMIT = "#c4451c"; // of an SLO or threshold
const GRAFANAS = { "semi-dark-blue": "#0072B2", "super-light-blue": "#9fd3f5", "semi-dark-red": LIMIT };
const SCRAPE_S = 1, LEAST_STEP_S = 5, POINTS = 300, AGAIN_MS = 3000;
const UNITS = { percentunit: ".1~%", watt: "W", hertz: "Hz", bytes: "B" };
const SPANS = { run: "the whole run", 300: "last 5 min", 900: "last 15 min", 3600: "last hour",
  86400: "last day" };
const REFRESH = { 2: "every 2 s", 5: "every 5 s", 30: "every 30 s", 0: "off" };
const state = { boards: [], board: null, chosen: {}, span: "run", every: 5, timer: 0, turn: 0 };
const byId = (id) => document.getElementById(id);

function made(kind, fields = {}, ...inside) {
  const node = Object.assign(document.createElement(kind), fields);
  node.append(...inside);
  return node;
}

async function ask(path, fields) {
  const asked = new URLSearchParams(fields);
  const reply = await fetch(`/api/v1/${path}?${asked}`);
  const answer = await reply.json().catch(() => ({ error: reply.statusText })); // while it starts it says so
  if (answer.status !== "success") throw new Error(answer.error);
  return answer.data.result ?? answer.data; // a query wraps what it found, a list of labels does not
}

// ------------------------------------------------------------------------------------- choices

function filled(text, window_s, step_s) {
  const fixed = { __range: `${Math.ceil(window_s)}s`,
    __rate_interval: `${Math.max(step_s + SCRAPE_S, 4 * SCRAPE_S)}s` };
  return text.replace(/\$\{?(\w+)(?::\w+)?\}?/g, (all, name) => fixed[name] ?? state.chosen[name] ?? all);
}

async function values(variable, window) {
  const [, matcher, label] = /^label_values\((.+), *(\w+)\)$/.exec(variable.query);
  const found = await ask(`label/${label}/values`,
    { "match[]": filled(matcher, 1, 1), start: window.start, end: window.end });
  return variable.sort === 2 ? found.reverse() : found;
}

function select(name, title, options, chosen, change) {
  const box = made("select", { id: `choose-${name}` });
  for (const [value, text] of options) {
    box.append(made("option", { value, textContent: text, selected: String(value) === String(chosen) }));
  }
  box.addEventListener("change", () => change(box.value));
  return made("label", { textContent: title }, box);
}

async function choices() {
  const form = made("form", { id: "choices" });
  form.setAttribute("aria-label", "What is shown");
  form.append(select("board", "Dashboard", state.boards.map((b) => [b.uid, b.title]),
    state.board.uid, (uid) => { show(uid); begin(); }));
  const wide = { start: Date.now() / 1000 - 2 * 365 * 86400, end: Date.now() / 1000 + 60 };
  for (const variable of state.board.templating.list) {
    const found = await values(variable, wide);
    const options = found.map((v) => [v, v]);
    if (variable.includeAll) options.unshift([".*", "all"]);
    const known = options.some(([value]) => value === state.chosen[variable.name]);
    if (!known) state.chosen[variable.name] = options.length ? options[0][0] : "";
    form.append(select(variable.name, variable.label, options, state.chosen[variable.name],
      (value) => { state.chosen[variable.name] = value; begin(); }));
  }
  if (live()) {
    form.append(select("span", "Time", Object.entries(SPANS).reverse(), state.span,
      (value) => { state.span = value; draw(); }));
    form.append(select("every", "Refresh", Object.entries(REFRESH), state.every,
      (value) => { state.every = Number(value); again(); }));
  }
  byId("choices").replaceWith(form);
}

const live = () => state.board.panels.some((p) => p.type === "timeseries");

function show(uid) { // what may be all, is all again
  state.board = state.boards.find((b) => b.uid === uid) ?? state.boards[0];
  for (const { name, includeAll } of state.board.templating.list) if (includeAll) delete state.chosen[name];
}

async function newestRun() {
  const now = Date.now() / 1000;
  const series = await ask("series", { "match[]": "lab_load_point", start: now - 2 * 365 * 86400, end: now });
  const newest = series.sort((a, b) => a.run_id.localeCompare(b.run_id)).pop();
  if (newest) Object.assign(state.chosen, { lab: newest.lab, run: newest.run_id });
}

async function windowShown() {
  const now = Date.now() / 1000;
  if (!live()) return { start: now - 2 * 365 * 86400, end: now };
  if (state.span !== "run") return { start: now - Number(state.span), end: now };
  const [, y, mo, d, h, mi, s] = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z/.exec(state.chosen.run) ?? [];
  if (!y) return { start: now - 900, end: now };
  const start = Date.UTC(y, mo - 1, d, h, mi, s) / 1000;
  const step = Math.max(15, Math.ceil((now - start) / 5000));
  const seen = await ask("query_range", {
    query: `count(count_over_time(lab_load_point{run_id="${state.chosen.run}"}[${step}s]))`,
    start, end: now, step });
  const times = seen[0]?.values.map(([at]) => at) ?? [];
  return times.length ? { start: times[0] - step, end: Math.min(now, times.at(-1) + step) }
    : { start, end: now };
}

// ---------------------------------------------------------------------- what a panel's frames hold

async function frames(panel, window) {
  const length = window.end - window.start;
  return Promise.all(panel.targets.map(async (target) => {
    const found = await ask("query", { query: filled(target.expr, length, LEAST_STEP_S), time: window.end });
    return found.map(({ metric, value }) => ({ ...metric, [`Value #${target.refId}`]: Number(value[1]) }));
  }));
}

const isFigure = (name) => name.startsWith("Value");

function merged(tables) {
  const rows = [];
  for (const table of tables) {
    for (const row of table) {
      const names = Object.keys(row).filter((n) => !isFigure(n) && n !== "__name__");
      const same = rows.find((r) => names.every((n) => !(n in r) || r[n] === row[n])
        && !Object.keys(row).some((n) => isFigure(n) && n in r));
      if (same) Object.assign(same, row); else rows.push({ ...row });
    }
  }
  return rows;
}

function transformed(panel, tables) {
  let rows = tables.length > 1 ? null : tables[0];
  for (const { id, options } of panel.transformations ?? []) {
    if (id === "merge") rows = merged(tables);
    if (id === "filterFieldsByName") {
      const kept = new Set([...options.include.names, ...(tables.length > 1 ? [] : ["Value #A"])]);
      rows = rows.map((row) => Object.fromEntries(Object.entries(row).filter(([n]) => kept.has(n))));
    }
    if (id === "organize") rows = organized(rows, options);
    if (id === "groupingToMatrix") rows = matrix(rows, options);
  }
  return (rows ?? merged(tables)).sort(byNames);
}

function byNames(a, b) { // column by column, and 2 before 16
  for (const name of Object.keys(a)) {
    const order = isFigure(name) || typeof a[name] !== "string" ? 0
      : a[name].localeCompare(b[name] ?? "", undefined, { numeric: true });
    if (order) return order;
  }
  return 0;
}

function organized(rows, { renameByName = {}, indexByName = {} }) {
  return rows.map((row) => {
    const names = Object.keys(row).sort((a, b) => (indexByName[a] ?? 99) - (indexByName[b] ?? 99));
    return Object.fromEntries(names.map((n) => [renameByName[n] ?? (n === "Value #A" ? renameByName.Value ?? n : n), row[n]]));
  });
}

function matrix(rows, { rowField, columnField }) {
  const found = new Map();
  for (const row of rows) {
    const at = row[rowField] ?? "";
    if (!found.has(at)) found.set(at, { [rowField]: at });
    found.get(at)[row[columnField]] = row["Value #A"];
  }
  return [...found.values()];
}

// ----------------------------------------------------------------------------------- drawing

function resolvedColour(name) { // light-dark() resolves only on a real property
  const probe = made("i", { style: `color: var(${name}); display: none` });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function layout(panel, largest) {
  const unit = panel.fieldConfig.defaults.unit ?? "short";
  const ink = resolvedColour("--ink"), line = resolvedColour("--line");
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  const y = { ...axis, rangemode: "tozero", ...(unit === "percentunit" ? { tickformat: UNITS[unit] } : {}),
    title: { text: unitText(unit, largest), standoff: 6 } };
  const least = panel.fieldConfig.defaults.custom?.axisSoftMax;
  if (least) y.range = [0, 1.05 * scaleOf(panel, largest) * Math.max(largest, least)];
  return { font: { color: ink, size: 11 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 50, r: 10, t: 24, b: 30 }, hovermode: "x unified", xaxis: { ...axis }, yaxis: y,
    hoverlabel: { bgcolor: resolvedColour("--paper") },
    legend: { orientation: "h", y: 1, yanchor: "bottom", x: 1, xanchor: "right", font: { size: 10 } }, shapes: [], annotations: [] };
}

function unitText(unit, largest) {
  if (unit === "s") return largest < 1 ? "ms" : "s";
  if (unit === "percentunit" || unit === "short") return "";
  return unit.startsWith("suffix:") ? unit.slice(7).trim() : UNITS[unit] ?? unit;
}

const scaleOf = (panel, largest) => (panel.fieldConfig.defaults.unit === "s" && largest < 1 ? 1000 : 1);

const colours = new Map(); // a name to which the dashboards give no colour keeps its own across panels

function colourOf(name, own) {
  const asked = own.color?.fixedColor;
  const fixed = GRAFANAS[asked] ?? (asked?.startsWith("#") ? asked : undefined);
  if (!fixed && !colours.has(name)) colours.set(name, COLOURS[colours.size % COLOURS.length]);
  return (DARK.matches && BRIGHTER[fixed ?? colours.get(name)]) || (fixed ?? colours.get(name));
}

function overrides(panel, matcher, name) {
  const found = {};
  for (const { matcher: m, properties } of panel.fieldConfig.overrides ?? []) {
    const matches = matcher === "byRegexp" ? (text) => RegExp(text.slice(1, -1)).test(name) : (text) => text === name;
    if (m.id === matcher && matches(m.options)) for (const p of properties) found[p.id] = p.value;
  }
  return found;
}

const named = (legend, metric) => (legend ?? "").replace(/\{\{ *(\w+) *\}\}/g, (_, n) => metric[n] ?? "");

async function timeseries(panel, window) {
  const length = window.end - window.start;
  const step = Math.max(LEAST_STEP_S, Math.ceil(length / POINTS));
  const answers = await Promise.all(panel.targets.map((target) => ask("query_range",
    { query: filled(target.expr, length, step), start: window.start, end: window.end, step })));
  const traces = answers.flatMap((found, i) => found.map(({ metric, values: at }) => {
    const name = named(panel.targets[i].legendFormat, metric) || metric.__name__ || "value";
    const own = { ...overrides(panel, "byRegexp", name), ...overrides(panel, "byFrameRefID", panel.targets[i].refId) };
    return { name, x: [], y: [], raw: at, type: "scatter", mode: at.length < 3 ? "markers" : "lines",
      connectgaps: false, legendgroup: name, showlegend: !own["custom.hideFrom"]?.legend,
      line: { color: colourOf(name, own), width: own["custom.lineWidth"] ?? 1.5,
        dash: own["custom.lineStyle"] ? "dash" : "solid" } };
  }));
  const largest = Math.max(0, ...traces.flatMap((t) => t.raw.map(([, v]) => Number(v)).filter(isFinite)));
  const scale = scaleOf(panel, largest);
  const unit = panel.fieldConfig.defaults.unit ?? "short";
  const value = unit === "percentunit" ? `%{y:${UNITS[unit]}}` : `%{y:.3~g} ${unitText(unit, largest)}`;
  for (const trace of traces) {
    trace.hovertemplate = `${wrapped(trace.name, 40)}: ${value}<extra></extra>`;
    let before = null;
    for (const [at, value] of trace.raw) {
      if (before !== null && at - before > step * 1.5) { trace.x.push(null); trace.y.push(null); }
      trace.x.push(new Date(at * 1000));
      trace.y.push(isFinite(value) ? Number(value) * scale : null);
      before = at;
    }
    delete trace.raw;
  }
  const drawn = layout(panel, largest);
  drawn.xaxis.range = [new Date(window.start * 1000), new Date(window.end * 1000)];
  drawn.shapes = [...state.annotated.bands, ...limits(panel, scale, false)];
  const seen = traces.filter((t) => t.y.some((v) => v !== null));
  return [seen.length ? [pointNames(window), ...seen] : [], drawn];
}

async function barchart(panel, window) {
  const rows = transformed(panel, await frames(panel, window));
  const flat = panel.options.orientation === "horizontal";
  const at = panel.options.xField ?? panel.transformations.find((t) => t.id === "groupingToMatrix")?.options.rowField;
  const names = [...new Set(rows.flatMap((r) => Object.keys(r)))].filter((n) => n !== at);
  const largest = Math.max(0, ...rows.flatMap((r) => names.map((n) => r[n] ?? 0)));
  const scale = scaleOf(panel, largest);
  const ticks = rows.map((r) => wrapped(String(r[at]), flat ? 34 : 16));
  const traces = names.map((name) => {
    const own = { ...overrides(panel, "byRegexp", name), ...overrides(panel, "byName", name) };
    const heights = rows.map((r) => (r[name] === undefined ? null : r[name] * scale));
    return { name, type: "bar", orientation: flat ? "h" : "v", x: flat ? heights : ticks, y: flat ? ticks : heights,
      showlegend: !own["custom.hideFrom"]?.legend,
      marker: { color: own["custom.fillOpacity"] === 0 ? "rgba(0,0,0,0)" : colourOf(name, own) },
      hoverinfo: own["custom.fillOpacity"] === 0 ? "skip" : "all" };
  });
  const drawn = layout(panel, largest);
  if (flat) [drawn.xaxis, drawn.yaxis] = [drawn.yaxis, { ...drawn.xaxis, autorange: "reversed" }];
  drawn.hovermode = flat ? "y unified" : "x unified";
  drawn.barmode = panel.options.stacking === "normal" ? "stack" : "group";
  drawn.shapes = limits(panel, scale, flat);
  const tall = flat ? 3 + 2.6 * rows.length : 17;
  return [rows.length ? traces : [], drawn, tall];
}

function limits(panel, scale, flat) { // a line at each threshold, across the panel
  const { custom, thresholds } = panel.fieldConfig.defaults;
  const line = { color: LIMIT, dash: "dash", width: 1 };
  return (custom?.thresholdsStyle ? thresholds.steps : []).filter((t) => t.value !== null).map(({ value }) => {
    const at = value * scale;
    return { type: "line", line, ...(flat ? { x0: at, x1: at, y0: 0, y1: 1, yref: "paper" }
      : { y0: at, y1: at, x0: 0, x1: 1, xref: "paper" }) };
  });
}

function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length > width) lines.push("");
    lines[lines.length - 1] = `${lines.at(-1)} ${word}`.trim();
  }
  return lines.map((l) => l.replace(/[<>&]/g, "")).join("<br>");
}

function figure(value) {
  if (typeof value !== "number") return value ?? "–";
  if (Math.abs(value) >= 1e6) return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
  return Math.abs(value) >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : value.toPrecision(3);
}

const linked = (report) => made("a", { textContent: report, href: `reports/${report.replace(/[^/]*$/, "")}` });

async function table(panel, window) {
  const rows = transformed(panel, await frames(panel, window));
  const names = [...new Set(rows.flatMap((r) => Object.keys(r)))].filter((n) => n && n !== "1" && n !== "__name__" && !isFigure(n));
  const isNumber = (n) => rows.every((r) => typeof r[n] !== "string");
  const head = made("tr", {}, ...names.map((n) => made("th", { textContent: n, scope: "col", className: isNumber(n) ? "figure" : "" })));
  const body = rows.map((row) => made("tr", {}, ...names.map((n) => made("td",
    { className: isNumber(n) ? "figure" : row[n] ?? "" }, n === "Report" ? linked(row[n]) : figure(row[n])))));
  return rows.length ? made("table", {}, made("thead", {}, head), made("tbody", {}, ...body)) : null;
}

const ANNOTATED = "Grey: every other load point. Orange: its warm-up, which counts in no figure of the report.";

async function moments(name, window) { // when the annotation's query had a value, first ones first
  const annotation = (state.board.annotations?.list ?? []).find((a) => a.name === name);
  if (!annotation || !live()) return [];
  const step = Math.max(1, Math.ceil((window.end - window.start) / 5000));
  const found = await ask("query_range", { query: filled(annotation.expr, window.end - window.start, step),
    start: window.start, end: window.end, step });
  const spans = [];
  for (const { metric, values: at } of found) {
    at.forEach(([time], i) => {
      if (i === 0 || time - at[i - 1][0] > 1.5 * step) spans.push({ from: time, name: named(annotation.titleFormat, metric) });
      spans.at(-1).to = time + step;
    });
  }
  return spans.sort((a, b) => a.from - b.from);
}

const band = ({ from, to }, colour, opacity) => ({ type: "rect", yref: "paper", y0: 0, y1: 1, layer: "below",
  x0: new Date(from * 1000), x1: new Date(to * 1000), line: { width: 0 }, fillcolor: colour, opacity });

async function annotated(window) {
  const [points, warmUps] = await Promise.all(["Load points", "Warm-up"].map((name) => moments(name, window)));
  return { points, warmUps, bands: [
    ...points.filter((_, i) => i % 2 === 0).map((span) => band(span, resolvedColour("--faint"), 0.08)),
    ...warmUps.map((span) => band(span, resolvedColour("--warm"), 0.16))] };
}

function pointNames(window) { // an unseen line that tells, under the pointer, what is sent
  const trace = { x: [], y: [], text: [], type: "scatter", mode: "lines", line: { width: 0, color: "rgba(0,0,0,0)" },
    showlegend: false, hovertemplate: "%{text}<extra></extra>" };
  const during = (spans, at) => spans.find(({ from, to }) => from <= at && at < to)?.name;
  const step = Math.max(SCRAPE_S, (window.end - window.start) / POINTS);
  for (let at = window.start; at <= window.end; at += step) {
    const point = during(state.annotated.points, at);
    if (!point) continue;
    trace.x.push(new Date(at * 1000));
    trace.y.push(0);
    trace.text.push([point, during(state.annotated.warmUps, at)].filter(Boolean).join(", "));
  }
  return trace;
}

function frame(panel) {
  if (panel.type === "row") return made("h2", { textContent: panel.title });
  const inside = made("div", { id: `panel-${panel.id}`, className: panel.type === "table" ? "scroll" : "plot" });
  const box = made("section", {}, made("h3", { textContent: panel.title }),
    made("p", { textContent: panel.description ?? "" }), inside);
  box.style.setProperty("--wide", panel.gridPos.w);
  return box;
}

async function fill(panel, window, turn) {
  const inside = byId(`panel-${panel.id}`);
  if (!inside) return;
  const nothing = panel.needs ? `nothing recorded: it needs ${panel.needs}` : "nothing recorded";
  const empty = (text) => {
    Plotly.purge(inside);
    inside.className = "plot empty";
    inside.replaceChildren(text);
  };
  try {
    if (panel.type === "table") {
      const found = await table(panel, window);
      if (turn !== state.turn) return; // something else has been chosen meanwhile
      inside.replaceChildren(found ?? nothing);
      return;
    }
    const [traces, drawn, tall] = await (panel.type === "barchart" ? barchart : timeseries)(panel, window);
    if (turn !== state.turn) return;
    if (!traces.length) { empty(nothing); return; }
    if (inside.classList.contains("empty")) inside.replaceChildren();
    inside.className = "plot";
    if (tall) inside.style.height = `${tall}rem`;
    await Plotly.react(inside, traces, drawn, { displayModeBar: false, responsive: true });
  } catch (error) {
    if (turn === state.turn) empty(`Prometheus did not answer: ${error.message}`);
  }
}

async function draw() {
  const turn = ++state.turn;
  try {
    const window = await windowShown();
    const found = await annotated(window);
    if (turn !== state.turn) return;
    state.annotated = found;
    await Promise.all(state.board.panels.filter((p) => p.type !== "row").map((p) => fill(p, window, turn)));
    if (turn !== state.turn) return;
    byId("said").textContent = state.chosen.lab
      ? `${state.board.description}${found.points.length ? ` ${ANNOTATED}` : ""} Drawn ${new Date().toLocaleTimeString()}.`
      : "Nothing is recorded yet: run a lab, or `make import` the results on file.";
  } catch (error) {
    unanswered(error);
  }
  document.body.dataset.drawn = String(turn);
}

function unanswered(error) {
  byId("said").textContent = `Prometheus does not answer (${error.message}); \`make watch\` starts it.`;
}

function again() {
  clearTimeout(state.timer);
  if (!live() || !state.every) return;
  state.timer = setTimeout(async () => { if (!document.hidden) await draw(); again(); }, state.every * 1000);
}

async function begin() {
  clearTimeout(state.timer);
  state.turn++; // what is under way belongs to what was chosen before
  try {
    await choices();
  } catch (error) {
    unanswered(error);
    state.timer = setTimeout(begin, AGAIN_MS);
    return;
  }
  byId("panels").replaceChildren(...state.board.panels.map(frame));
  await draw();
  again();
}

async function open() {
  state.boards = await (await fetch("boards.json")).json();
  state.boards.sort((a, b) => Number(b.uid === "lab-live") - Number(a.uid === "lab-live"));
  const asked = new URLSearchParams(location.search);
  try {
    await newestRun();
  } catch (error) {
    unanswered(error);
    setTimeout(open, AGAIN_MS);
    return;
  }
  show(asked.get("board"));
  for (const [name, value] of asked) state.chosen[name] = value;
  await begin();
}

DARK.addEventListener("change", draw);
open();
