// dashboards/page/frames.js: variables, answers as frames, transformations, overrides.
import { deepStrictEqual as same, rejects, throws } from "node:assert";
import { test } from "node:test";

import {
  choices, frames, legend, line, overridden, prometheus, resolved, stepOf, table, transformed,
} from "../../dashboards/page/frames.js";

const HOUR = { from: 0, to: 3600 };
const sample = (metric, value) => ({ metric, value: [60, String(value)] });
const shown = (found) => found.map(({ fields }) => Object.fromEntries(fields.map(({ name, values }) => [name, values])));

test("variables take their values; one that nobody chose stands for everything", () => {
  same(resolved('a{lab="$lab",run=~"${run:regex}",x=~"$x"}', { lab: "l", run: "r" }, HOUR),
    'a{lab="l",run=~"r",x=~".*"}');
});

test("a range is rounded up to whole seconds", () => {
  same(resolved("[$__range]", {}, { from: 0, to: 9.2 }), "[10s]");
});

test("a rate spans four of a query's least intervals, or a step and one", () => {
  same(resolved("[$__rate_interval]", {}, { from: 0, to: 100 }, "5s"), "[20s]");
  same(resolved("[$__rate_interval]", {}, { from: 0, to: 8000 }, "5s"), "[25s]");
  same(resolved("[$__rate_interval]", {}, { from: 0, to: 100 }), "[4s]");
});

test("a step is never below the query's interval, and a line has at most 400 points", () => {
  same(stepOf({ from: 0, to: 100 }, "5s"), 5);
  same(stepOf({ from: 0, to: 100 }), 1);
  same(stepOf({ from: 0, to: 4000 }, "5s"), 10);
  same(stepOf({ from: 0, to: 100 }, "2m"), 120);
});

test("a legend names labels; one that is missing leaves nothing", () => {
  same(legend("{{variant}} on {{ gpu }}{{none}}", { variant: "a", gpu: "0" }), "a on 0");
  same(legend(undefined, {}), "");
});

test("rows are sorted by a column of text, and keep together", () => {
  const fields = [{ name: "point", type: "string", values: ["b", "a"] }, { name: "n", type: "number", values: [1, 2] }];
  const sort = [{ id: "sortBy", options: { fields: {}, sort: [{ field: "point" }] } }];
  same(shown(transformed(sort, [{ fields }])), [{ point: ["a", "b"], n: [2, 1] }]);
  same(shown(transformed(sort, [{ fields: [fields[1]] }])), [{ n: [1, 2] }]);
});

test("an instant query's table has a column for each label, empty where a series lacks it", () => {
  same(shown([table([sample({ b: "1" }, 2), sample({ a: "x", b: "3" }, "NaN")], "A", "Value")]),
    [{ Time: [60000, 60000], a: ["", "x"], b: ["1", "3"], Value: [2, NaN] }]);
});

test("a line is broken where samples are missing, and where a value is no number", () => {
  const { fields: [times, values] } = line({ metric: { variant: "on" }, values: [[0, "1"], [5, "NaN"], [20, "3"]] },
    { refId: "B", legendFormat: "{{variant}}" }, 5);
  same(times.values, [0, 5000, 10000, 20000]);
  same(values.values, [1, null, null, 3]);
  same(values.config.displayNameFromDS, "on");
});

test("each query of a panel is asked as it wants to be", async () => {
  const asked = [];
  const ask = (path, parameters) => {
    asked.push([path, parameters]);
    return Promise.resolve(path === "query" ? [sample({}, 1)] : [{ metric: {}, values: [[0, "1"]] }]);
  };
  const targets = [{ refId: "A", expr: "up", instant: true }, { refId: "B", expr: "up", interval: "5s" }];
  const found = await frames(ask, { targets }, {}, HOUR);
  same(asked, [["query", { query: "up", time: 3600 }],
    ["query_range", { query: "up", start: 0, end: 3600, step: 9 }]]);
  same(found.map(({ refId, fields }) => [refId, fields.at(-1).name]), [["A", "Value #A"], ["B", "Value"]]);
});

test("a query that finds nothing is no frame", async () => {
  const panel = { targets: [{ refId: "A", expr: "up", instant: true }] };
  same(await frames(() => Promise.resolve([]), panel, {}, HOUR), []);
});

test("a drop-down of several begins with everything, one of runs with the newest", async () => {
  const asked = [];
  const ask = (path, parameters) => {
    asked.push(path, parameters["match[]"]);
    return Promise.resolve(["1", "2"]);
  };
  const query = 'label_values(m{lab="$lab"}, run_id)';
  same(await choices(ask, { query, sort: 2 }, { lab: "l" }), ["2", "1"]);
  same(await choices(ask, { query, sort: 1, includeAll: true }, { lab: "l" }), [".*", "1", "2"]);
  same(asked.slice(0, 2), ["label/run_id/values", 'm{lab="l"}']);
});

test("Prometheus' own words come with a refusal, in JSON and in plain text", async () => {
  const answers = [new Response('{"status": "error", "error": "parse error"}'),
    new Response("starting", { statusText: "Service Unavailable" })];
  const fetched = globalThis.fetch;
  globalThis.fetch = () => Promise.resolve(answers.shift());
  try {
    await rejects(prometheus("")("query", {}), { message: "parse error" });
    await rejects(prometheus("")("query", {}), { message: "Service Unavailable" });
  } finally {
    globalThis.fetch = fetched;
  }
});

const merged = (...tables) => shown(transformed([{ id: "merge", options: {} }],
  tables.map((found, place) => table(found, "ABC"[place], `Value #${"ABC"[place]}`))));

test("merge: rows with the same labels become one", () => {
  same(merged([sample({ title: "x" }, 1), sample({ title: "y" }, 2)], [sample({ title: "y" }, 3)]),
    [{ Time: [60000, 60000], title: ["x", "y"], "Value #A": [1, 2], "Value #B": [null, 3] }]);
});

test("merge: a label that only one table has does not part rows", () => {
  same(merged([sample({ title: "x", held: "yes" }, 1)], [sample({ title: "x" }, 2)])[0],
    { Time: [60000], held: ["yes"], title: ["x"], "Value #A": [1], "Value #B": [2] });
});

test("merge: two series of one query never share a row", () => {
  same(merged([sample({ title: "x", held: "no" }, 1), sample({ title: "x", held: "yes" }, 2)], [sample({ title: "x" }, 3)])[0],
    { Time: [60000, 60000], held: ["no", "yes"], title: ["x", "x"], "Value #A": [1, 2], "Value #B": [3, 3] });
});

const columns = (fields) => [{ fields: Object.entries(fields).map(([name, values]) =>
  ({ name, type: typeof values[0] === "number" ? "number" : "string", config: {}, values })) }];

test("filterFieldsByName keeps what is named, and drops a table of which nothing is left", () => {
  const keep = (names) => [{ id: "filterFieldsByName", options: { include: { names } } }];
  same(shown(transformed(keep(["b", "none"]), columns({ a: ["1"], b: ["2"] }))), [{ b: ["2"] }]);
  same(transformed(keep(["none"]), columns({ a: ["1"] })), []);
});

test("organize puts columns in their places, the others last, then renames", () => {
  const options = { indexByName: { c: 0, a: 1 }, renameByName: { a: "First", b: "" } };
  const [{ fields }] = transformed([{ id: "organize", options }], columns({ a: ["1"], b: ["2"], c: ["3"] }));
  same(fields.map(({ name, values }) => [name, values[0]]), [["c", "3"], ["First", "1"], ["b", "2"]]);
});

test("groupingToMatrix has a row and a column for each value, and null where nothing was measured", () => {
  const options = { rowField: "point", columnField: "variant", valueField: "Value", emptyValue: "null" };
  const found = columns({ point: ["p", "p", "q"], variant: ["on", "off", "on"], Value: [1, 2, 3] });
  same(shown(transformed([{ id: "groupingToMatrix", options }], found)),
    [{ "point\\variant": ["p", "q"], on: [1, 3], off: [2, null] }]);
});

test("a transformation that is not known is refused", () => {
  throws(() => transformed([{ id: "reduce" }], []), /unknown transformation: reduce/);
});

test("overrides match by name, expression and query; the last one wins", () => {
  const rule = (id, options, property, value) => ({ matcher: { id, options }, properties: [{ id: property, value }] });
  const overrides = [rule("byRegexp", "/^(on|off)$/", "color", "blue"), rule("byName", "on", "unit", "s"),
    rule("byFrameRefID", "B", "color", "red"), rule("byName", "off", "unit", "ms")];
  same(overridden(overrides, { name: "on", refId: "A" }), { color: "blue", unit: "s" });
  same(overridden(overrides, { name: "on", refId: "B" }), { color: "red", unit: "s" });
  same(overridden(undefined, { name: "on" }), {});
});
