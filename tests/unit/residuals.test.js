// labs/harness/reports/web/forecasts.js and ratios.js: a prediction that was missed by all has no mark.
import { deepStrictEqual as same } from "node:assert";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { runInNewContext } from "node:vm";

const web = (name) => readFileSync(new URL(`../../labs/harness/reports/web/${name}`, import.meta.url), "utf8");
const RESIDUALS = [
  [0, 0, 0, "near", "4%", "4%", 1, 0.9, 1.1, 0.9, 1.1, true],
  [0, 0, 0, "measured as 0", "3.85%", "0%", null, null, null, 0.9, 1.1, false],
  [0, 0, 0, "forecast as 0", "0%", "5%", null, null, null, null, null, false],
];

/** Runs the page's scripts on these residuals, with the choice of a reader; tells what they draw. */
function drawn(chosen) {
  const elements = {
    "each-shown": { value: chosen, addEventListener: () => {} },
    "each-plot": { clientWidth: 800 },
    "each-said": { textContent: "" },
    "each-runs": { replaceChildren: () => {} },
  };
  const plots = [];
  const redraws = [];
  runInNewContext(web("ratios.js") + web("forecasts.js").replace('"use strict";', ""), {
    data: { labs: ["a"], figures: ["b"], runs: [{ machine: "m", day: "d", href: "h" }], residuals: RESIDUALS },
    redraws, at: (id) => elements[id], document: { createElement: () => ({}) }, Option: class {},
    choice: () => ({ value: "", options: [], replaceChildren: () => {} }),
    draw: (_, traces, layout) => plots.push({ traces, layout }),
    axis: (more) => more, css: () => "", colour: () => "", plain: String, digits: String,
    wrapped: (text) => [text], logTicks: () => [1],
  });
  redraws.forEach((redraw) => redraw());
  return { ...JSON.parse(JSON.stringify(plots.at(-1))), said: elements["each-said"].textContent };
}

test("a figure of 0 has both figures in its row instead of a mark", () => {
  const { traces: [predicted, measured], layout } = drawn("all");
  same(measured.x, [1]);
  same(predicted.x, [1, 1, null]);
  same(layout.annotations.map(({ text }) => text).filter((text) => text.startsWith("–")),
    ["– (predicted 3.85%, measured 0%)", "– (predicted 0%, measured 5%)"]);
  same(layout.annotations.every(({ x }) => Number.isFinite(x)), true);
});

test("the band is drawn where there is one", () => {
  same(drawn("all").layout.shapes.filter(({ type }) => type === "rect").length, 2);
});

test("a figure of 0 is among the misses, and outside its band", () => {
  same(drawn("missed").said, "2 of 3 figures");
  same(drawn("outside").said, "2 of 3 figures");
});
