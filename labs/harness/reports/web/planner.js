// The planner: what is asked, computed by theory.js, and said with where each figure comes from.
"use strict";

const facts = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("planner");
const field = (name) => form.elements[name];
const sized = (value) => Math.abs(value) >= 999.5 ? Math.round(value).toLocaleString("en")
  : String(Number(value.toPrecision(3)));
const inTime = (s) => s < 0.9995 ? `${sized(1000 * s)} ms` : `${sized(s)} s`;
const inGb = (bytes) => `${sized(bytes / 1e9)} GB`;

// The output head stays in 16 bits, as quantized checkpoints keep it.
function quantized(shape, bits) {
  const head = 2 * shape.vocab * shape.hidden;
  return { ...shape, weight_bytes: head + (shape.weight_bytes - head) * bits / 16,
           expert_bytes: shape.expert_bytes * bits / 16 };
}

/** Times at one efficiency of the machine's figures; `step_s` is what a step takes beside them. */
function timed(shape, machine, { reading, computing, step_s }, asked) {
  const { bits, kv, prompt, output, users } = asked;
  const rate = bits === 8 ? machine.fp8_flops_per_s ?? machine.flops_per_s : machine.flops_per_s;
  const ceilings = { bytes_per_s: machine.bytes_per_s * reading, flops_per_s: rate * computing };
  const prefill = Math.max(prefillS(shape, ceilings, prompt),
    stepBytes(shape, prompt) / ceilings.bytes_per_s) + step_s;
  const step = (batch) => decodeStepS(shape, ceilings, batch, prompt + output / 2, kv) + step_s;
  return {
    ttft: prefill,
    tpot: step(users) + (users - 1) / output * prefill,
    throughput: output / ((output - 1) * step(users) / users + prefill),
    stream: 1 / step(1),
  };
}

const NUMBERS = ["prompt", "output", "users", "ttft", "tpot"];

/** What is asked, and a sentence about a number that cannot be; a page whose plan is refused has no figure. */
function asked() {
  const wrong = NUMBERS.map(field).find(({ min, max, value }) =>
    !(Number(value) >= Number(min) && Number(value) <= Number(max)));
  const numbers = NUMBERS.map((name) => [name, Math.round(Number(field(name).value))]);
  const name = wrong?.parentElement.textContent.trim();
  return { ...Object.fromEntries(numbers), bits: Number(field("bits").value),
           kv: Number(field("kv").value),
           refused: wrong && `${name}: give a number from ${wrong.min} to ${sized(Number(wrong.max))}.` };
}

/** For how many tokens, and for how many such requests, a machine has room beside the weights. */
function roomOf(machine, model, want) {
  const shape = quantized(model.shape, want.bits);
  const bytes = facts.share * machine.memory - heldBytes(shape) - facts.activations;
  const tokens = bytes > 0 ? kvTokens(shape, bytes, want.kv, facts.block) : 0;
  return { tokens, requests: Math.floor(tokens / (want.prompt + want.output)) };
}

/** What would make it fit: fewer bits on this machine, and the machines that hold it as it is. */
function fitting(machine, model, want) {
  const chosen = (name, value) => [...field(name).options].find((of) => Number(of.value) === value).text;
  const smaller = [[8, want.kv], [4, want.kv], [want.bits, 1], [8, 1], [4, 1]]
    .filter(([bits, kv]) => bits <= want.bits && kv <= want.kv)
    .find(([bits, kv]) => roomOf(machine, model, { ...want, bits, kv }).requests >= 1);
  const machines = facts.machines.filter((of) => roomOf(of, model, want).requests >= 1);
  const ways = smaller ? [`with weights in ${chosen("bits", smaller[0])} and keys and values in ${chosen("kv", smaller[1])}`] : [];
  if (machines.length) ways.push(`as it is on ${machines.slice(0, 4).map((of) => of.name).join(", ")}`);
  return ways.length ? `It fits ${ways.join(", or ")}.`
    : "It fits no machine of this page: take a smaller model, or shorter prompts.";
}

function lessonCell(part) {
  const cell = document.createElement("td");
  const found = facts.lessons[part];
  if (!found) return cell;
  const link = document.createElement("a");
  [link.textContent, link.href] = found;
  cell.append(link);
  return cell;
}

function row([name, expected, between, bound, mark, part]) {
  const line = document.createElement("tr");
  for (const text of [name, expected, between, bound, mark]) {
    line.insertCell().textContent = text;
  }
  line.append(lessonCell(part));
  return line;
}

function verdict(limit, { low, high }) {
  return high <= limit ? "yes" : low > limit ? "no" : "perhaps";
}

function answered(want, room, times, known, machine, model) {
  if (room.requests < 1) {
    const why = room.tokens > 0
      ? `one request has ${sized(want.prompt + want.output)} tokens, and the cache has room for ${sized(room.tokens)}`
      : "the weights alone leave no room for keys and values";
    return `It does not fit: ${why}. ${fitting(machine, model, want)}`;
  }
  const place = room.requests >= want.users
    ? `It fits: ${sized(room.requests)} such requests have room at once, and ${want.users} are asked for.`
    : `The weights fit, but only ${sized(room.requests)} such request${room.requests < 2 ? " has" : "s have"} room at once; the others wait in the queue.`;
  const met = ["ttft", "tpot"].map((part) => {
    const limit = want[part] / 1000;
    // without efficiencies there is a bound alone, which can only rule out
    const said = known ? verdict(limit, times[part]) : times[part].bound > limit ? "no" : "perhaps";
    return `${part.toUpperCase()} of ${want[part]} ms or less: ${said}`;
  });
  return `${place} ${met.join("; ")}.`;
}

function spans(shape, machine, want) {
  const ideal = timed(shape, machine, { reading: 1, computing: 1, step_s: 0 }, want);
  const [expected, faster, slower] = facts.efficiencies.map((of) => timed(shape, machine, of, want));
  return Object.fromEntries(Object.keys(ideal).map((part) => {
    const ends = [faster[part], slower[part]];
    return [part, { expected: expected[part], low: Math.min(...ends), high: Math.max(...ends),
                    bound: ideal[part] }];
  }));
}

function commands(machine, model, want, { throughput }) {
  const length = want.prompt + want.output;
  const served = ["vllm serve MODEL", `--max-model-len ${length}`, `--max-num-seqs ${want.users}`,
    `--gpu-memory-utilization ${facts.share}`];
  if (want.bits === 8) served.push("--quantization fp8");
  if (want.kv === 1) served.push("--kv-cache-dtype fp8");
  const told = want.bits === 4 ? "a 4-bit checkpoint in the place of MODEL" : "on the machine itself";
  const found = [[served.join(" "), told]];
  if (machine.card && model.lab) {
    const precision = { 16: "bf16", 8: "fp8", 4: "w4a16-gptq" }[want.bits];
    const rate = sized(throughput.expected / want.output).replaceAll(",", "");
    found.unshift([`make plan MACHINE=${machine.card} MODEL=${model.lab} PRECISION=${precision}`
      + ` RATE=${rate} LENGTHS=${want.prompt}/${want.output} SLO=${want.ttft}/${want.tpot}`,
      "vLLM's own scheduler in virtual time, with a band: closer than these closed forms"]);
  }
  return found;
}

function listed([command, told]) {
  const item = document.createElement("li");
  const code = document.createElement("code");
  code.textContent = command;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.dataset.copy = command;
  item.append(code, " ", button, document.createElement("br"), told);
  return item;
}

function plan() {
  const machine = facts.machines[field("machine").value];
  const model = facts.models[field("model").value];
  const want = asked();
  const answer = document.getElementById("answer");
  document.getElementById("planned").hidden = Boolean(want.refused);
  if (want.refused) {
    answer.textContent = want.refused;
    document.getElementById("flags").replaceChildren();
    return;
  }
  const shape = quantized(model.shape, want.bits);
  const room = roomOf(machine, model, want);
  const fits = room.requests >= 1;
  const times = spans(shape, machine, want);
  const known = Boolean(machine.card);
  answer.textContent = answered(want, room, times, known, machine, model);
  const line = (name, part, say, sign, unit = "") => {
    const { expected, low, high, bound } = times[part];
    if (!fits) return [name, "–", "–", "–", "it does not fit", part];
    return [name, known ? say(expected) + unit : "–",
      known ? `${say(low)}${unit} to ${say(high)}${unit}` : "–",
      `${sign} ${say(bound)}${unit}`, "forecast", part];
  };
  const given = known ? "published" : "measured";
  document.querySelector("#planned tbody").replaceChildren(...[
    ["Weights", inGb(heldBytes(shape)), "", "", "arithmetic", "weights"],
    ["Memory of the machine", inGb(machine.memory), "", "", given, ""],
    ["Memory bandwidth", `${sized(machine.bytes_per_s / 1e9)} GB/s`, "", "", given, "stream"],
    ["Keys and values of a token", `${sized(kvBytesPerToken(shape, want.kv))} B`, "", "", "arithmetic", "kv"],
    ["Tokens of context that have room", sized(room.tokens), "", "", "arithmetic", "fits"],
    ["Such requests that have room at once", sized(room.requests), "", "", "arithmetic", "fits"],
    line("TTFT of a prompt alone", "ttft", inTime, "at least"),
    line(`TPOT with ${want.users} in flight`, "tpot", inTime, "at least"),
    line("Output tokens/s of all", "throughput", sized, "at most"),
    line("Output tokens/s of one stream alone", "stream", sized, "at most"),
  ].map(row));
  const basis = known
    ? "Expected and between: published efficiencies of engines on such cards (serving/simulator/"
      + "datasheet.py names them); the bound is the roofline. One device; waiting for a place in"
      + " the batch is not in TTFT."
    : "No efficiency is published for such a machine, so there is a bound alone; a run of the"
      + " lesson's lab measures how near it comes.";
  document.getElementById("basis").textContent = `Its figures: ${machine.told}. ${basis}`;
  const typed = fits ? commands(machine, model, want, times) : [];
  document.getElementById("flags").replaceChildren(...typed.map(listed));
  copyable();
}

for (const [name, entries] of [["machine", facts.machines], ["model", facts.models]]) {
  field(name).replaceChildren(...entries.map((of, place) => new Option(of.name, String(place))));
}
field("model").value = String(Math.max(0, facts.models.findIndex((of) => of.lab)));
form.addEventListener("input", plan);
form.addEventListener("submit", (event) => event.preventDefault());
plan();
themed(() => {});
