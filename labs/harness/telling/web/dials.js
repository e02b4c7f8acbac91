// Of a lesson's page, and that of prefill and decode apart: formulas over a setting, and the reader's own run beside them.
"use strict";

const MOST_FILE_BYTES = 32 * 2 ** 20;
const own = [];  // what the reader's file measured: {claim, y, low, high, told}

// The measured ratios that a summary has for these claims; `judged` are all claims of the lab.
// Throws an Error with a sentence for whatever is not such a file: it may be anybody's.
function measuredOf(text, claims, judged) {
  let summary;
  try {
    summary = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON. Choose the summary.json in the folder of your run.");
  }
  if (!Array.isArray(summary?.judgements)) {
    throw new Error("This is not the summary of a run: it has no list of judgements.");
  }
  const known = summary.judgements.filter((one) => judged.includes(one?.claim)).length;
  if (2 * known < summary.judgements.length || !known) {
    throw new Error("Its claims are not this lesson's: it is another lab's summary.");
  }
  const number = (value) => typeof value === "number" && Number.isFinite(value) && value > 0;
  const found = [];
  claims.forEach(({ name }, claim) => {
    const one = name && summary.judgements.find((of) => of?.claim === name);
    const ratio = one?.effect?.ratio;
    if (!number(ratio?.value)) return;
    const [low, high] = [ratio.low, ratio.high].map((bound) => (number(bound) ? bound : null));
    const told = typeof one.outcome === "string" ? one.outcome.slice(0, 20) : "";
    found.push({ claim, y: ratio.value, low, high, told });
  });
  if (!found.length) {
    throw new Error("None of the claims drawn here has a ratio in this file.");
  }
  return found;
}

function dialled({ claims, machines, knobs, curves, measured, lab, judged }) {
  const chosen = (id) => Number(at(id).value);
  const of = (claim, knob, machine) => curves.filter((c) =>
    c.claim === claim && c.knob === knob && (machine === undefined || c.machine === machine));
  const options = (numbers, words) => [...new Set(numbers)].map((n) => [String(n), words(n)]);

  function fill(id, entries) {
    const before = at(id).value;
    at(id).replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    if (entries.some(([value]) => value === before)) at(id).value = before;
  }

  // how much the prediction changes over the curve
  const reach = ({ y }) => Math.max(...y) / Math.min(...y);

  function settings() {
    const there = curves.filter((c) => c.claim === chosen("dial-claim"));
    fill("dial-knob", options(there.sort((a, b) => reach(b) - reach(a)).map((c) => c.knob),
      (n) => knobs[n].name));
    places();
  }

  function places() {
    fill("dial-machine", options(of(chosen("dial-claim"), chosen("dial-knob"))
      .map((c) => c.machine), (n) => machines[n].name));
    values();
  }

  const curve = () =>
    of(chosen("dial-claim"), chosen("dial-knob"), chosen("dial-machine"))[0];

  // a setting as it is shown: MiB for bytes
  const shown = (value) => value / knobs[chosen("dial-knob")].per;

  function values() {
    const { x, base } = curve();
    at("dial").max = String(x.length - 1);
    at("dial").value = String(Math.max(0, x.indexOf(base)));
    drawDials();
  }

  const amountOf = (value, unit) => unit === "s" ? milliseconds(value * 1000)
    : `${digits(value)}${unit === "x" ? "x" : unit && ` ${unit}`}`;

  function milliseconds(value) {
    return Math.abs(value) < 999.5 ? `${digits(value)} ms` : `${digits(value / 1000)} s`;
  }

  function drawDials() {
    const { x, y, base, set } = curve();
    const place = chosen("dial");
    const { title, axis: name, unit } = claims[chosen("dial-claim")];
    const knob = knobs[chosen("dial-knob")].name;
    const machine = machines[chosen("dial-machine")];
    at("dial-name").textContent = knob;
    const said = `${knob}: ${digits(shown(x[place]))}, predicted ${amountOf(y[place], unit)} on ${machine.name}`;
    at("dial-said").textContent = said;
    at("dial").setAttribute("aria-valuetext", said);
    at("dial-told").textContent = `${title}. ${machine.name}: ${machine.told}.`;
    const setting = set.replaceAll("{}", String(x[place]));
    const quote = setting.includes('"') ? "'" : '"';
    const target = machine.card ? `make forecast LAB=${lab} MACHINE=${machine.card}` : `make lab-${lab}`;
    const command = x[place] === base || !set ? target : `${target} SET=${quote}${setting}${quote}`;
    at("dial-command").textContent = command;
    at("dial-copy").dataset.copy = command;
    draw("dials", [...lines(), marker(shown(x[place]), y[place]), ...dots()], {
      ...sizes(lines().length),
      xaxis: axis({ title: { text: knob }, ...scaled(lines().flatMap((l) => l.x)) }),
      yaxis: axis({ title: { text: `${name}${unit && unit !== "x" ? ` (${unit})` : ""}` },
                    ...scaled(seen()) }),
    });
  }

  function sizes(count) {
    if (!narrow()) return { height: 380 };
    const legend = { orientation: "h", x: 0, xanchor: "left", y: -0.25, yanchor: "top" };
    return { height: 380 + 30 * count, legend };  // of which each machine takes a row or two there
  }

  const narrow = () => at("dials").clientWidth < 600;

  function scaled(numbers) {
    const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
    if (high / low < 5) return { type: "linear" };
    const tickvals = logTicks(low, high);
    return { type: "log", tickvals, ticktext: tickvals.map(digits) };
  }

  const seen = () => [...lines().flatMap((l) => l.y), ...dots().flatMap((d) => d.y)];

  function lines() {
    return of(chosen("dial-claim"), chosen("dial-knob")).map((c) => ({
      name: wrapped(plain(machines[c.machine].name), narrow() ? 40 : Infinity).join("<br>"),
      x: c.x.map(shown), y: c.y, mode: "lines",
      line: { color: colour(c.machine), width: c.machine === chosen("dial-machine") ? 4 : 1.5,
              dash: machines[c.machine].card ? "dash" : "solid" },
      hovertemplate: `${plain(machines[c.machine].name)}<br>%{x:.4~g}: %{y:.3~g}<extra></extra>`,
    }));
  }

  const marker = (x, y) => ({
    x: [x], y: [y], mode: "markers", showlegend: false, hoverinfo: "skip",
    marker: { symbol: "circle-open", size: 15, color: css("--ink"), line: { width: 3 } },
  });

  function dots() {
    const claim = chosen("dial-claim");
    const base = (machine) => of(claim, chosen("dial-knob"), machine)[0]?.base;
    const published = measured.filter((m) => m.claim === claim && base(m.machine))
      .map((m) => dot(m, base(m.machine), colour(m.machine), "measured", "circle"));
    const yours = own.filter((m) => m.claim === claim)
      .map((m) => dot(m, curve().base, css("--ink"), "your run", "diamond"));
    return [...published, ...yours];
  }

  const dot = ({ y, low, high, told }, x, color, name, symbol) => ({
    name, x: [shown(x)], y: [y], mode: "markers", showlegend: symbol === "diamond",
    marker: { size: 11, color, symbol, line: { width: 1.5, color: css("--paper") } },
    error_y: { type: "data", symmetric: false, array: [high ? high - y : 0],
               arrayminus: [low ? y - low : 0], color },
    hovertemplate: `${name}: %{y:.3~g}, ${plain(told)}<extra></extra>`,
  });

  async function take(file) {
    own.length = 0;
    try {
      if (!file) return;
      if (file.size > MOST_FILE_BYTES) throw new Error("This file is larger than any summary.");
      own.push(...measuredOf(await file.text(), claims, judged));
      at("own-said").textContent = "Your run: " + own.map(({ claim, y, low, high, told }) =>
        `${claims[claim].title}: ${digits(y)}x${low && high ? ` (${digits(low)} to ${digits(high)})` : ""}, ${told}`)
        .join(". ") + ". The diamonds in the picture stand at the lab's own setting.";
    } catch (error) {
      at("own-said").textContent = error.message;
    } finally {
      drawDials();
    }
  }

  at("dial-claim").replaceChildren(...options(curves.map((c) => c.claim).sort((a, b) => a - b),
    (n) => claims[n].title).map(([value, text]) => new Option(text, value)));
  at("dial-claim").addEventListener("change", settings);
  at("dial-knob").addEventListener("change", places);
  at("dial-machine").addEventListener("change", values);
  at("dial").addEventListener("input", drawDials);
  at("own-file")?.addEventListener("change", () => take(at("own-file").files[0]));
  for (const kind of at("own-file") ? ["dragover", "drop"] : []) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  settings();
  redraws.push(drawDials);
}

if (data.dials.curves) dialled(data.dials);
