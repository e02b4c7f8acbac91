// Of a lesson's page: trials whose cause the reader names, one at a time.
"use strict";

function guessedCauses(cases, buttons) {
  const order = cases.map((item) => [Math.random(), item]).sort(([a], [b]) => a - b).map(([, item]) => item);
  let place = -1, right = 0, answered = 0, open = false;

  function next() {
    place = (place + 1) % order.length;
    open = true;
    cases.forEach((item) => item.hidden = item !== order[place]);
    order[place].querySelector("details").open = false;
    at("blind-said").textContent = "";
    buttons.forEach((button) => button.setAttribute("aria-pressed", "false"));
  }

  function choose(button) {
    const { cause } = order[place].dataset;
    const isRight = button.textContent === cause;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    if (open) {
      answered += 1;
      right += isRight;
    }
    open = false;
    at("blind-said").textContent = isRight ? `Right: ${cause}.`
      : `It is ${cause}. With ${button.textContent} one would expect: ${button.dataset.foretold}.`;
    at("blind-said").classList.toggle("right", isRight);
    at("blind-said").classList.toggle("wrong", !isRight);
    at("blind-score").textContent = `${right} of ${answered} right at the first attempt`;
    order[place].querySelector("details").open = true;
  }

  buttons.forEach((button) => button.addEventListener("click", () => choose(button)));
  at("blind-next").addEventListener("click", next);
  next();
}

if (document.getElementById("blind-next")) {
  guessedCauses([...document.querySelectorAll(".case")], [...document.querySelectorAll("button.cause")]);
}
