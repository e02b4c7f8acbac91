// Of every page with data: its data, colours and axes, and when Plotly draws.
// deno-lint-ignore-file no-unused-vars -- the script that follows in the same page uses them
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const redraws = [];

// ------------------------------------------------------------------------------ colours, text

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (place) => data.colours[Math.min(place, data.colours.length - 1)];

// Plotly reads its texts as a little HTML.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

function digits(value) {
  if (Math.abs(value) >= 999.5) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= width) lines.push("");
    lines[lines.length - 1] = `${lines.at(-1)} ${word}`.trim();
  }
  return lines;
}

// 1, 2, 5 in each decade; only the decades where there are many, more where there would be one.
function logTicks(low, high) {
  const ticks = ticksAt(high / low > 2000 ? [1] : [1, 2, 5], low, high);
  return ticks.length > 1 ? ticks : ticksAt([1, 1.1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], low, high);
}

function ticksAt(steps, low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const step of steps) {
      const tick = Number((step * 10 ** power).toPrecision(2));
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

// ------------------------------------------------------------------------------------- drawing

function axis(more) {
  return {
    gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true,
    ticks: "outside", tickcolor: css("--line"), ...more,
  };
}

function draw(id, traces, layout) {
  Plotly.react(at(id), traces, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"),
                  font: { color: css("--ink") }, align: "left" },
    margin: { l: 10, r: 14, t: 34, b: 40 },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.0, yanchor: "bottom" },
    hovermode: "closest",
    ...layout,
  }, { responsive: true, displaylogo: false, displayModeBar: false });
}

function choice(id, options, onChange) {
  const select = at(id);
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.addEventListener("change", onChange);
  return select;
}

addEventListener("DOMContentLoaded", () => {  // every script has said by then what it draws
  const drawAll = () => redraws.forEach((redraw) => redraw());
  themed(drawAll);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) drawAll();
    width = innerWidth;
  });
});
