// Of a lesson's page: the reader's guess before the answer.
"use strict";

const within = (ratio, { low, high }) => ratio >= Number(low) && (high === "" || ratio < Number(high));

for (const button of document.querySelectorAll(".guesses button")) {
  button.addEventListener("click", () => {
    document.querySelectorAll(".guesses button").forEach((other) =>
      other.setAttribute("aria-pressed", String(other === button)));
    const right = data.measured.filter(({ ratio }) => within(ratio, button.dataset));
    const said = data.measured.map(({ machine, ratio }) => `${digits(ratio)} on ${machine}`);
    const verdict = right.length === data.measured.length ? "That is what was measured"
      : right.length ? "That is what happened on one machine, but not on every one" : "Something else happened";
    at("guessed").textContent = `You guessed ${button.textContent}. ${verdict}: ${said.join(", ")}.`;
    at("revealed").open = true;
  });
}

copyable();
