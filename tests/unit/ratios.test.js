// labs/harness/reports/web/ratios.js: a claim that has no ratio has a row, and no mark.
import { deepStrictEqual as same } from "node:assert";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { runInNewContext } from "node:vm";

const script = readFileSync(new URL("../../labs/harness/reports/web/ratios.js", import.meta.url), "utf8");
const CLAIMS = [
  { title: "near", where: "", value: 1, low: 0.9, high: 1.1, predicted: 1, least: 0.8, largest: 1.25, valid: true },
  { title: "at most", where: "", value: null, low: null, high: null, predicted: 2, least: null, largest: 2, valid: false },
];

/** Runs the script of a run's page on these claims; tells what it draws. */
function drawn() {
  const plots = [];
  const redraws = [];
  const there = { claims: { clientWidth: 800 } };
  runInNewContext(script, {
    data: { claims: CLAIMS, predicted: "" }, redraws, at: (id) => there[id] ?? null,
    draw: (_, traces, layout) => plots.push({ traces, layout }),
    axis: (more) => more, css: () => "", colour: () => "", plain: String, digits: String,
    wrapped: (text) => [text], logTicks: () => [1],
  });
  redraws.forEach((redraw) => redraw());
  return JSON.parse(JSON.stringify(plots.at(-1)));
}

test("a claim without a ratio says so in its row instead of a mark", () => {
  const { traces: [predicted, measured], layout } = drawn();
  same(predicted.x, [1, 2]);
  same(measured.x, [1]);
  const noRatio = layout.annotations.filter(({ text }) => text.startsWith("–"));
  same(noRatio.map(({ text, x }) => [text, x]), [["– (no ratio)", Math.log10(2)]]);
});

test("what bears a prediction out is shaded, to the edge of the picture where it has no end", () => {
  const { layout } = drawn();
  const [low] = layout.xaxis.range.map((power) => 10 ** power);
  const bands = layout.shapes.filter(({ type }) => type === "rect");
  same(bands.map(({ x0, x1 }) => [x0, x1].map((x) => x.toFixed(6))), [[0.8, 1.25], [low, 2]].map((band) => band.map((x) => x.toFixed(6))));
});
