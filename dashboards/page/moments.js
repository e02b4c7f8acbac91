// When each load point and its warm-up were played, as the dashboards' annotations ask.
import { pageColour } from "./charts.js";
import { legend, resolved } from "./frames.js";

const MOST_STEPS = 5000; // of one query, at most
const NAMED_EVERY = 400; // places at which the pointer finds the name of a load point

/** {points, warmUps}, each a list of {from, to, name} in order. */
export async function playedMoments(ask, board, values, range) {
  const [points, warmUps] = await Promise.all(["Load points", "Warm-up"].map((name) => {
    const annotation = (board.annotations?.list ?? []).find((candidate) => candidate.name === name);
    return annotation ? moments(ask, annotation, values, range) : [];
  }));
  return { points, warmUps };
}

async function moments(ask, annotation, values, range) {
  const step = Math.max(1, Math.ceil((range.to - range.from) / MOST_STEPS));
  const query = resolved(annotation.expr, values, range);
  const series = await ask("query_range", { query, start: range.from, end: range.to, step });
  const spans = [];
  for (const { metric, values: samples } of series) {
    samples.forEach(([time], place) => {
      if (place === 0 || time - samples[place - 1][0] > 1.5 * step) {
        spans.push({ from: time, name: legend(annotation.titleFormat, metric) });
      }
      spans.at(-1).to = time + step;
    });
  }
  return spans.sort((a, b) => a.from - b.from);
}

/** Shapes behind the lines: every other load point, and the warm-ups. */
export function bands({ points, warmUps }) {
  return [
    ...points.filter((_, place) => place % 2 === 0).map((span) => band(span, pageColour("--faint"), 0.08)),
    ...warmUps.map((span) => band(span, pageColour("--warm"), 0.16)),
  ];
}

const band = ({ from, to }, fillcolor, opacity) => ({
  type: "rect", yref: "paper", y0: 0, y1: 1, layer: "below", x0: new Date(from * 1000),
  x1: new Date(to * 1000), line: { width: 0 }, fillcolor, opacity,
});

/** An unseen line that tells, under the pointer, what is sent. */
export function namesUnderPointer({ points, warmUps }, range) {
  const during = (spans, time) => spans.find(({ from, to }) => from <= time && time < to)?.name;
  const step = Math.max(1, (range.to - range.from) / NAMED_EVERY);
  const times = [], names = [];
  for (let time = range.from; time <= range.to; time += step) {
    const point = during(points, time);
    if (!point) continue;
    times.push(new Date(time * 1000));
    names.push([point, during(warmUps, time)].filter(Boolean).join(", "));
  }
  return {
    x: times, y: times.map(() => 0), text: names, type: "scatter", mode: "lines", showlegend: false,
    line: { width: 0, color: "rgba(0,0,0,0)" }, hovertemplate: "%{text}<extra></extra>",
  };
}
