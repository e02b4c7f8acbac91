// Queries of a panel -> data frames as Grafana's Prometheus data source makes them.
import { FieldType, toDataFrame } from '@grafana/data';

const SCRAPE_S = 1;
const POINTS = 400;

async function get(path, parameters) {
  const answer = await fetch(`/prometheus/api/v1/${path}?${new URLSearchParams(parameters)}`);
  const found = await answer.json();
  if (found.status !== 'success') {
    throw new Error(found.error);
  }
  return found.data;
}

const seconds = (text) => Number.parseFloat(text) * { s: 1, m: 60, h: 3600, d: 86400 }[text.at(-1)];

/** The query with drop-downs and Grafana's own variables in place, and its step. */
function resolve(target, values, range) {
  const least = target.interval ? seconds(target.interval) : SCRAPE_S;
  const step = Math.max(least, Math.ceil((range.to - range.from) / POINTS));
  const known = {
    ...values,
    __range: `${Math.ceil(range.to - range.from)}s`,
    __rate_interval: `${Math.max(step + least, 4 * least)}s`,
  };
  return [target.expr.replace(/\$\{?(\w+)\}?/g, (_, name) => known[name] ?? '.*'), step];
}

const legend = (format, labels) => format.replace(/\{\{(\w+)\}\}/g, (_, name) => labels[name] ?? '');

export async function frames(panel, values, range) {
  const several = panel.targets.length > 1;
  const found = await Promise.all(
    panel.targets.map(async (target) => {
      const [query, step] = resolve(target, values, range);
      if (target.instant) {
        const { result } = await get('query', { query, time: range.to });
        return result.length ? [table(result, several ? `Value #${target.refId}` : 'Value', target.refId)] : [];
      }
      const { result } = await get('query_range', { query, start: range.from, end: range.to, step });
      return result.map((series) => line(series, target, step));
    })
  );
  return found.flat();
}

function table(result, valueName, refId) {
  const labels = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))].sort();
  return toDataFrame({
    refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: result.map(({ value }) => 1000 * value[0]) },
      ...labels.map((name) => ({
        name,
        type: FieldType.string,
        values: result.map(({ metric }) => metric[name] ?? ''),
      })),
      { name: valueName, type: FieldType.number, values: result.map(({ value }) => Number(value[1])) },
    ],
  });
}

function line({ metric, values }, target, step) {
  const times = [];
  const numbers = [];
  for (const [at, value] of values) {
    const last = times.at(-1);
    if (last !== undefined && 1000 * at - last > 1500 * step) {
      times.push(last + 1000 * step); // a gap is drawn as one
      numbers.push(null);
    }
    times.push(1000 * at);
    numbers.push(Number.isFinite(Number(value)) ? Number(value) : null);
  }
  const displayNameFromDS = legend(target.legendFormat ?? '', metric);
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: times, config: { interval: 1000 * step } },
      { name: 'Value', type: FieldType.number, values: numbers, labels: metric, config: { displayNameFromDS } },
    ],
  });
}

/** The choices of a drop-down: label_values(series, label). */
export async function choices(variable, values) {
  const [, series, label] = /^label_values\((.*), (\w+)\)$/.exec(variable.query);
  const match = series.replace(/\$(\w+)/g, (_, name) => values[name] ?? '.*');
  const found = await get(`label/${label}/values`, { 'match[]': match });
  return variable.sort === 2 ? found.reverse() : found;
}
