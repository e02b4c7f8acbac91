// Draws the dashboards that dashboards/ builds for Grafana, with what Prometheus answers. It knows
// the kinds of panel, the variables and the transformations that those dashboards use, no others.
import { barchart, colouring, element, table, timeseries } from "./charts.js";
import { choices, frames, lastTwoYears, prometheus, transformed } from "./frames.js";
import { bands, namesUnderPointer, playedMoments } from "./moments.js";

const { Plotly } = /** @type {any} */ (globalThis); // plotly.min.js, loaded before
const FIGURES = { timeseries, barchart };
const RETRY_MS = 3000;
const SPANS = { run: "the whole run", 300: "last 5 min", 900: "last 15 min", 3600: "last hour",
  86400: "last day" };
const REFRESH = { 2: "every 2 s", 5: "every 5 s", 30: "every 30 s", 0: "off" };
const BANDS = "Grey: every other load point. Orange: its warm-up, which counts in no figure of the report.";

const ask = prometheus("");
const state = {
  boards: [], board: null, values: {}, span: "run", every_s: 5, timer: null, colourOf: null,
  turn: 0, // counts what was asked for: an answer to an older turn is dropped
  played: { points: [], warmUps: [] },
};
const byId = (id) => document.getElementById(id);
const isLive = () => state.board.panels.some(({ type }) => type === "timeseries");

// ------------------------------------------------------------------------------------- choices

function select(name, title, options, chosen, onChange) {
  const box = element("select", { id: `choose-${name}` });
  for (const [value, textContent] of options) {
    box.append(element("option", { value, textContent, selected: String(value) === String(chosen) }));
  }
  box.addEventListener("change", () => onChange(box.value));
  return element("label", { textContent: title }, box);
}

async function drawChoices() {
  const form = element("form", { id: "choices", ariaLabel: "What is shown" });
  form.append(select("board", "Dashboard", state.boards.map(({ uid, title }) => [uid, title]),
    state.board.uid, (uid) => { showBoard(uid); begin(); }));
  for (const variable of state.board.templating.list) {
    const { name, label, includeAll } = variable;
    const options = await choices(ask, variable, state.values);
    if (!options.includes(state.values[name])) state.values[name] = options[0] ?? "";
    const named = options.map((value, place) => [value, includeAll && place === 0 ? "all" : value]);
    form.append(select(name, label, named, state.values[name],
      (value) => { state.values[name] = value; begin(); }));
  }
  if (isLive()) {
    form.append(select("span", "Time", Object.entries(SPANS).reverse(), state.span,
      (value) => { state.span = value; draw(); }));
    form.append(select("every", "Refresh", Object.entries(REFRESH), state.every_s,
      (value) => { state.every_s = Number(value); refresh(); }));
  }
  byId("choices").replaceWith(form);
}

/** Chooses a board; what may be all, is all again. */
function showBoard(uid) {
  state.board = state.boards.find((board) => board.uid === uid) ?? state.boards[0];
  for (const { name, includeAll } of state.board.templating.list) if (includeAll) delete state.values[name];
}

async function chooseNewestRun() {
  const { from, to } = lastTwoYears();
  const series = await ask("series", { "match[]": "lab_load_point", start: from, end: to });
  const newest = series.sort((a, b) => a.run_id.localeCompare(b.run_id)).pop();
  if (newest) Object.assign(state.values, { lab: newest.lab, run: newest.run_id });
}

/** The time to show, {from, to} in s: that in which the chosen run was played, if no other is asked. */
async function rangeShown() {
  const now = Date.now() / 1000;
  if (!isLive()) return { ...lastTwoYears(), to: now };
  if (state.span !== "run") return { from: now - Number(state.span), to: now };
  const began = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z/.exec(state.values.run);
  if (!began) return { from: now - 900, to: now };
  const [year, month, ...rest] = began.slice(1).map(Number);
  const from = Date.UTC(year, month - 1, ...rest) / 1000;
  const step = Math.max(15, Math.ceil((now - from) / 5000));
  const query = `count(count_over_time(lab_load_point{run_id="${state.values.run}"}[${step}s]))`;
  const [series] = await ask("query_range", { query, start: from, end: now, step });
  const times = series?.values.map(([time]) => time) ?? [];
  if (!times.length) return { from, to: now };
  return { from: times[0] - step, to: Math.min(now, times.at(-1) + step) };
}

// -------------------------------------------------------------------------------------- panels

function frameOf(panel) {
  if (panel.type === "row") return element("h2", { textContent: panel.title });
  const inside = element("div", { id: `panel-${panel.id}`, className: panel.type === "table" ? "scroll" : "plot" });
  const box = element("section", {}, element("h3", { textContent: panel.title }),
    element("p", { textContent: panel.description ?? "" }), inside);
  box.style.setProperty("--wide", panel.gridPos.w);
  return box;
}

async function drawPanel(panel, range, turn) {
  const inside = byId(`panel-${panel.id}`);
  if (!inside) return;
  const box = inside.parentElement;
  try {
    const drawn = transformed(panel.transformations, await frames(ask, panel, state.values, range));
    if (turn !== state.turn) return;
    if (panel.type === "table") {
      inside.className = "scroll"; // it may have said that Prometheus did not answer
      const rows = table(panel, drawn);
      box.hidden = !rows;
      inside.replaceChildren(...(rows ? [rows] : []));
      return;
    }
    const { traces, layout, height_rem } = FIGURES[panel.type](panel, drawn, state.colourOf, range);
    box.hidden = !traces.length;
    if (box.hidden) return;
    if (panel.type === "timeseries") {
      traces.unshift(namesUnderPointer(state.played, range));
      layout.shapes.unshift(...bands(state.played));
    }
    if (inside.classList.contains("empty")) inside.replaceChildren();
    inside.className = "plot";
    if (height_rem) inside.style.height = `${height_rem}rem`;
    await Plotly.react(inside, traces, layout, { displayModeBar: false, responsive: true });
  } catch (error) {
    if (turn !== state.turn) return;
    box.hidden = false;
    drawEmpty(inside, `Prometheus did not answer: ${error.message}`);
  }
}

function drawEmpty(inside, text) {
  Plotly.purge(inside);
  inside.className = "plot empty";
  inside.replaceChildren(text);
}

async function draw() {
  const turn = ++state.turn;
  try {
    const range = await rangeShown();
    const played = await playedMoments(ask, state.board, state.values, range);
    if (turn !== state.turn) return;
    state.played = played;
    const panels = state.board.panels.filter(({ type }) => type !== "row");
    await Promise.all(panels.map((panel) => drawPanel(panel, range, turn)));
    if (turn !== state.turn) return;
    byId("said").textContent = state.values.lab
      ? `${state.board.description}${played.points.length ? ` ${BANDS}` : ""}${hiddenPanels()} Drawn ${new Date().toLocaleTimeString()}.`
      : "Nothing is recorded yet: run a lab, or `make import` the results on file.";
  } catch (error) {
    tellUnanswered(error);
  }
  document.body.dataset.drawn = String(turn);
}

/** Hides the headings that nothing follows, and names the panels without data, with what each needs. */
function hiddenPanels() {
  for (const head of document.querySelectorAll("#panels h2")) {
    let next = head.nextElementSibling;
    while (next?.matches("section[hidden]")) next = next.nextElementSibling;
    head.toggleAttribute("hidden", next?.tagName !== "SECTION");
  }
  const empty = state.board.panels.filter(({ id }) => byId(`panel-${id}`)?.parentElement.hidden);
  const named = empty.map(({ title, needs }) => needs ? `${title} (needs ${needs})` : title);
  return named.length ? ` Without data, and not shown: ${named.join("; ")}.` : "";
}

function tellUnanswered(error) {
  byId("said").textContent = `Prometheus does not answer (${error.message}); \`make watch\` starts it.`;
}

// ------------------------------------------------------------------------------ opening, again

function refresh() {
  clearTimeout(state.timer);
  if (!isLive() || !state.every_s) return;
  state.timer = setTimeout(async () => {
    if (!document.hidden) await draw();
    refresh();
  }, state.every_s * 1000);
}

async function begin() {
  clearTimeout(state.timer);
  state.turn++; // what is under way belongs to what was chosen before
  try {
    await drawChoices();
  } catch (error) {
    tellUnanswered(error);
    state.timer = setTimeout(begin, RETRY_MS);
    return;
  }
  byId("panels").replaceChildren(...state.board.panels.map(frameOf));
  await draw();
  refresh();
}

async function open() {
  const { boards, colours } = await (await fetch("boards.json")).json();
  state.boards = boards.sort((a, b) => Number(b.uid === "lab-live") - Number(a.uid === "lab-live"));
  state.colourOf = colouring(colours);
  const parameters = new URLSearchParams(location.search);
  try {
    await chooseNewestRun();
  } catch (error) {
    tellUnanswered(error);
    setTimeout(open, RETRY_MS);
    return;
  }
  showBoard(parameters.get("board"));
  for (const [name, value] of parameters) state.values[name] = value;
  await begin();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
open();
