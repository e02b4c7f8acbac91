// deno-lint-ignore-file no-unused-vars -- the scripts that follow in the same page use them
// Of a run's page: what its pictures have in common.
"use strict";

const ofVariant = (name) => colour(data.variants.indexOf(name));
const workloadOptions = () => [["", "all"], ...data.workloads.map((name) => [name, name])];

function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) < 999.5 ? `${digits(value)} ms` : `${digits(value / 1000)} s`;
}
