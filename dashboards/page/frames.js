// What Grafana does between a dashboard's JSON and a picture: it puts variables into queries, turns
// answers into data frames, transforms them and applies overrides. The live page draws
// from this module.
//
// A frame is Grafana's: {refId, fields: [{name, type, values, labels, config}]}, times in ms.
// A range is {from, to} in s. Only what dashboards/panels.py uses is known here.

const SCRAPE_S = 1;
const POINTS = 400; // of a line, at most
const EVERYTHING = ".*"; // what a drop-down of several values stands for at first

/** A function that asks the Prometheus at `base`; it throws Error with the server's own words. */
export function prometheus(base) {
  return async (path, parameters) => {
    const response = await fetch(`${base}/api/v1/${path}?${new URLSearchParams(parameters)}`);
    // while it starts, it answers in plain text
    const answer = await response.json().catch(() => ({ error: response.statusText }));
    if (answer.status !== "success") throw new Error(answer.error);
    return answer.data.result ?? answer.data; // a query wraps its result, a list of labels does not
  };
}

// ----------------------------------------------------------------------- variables and queries

const seconds = (text) => Number.parseFloat(text) * { s: 1, m: 60, h: 3600, d: 86400 }[text.at(-1)];

/** The step of a query over a range, in s: not below its own least interval, nor the scrapes'. */
export function stepOf(range, interval) {
  return Math.max(interval ? seconds(interval) : SCRAPE_S, Math.ceil((range.to - range.from) / POINTS));
}

/** A query or matcher with the drop-downs' values and Grafana's own variables in place. */
export function resolved(text, values, range, interval) {
  const least = interval ? seconds(interval) : SCRAPE_S;
  const known = {
    ...values,
    __range: `${Math.ceil(range.to - range.from)}s`,
    // as Grafana has it, where a query's least interval stands for the scrape interval
    __rate_interval: `${Math.max(stepOf(range, interval) + least, 4 * least)}s`,
  };
  return text.replace(/\$\{?(\w+)(?::\w+)?\}?/g, (_, name) => known[name] ?? EVERYTHING);
}

/** Every run that Prometheus may still hold. */
export function lastTwoYears() {
  const now = Date.now() / 1000;
  return { from: now - 2 * 365 * 86400, to: now + 60 };
}

/** The choices of a drop-down, label_values(series, label); the first is chosen at first. */
export async function choices(ask, variable, values) {
  const [, series, label] = /^label_values\((.+), *(\w+)\)$/.exec(variable.query);
  const range = lastTwoYears();
  const matcher = resolved(series, values, range);
  const names = await ask(`label/${label}/values`,
    { "match[]": matcher, start: range.from, end: range.to });
  if (variable.sort === 2) names.reverse(); // descending
  return variable.includeAll ? [EVERYTHING, ...names] : names;
}

// ---------------------------------------------------------------------------- answers as frames

/** The legend of a series: {{label}} is the value of its label. */
export function legend(format, labels) {
  return (format ?? "").replace(/\{\{ *(\w+) *\}\}/g, (_, name) => labels[name] ?? "");
}

/** Asks a panel's queries: a table for each that is instant, else a line for each series. */
export async function frames(ask, panel, values, range) {
  const several = panel.targets.length > 1;
  const perQuery = await Promise.all(panel.targets.map(async (target) => {
    const query = resolved(target.expr, values, range, target.interval);
    if (target.instant) {
      const result = await ask("query", { query, time: range.to });
      return result.length ? [table(result, target.refId, several ? `Value #${target.refId}` : "Value")] : [];
    }
    const step = stepOf(range, target.interval);
    const result = await ask("query_range", { query, start: range.from, end: range.to, step });
    return result.map((series) => line(series, target, step));
  }));
  return perQuery.flat();
}

/** An instant query's result: a column for each label, and the value. */
export function table(result, refId, valueName) {
  const labels = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))].sort();
  const column = (name, type, value) => ({ name, type, config: {}, values: result.map(value) });
  return {
    refId,
    fields: [
      column("Time", "time", ({ value }) => 1000 * value[0]),
      ...labels.map((name) => column(name, "string", ({ metric }) => metric[name] ?? "")),
      column(valueName, "number", ({ value }) => Number(value[1])),
    ],
  };
}

/** A series of a range query; where samples are missing the line is broken by a null. */
export function line({ metric, values }, target, step) {
  const times = [];
  const numbers = [];
  for (const [at, value] of values) {
    const last = times.at(-1);
    if (last !== undefined && 1000 * at - last > 1500 * step) {
      times.push(last + 1000 * step);
      numbers.push(null);
    }
    times.push(1000 * at);
    numbers.push(Number.isFinite(Number(value)) ? Number(value) : null);
  }
  const displayNameFromDS = legend(target.legendFormat, metric);
  return {
    refId: target.refId,
    fields: [
      { name: "Time", type: "time", values: times, config: { interval: 1000 * step } },
      { name: "Value", type: "number", values: numbers, labels: metric, config: { displayNameFromDS } },
    ],
  };
}

// ------------------------------------------------------------------------------ transformations

const TRANSFORMATIONS = { merge, filterFieldsByName, organize, groupingToMatrix, sortBy };

/** A panel's frames after its transformations; Error for one that is not known here. */
export function transformed(transformations, untransformed) {
  return (transformations ?? []).reduce((frames, { id, options }) => {
    if (!TRANSFORMATIONS[id]) throw new Error(`unknown transformation: ${id}`);
    return TRANSFORMATIONS[id](frames, options);
  }, untransformed);
}

const lengthOf = (frame) => frame.fields[0]?.values.length ?? 0;

/** Joins tables: rows that agree in the columns of all tables, and differ in none, become one. */
function merge(tables) {
  if (tables.length < 2) return tables;
  const fields = new Map(tables.flatMap(({ fields }) => fields.map((field) => [field.name, field])));
  const inAll = (name) => tables.every(({ fields }) => fields.some((field) => field.name === name));
  const keys = [...fields.keys()].filter(inAll);
  const rows = [];
  for (const table of tables) {
    for (let place = 0; place < lengthOf(table); place++) {
      const row = Object.fromEntries(table.fields.map(({ name, values }) => [name, values[place]]));
      const same = rows.filter((other) => keys.every((name) => other[name] === row[name])
        && Object.keys(row).every((name) => (other[name] ?? row[name]) === row[name]));
      same.forEach((other) => Object.assign(other, row));
      if (!same.length) rows.push(row);
    }
  }
  const column = ({ name, type }) => ({ name, type, config: {}, values: rows.map((row) => row[name] ?? null) });
  return [{ refId: "merge", fields: [...fields.values()].map(column) }];
}

/** Keeps the columns that are named; a frame without any goes. */
function filterFieldsByName(tables, { include }) {
  return tables
    .map((table) => ({ ...table, fields: table.fields.filter(({ name }) => include.names.includes(name)) }))
    .filter(({ fields }) => fields.length);
}

/** Orders columns, those without a place last, and renames them. */
function organize(tables, { indexByName = {}, renameByName = {} }) {
  const place = ({ name }) => indexByName[name] ?? Number.MAX_SAFE_INTEGER;
  const renamed = (field) => ({ ...field, name: renameByName[field.name] || field.name });
  return tables.map((table) => ({
    ...table,
    fields: table.fields.toSorted((a, b) => place(a) - place(b)).map(renamed),
  }));
}

/** Sorts rows by a column of text. */
function sortBy(tables, { sort: [{ field: wanted }] }) {
  return tables.map((table) => {
    const column = table.fields.find(({ name }) => name === wanted);
    if (!column) return table;
    const order = column.values.map((_, row) => row)
      .sort((a, b) => column.values[a].localeCompare(column.values[b]));
    return { ...table, fields: table.fields.map((field) =>
      ({ ...field, values: order.map((row) => field.values[row]) })) };
  });
}

/** Spreads a column's values out as columns: a row for each value of `rowField`. */
function groupingToMatrix(tables, { rowField, columnField, valueField }) {
  if (tables.length !== 1) return tables;
  const [row, column, value] = [rowField, columnField, valueField].map((wanted) =>
    tables[0].fields.find(({ name }) => name === wanted));
  if (!row || !column || !value) return tables;
  const names = [...new Set(row.values)];
  const cells = new Map(value.values.map((cell, at) =>
    [JSON.stringify([row.values[at], column.values[at]]), cell]));
  const spread = (name) => names.map((rowName) => cells.get(JSON.stringify([rowName, name])) ?? null);
  return [{
    fields: [
      { name: `${rowField}\\${columnField}`, type: row.type, config: {}, values: names },
      ...[...new Set(column.values)].map((name) =>
        ({ name, type: value.type, config: {}, values: spread(name) })),
    ],
  }];
}

// ------------------------------------------------------------------------------------ overrides

const MATCHERS = {
  byName: (wanted, { name }) => name === wanted,
  byRegexp: (pattern, { name }) => new RegExp(pattern.slice(1, -1)).test(name), // /between slashes/
  byFrameRefID: (wanted, { refId }) => refId === wanted,
};

/** The properties that a panel's overrides give a field {name, refId}; of several the last one wins. */
export function overridden(overrides, field) {
  const values = {};
  for (const { matcher, properties } of overrides ?? []) {
    if (!MATCHERS[matcher.id](matcher.options, field)) continue;
    for (const { id, value } of properties) values[id] = value;
  }
  return values;
}
