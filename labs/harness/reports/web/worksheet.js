// Of a lesson's page: its worksheet, whose answers are marked within a stated factor.
"use strict";

// A typed number; null where it is none. A comma parts thousands, as in the figures of the page.
function typed(text) {
  const plainText = text.trim().replaceAll(",", "").replace(/\s*(%|x)$/, "");
  const value = Number(plainText);
  return plainText && Number.isFinite(value) ? value : null;
}

// What became of an answer, in a sentence, and whether it is right.
function markedAnswer(text, { key, within, parts }) {
  const answer = typed(text);
  if (answer === null || answer <= 0) return { right: false, said: "Type a number above 0." };
  const off = answer / key;
  const near = (ratio, factor = 1.03) => Math.max(ratio, 1 / ratio) <= factor;
  const allowed = `within a factor of ${within}`;
  if (near(off, within)) {
    const exact = near(off, 1.01) ? "" : `, ${digits(100 * Math.abs(off - 1))}% ${off > 1 ? "above" : "below"} the key`;
    return { right: true, said: `Right ${allowed}${exact}.` };
  }
  const far = `Too ${off > 1 ? "large" : "small"} by a factor of ${digits(Math.max(off, 1 / off))}; ${allowed} it is right.`;
  const part = Object.entries(parts).find(([, value]) => value && near(answer / value));
  const hint = part ? `Your number is one part of it: ${part[0]}.`
    : near(answer * key) ? "It is the right ratio the other way round."
    : [1e3, 1e6, 1e9].some((unit) => near(off / unit) || near(off * unit)) ? "Check the unit."
    : near(off, 2.06) && (near(off / 2) || near(off * 2)) ? "A factor of two: keys and values are two, a number of 16 bits has two bytes, and a product with a sum is two operations."
    : near(off / 8) || near(off * 8) ? "A factor of eight: bits, or bytes?" : "";
  return { right: false, said: `${far} ${hint}`.trim() };
}

for (const task of document.querySelectorAll(".task")) {
  task.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { right, said } = markedAnswer(task.querySelector("input").value, JSON.parse(task.dataset.marking));
    const mark = task.querySelector(".marked");
    mark.textContent = said;
    mark.classList.toggle("right", right);
    mark.classList.toggle("wrong", !right);
    if (right) task.querySelector("details").open = true;
  });
}

function oneSheet() {
  for (const sheet of document.querySelectorAll(".sheet")) {
    sheet.hidden = sheet.id !== at("worksheet-machine").value;
  }
}

if (document.getElementById("worksheet-machine")) {
  at("worksheet-machine").addEventListener("change", oneSheet);
  oneSheet();
}
