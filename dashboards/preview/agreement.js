// The live page has no Grafana to draw with: it transforms by dashboards/page/frames.js. Here both
// are at hand, so a difference is seen.
import { getFieldDisplayName } from '@grafana/data';

/** Throws Error where the live page's tables differ from Grafana's. */
export function requireAgreement(livePages, grafanas) {
  const ours = shown(livePages, ({ name }) => name);
  const theirs = shown(grafanas, (field, frame) => getFieldDisplayName(field, frame, grafanas));
  if (ours !== theirs) {
    throw new Error(`the live page would show other data: ${ours} instead of ${theirs}`);
  }
}

function shown(frames, nameOf) {
  return JSON.stringify(
    frames.map((frame) =>
      frame.fields.map((field) => [nameOf(field, frame), [...field.values].map((value) => value ?? null)])
    )
  );
}
