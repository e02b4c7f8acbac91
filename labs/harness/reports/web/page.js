// Of every page: light or dark, tables that sort, and the index's filter.
"use strict";

function themed(onChange) {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => {
    button.textContent = dark() ? "Light" : "Dark";
    onChange();
  };
  try {
    const kept = localStorage.getItem("theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* a browser may refuse storage to a file */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch { /* then the choice holds for this page alone */ }
    tell();
  });
  system.addEventListener("change", tell);
  tell();
}

// A cell as a number, times in seconds; null where it is none.
function amount(text) {
  const found = /^(?:at (?:most|least) )?(-?[\d,]*\.?\d+)(?:x|%)?(?: (ms|s)\b)?/.exec(text);
  if (!found) return null;
  return Number(found[1].replaceAll(",", "")) * (found[2] === "ms" ? 1e-3 : 1);
}

function isMissing(text) {
  return text === "–" || text === "";
}

function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const text = (row, column) => (row.cells[column] ? row.cells[column].textContent.trim() : "");
  const isNumeric = (column) => {
    const there = [...body.rows].map((row) => text(row, column)).filter((t) => !isMissing(t));
    const dates = there.some((t) => /^\d{4}-\d\d-\d\d/.test(t));
    return there.length > 0 && !dates && there.every((t) => amount(t) !== null);
  };
  // short cells stay whole; long ones get about thirty letters a line before the table scrolls
  heads.forEach((_, column) => {
    const longest = Math.max(0, ...[...body.rows].map((row) => text(row, column).length));
    const most = isNumeric(column) ? 22 : 14;
    for (const row of body.rows) {
      if (!row.cells[column]) continue;
      if (longest <= most) row.cells[column].classList.add("whole");
      else row.cells[column].style.minWidth = `${Math.min(15, longest / 2)}rem`;
    }
  });
  heads.forEach((head, column) => {
    if (head.querySelector("button")) return;
    head.scope = "col";
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
      const byNumber = isNumeric(column); // of the rows that are there now
      const rows = [...body.rows].sort((a, b) => {
        const [one, two] = [text(a, column), text(b, column)];
        if (isMissing(one) || isMissing(two)) return isMissing(one) - isMissing(two);
        const order = byNumber
          ? amount(one) - amount(two)
          : one.localeCompare(two, "en", { numeric: true });
        return way * order;
      });
      body.append(...rows);
    });
  });
}

// A table that is wider than the page is set more closely; one that is still too wide scrolls.
function fitted(box) {
  box.classList.toggle("dense", false);
  box.classList.toggle("dense", box.scrollWidth > box.clientWidth);
}

// A link to a folded section opens it.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  const fold = target?.matches("details") ? target : target?.querySelector(":scope > details");
  if (fold) fold.open = true;
}

function filtered(form) {
  const rows = [...document.querySelectorAll("#all-runs tbody tr[data-lab]")];
  const { lab, machine, words } = form.elements;
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const said = row.textContent.toLowerCase();
      row.hidden =
        (lab.value !== "" && row.dataset.lab !== lab.value) ||
        (machine.value !== "" && row.dataset.machine !== machine.value) ||
        !wanted.every((word) => said.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = `${shown} of ${rows.length} runs`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}

// Of the page of questions: those that have all words, in the question or in what answers it.
function searched(input) {
  const questions = [...document.querySelectorAll("details.question")];
  const said = questions.map((of) => of.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/);
    questions.forEach((of, place) => of.hidden = !wanted.every((word) => said[place].includes(word)));
    for (const topic of document.querySelectorAll("main section")) {
      topic.hidden = !topic.querySelector("details.question:not([hidden])");
    }
    const shown = questions.filter((of) => !of.hidden).length;
    document.getElementById("found").textContent = input.value ? `${shown} of ${questions.length} questions` : "";
  });
}

document.querySelectorAll("main table:has(thead)").forEach(sortable);
const boxes = [...document.querySelectorAll(".table")];
boxes.forEach(fitted);
addEventListener("resize", () => boxes.forEach(fitted));
document.querySelectorAll("details").forEach((fold) =>
  fold.addEventListener("toggle", () => fold.querySelectorAll(".table").forEach(fitted)));
addEventListener("hashchange", unfold);
unfold();
if (document.getElementById("search")) searched(document.getElementById("search"));
if (document.getElementById("filter")) filtered(document.getElementById("filter"));
if (!document.getElementById("data")) themed(() => {});
