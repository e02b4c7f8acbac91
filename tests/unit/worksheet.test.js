// The marking of a worksheet's answers, as the page's script has it.
import { strictEqual as same, match } from "node:assert";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const source = readFileSync(new URL("../../labs/harness/reports/web/worksheet.js", import.meta.url), "utf8");
const nothing = { querySelectorAll: () => [], getElementById: () => null };
const marked = new Function("document", "digits", `${source}; return markedAnswer;`)(nothing, (n) => n.toPrecision(3));
const KEY = { key: 8, within: 1.25, parts: { "reading the weights": 6, nothing: 0 } };

test("an answer is right within the factor, on both sides", () => {
  for (const [text, right] of /** @type {[string, boolean][]} */ ([["8", true], ["9.9", true], ["6.5", true], ["10.1", false], ["6", false]])) {
    same(marked(text, KEY).right, right, text);
  }
  same(marked("8,000", { ...KEY, key: 8000 }).right, true);
});

test("what is no number above 0 is not marked as a wrong figure", () => {
  for (const text of ["", "eight", "-8", "0"]) match(marked(text, KEY).said, /number/);
});

test("a gap is explained by a part, a unit or the ratio's direction", () => {
  match(marked("6", KEY).said, /reading the weights/);
  match(marked("8000", KEY).said, /unit/);
  match(marked("0.125", KEY).said, /other way/);
  match(marked("16", KEY).said, /factor of two/);
});
