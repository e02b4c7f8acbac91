// The live page draws without Grafana and transforms by dashboards/page/frames.js. The preview has
// both, so it checks that they give the same tables.
import { getFieldDisplayName } from '@grafana/data';

/** Throws Error where the live page's tables differ from Grafana's. */
export function requireAgreement(livePages, grafanas) {
  const onLivePage = shown(livePages, ({ name }) => name);
  const inGrafana = shown(grafanas, (field, frame) => getFieldDisplayName(field, frame, grafanas));
  if (onLivePage !== inGrafana) {
    throw new Error(`the live page would show other data: ${onLivePage} instead of ${inGrafana}`);
  }
}

function shown(frames, nameOf) {
  return JSON.stringify(
    frames.map((frame) =>
      frame.fields.map((field) => [nameOf(field, frame), [...field.values].map((value) => value ?? null)])
    )
  );
}
