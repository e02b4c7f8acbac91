// Of a lesson's page: a recorded trial played from its own times; nothing moves until it is asked.
"use strict";

if (data.replay.length) {
  const REAL_TO_SHOWN = 2.5;  // a second of the record lasts so many on the page
  const figures = [...document.querySelectorAll("#replay figure")];
  const slider = at("time");
  const span = data.replay[0].span;
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const events = [...new Set(data.replay.flatMap(({ bars }) =>
    bars.flatMap(([start, first, end]) => [start, first, end])))]
    .filter((time) => time <= span).sort((a, b) => a - b);
  let playing = 0;

  slider.max = String(span);
  slider.value = String(span);

  const shown = (time) => `${(time / 1000).toFixed(2)} s`;

  function show(time) {
    slider.value = String(time);
    slider.setAttribute("aria-valuetext", shown(time));
    at("clock").textContent = shown(time);
    figures.forEach((figure, place) => {
      const { bars, chunks, guesses, cache } = data.replay[place];
      const { width } = figure.querySelector("svg").viewBox.baseVal;
      const x = 6 + (time / span) * (width - 12);  // LEFT of labs/harness/reports/replay.py
      figure.querySelector(".reveal").setAttribute("width", String(x));
      figure.querySelector(".now").style.transform = `translateX(${x}px)`;
      const there = bars.filter(([start, , end]) => start <= time && (time < end || end >= span));
      const waiting = there.filter(([, first]) => time < first).length;
      const came = chunks.filter(([t]) => t <= time);
      const tokens = came.reduce((sum, [, n]) => sum + n, 0);
      const drafts = guesses ? `, ${tokens - came.length} of them accepted drafts` : "";
      const reading = cache.filter(([t]) => t <= time).at(-1);
      const held = reading ? `, KV cache ${reading[1]} at its last reading` : "";
      figure.querySelector(".state").textContent =
        `${there.length - waiting} decoding, ${waiting} still without a token, ${tokens} tokens so far${drafts}${held}`;
    });
  }

  function stop() {
    cancelAnimationFrame(playing);
    playing = 0;
    at("play").textContent = "Play";
  }

  function play() {
    if (playing) return stop();
    const from = Number(slider.value) >= span ? 0 : Number(slider.value);
    const began = performance.now();
    at("play").textContent = "Pause";
    const frame = (now) => {
      const time = from + (now - began) / REAL_TO_SHOWN;
      show(Math.min(time, span));
      if (time >= span) return stop();
      playing = requestAnimationFrame(frame);
    };
    playing = requestAnimationFrame(frame);
  }

  const byMotion = () => { at("play").hidden = still.matches; };
  still.addEventListener("change", byMotion);
  byMotion();
  at("play").addEventListener("click", play);
  at("step").addEventListener("click", () => {
    stop();
    const now = Number(slider.value) >= span ? -1 : Number(slider.value);
    show(events.find((time) => time > now) ?? span);
  });
  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  show(span);
}
