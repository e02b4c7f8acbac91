// Of a lesson's page: the reader's guess before the answer.
"use strict";

const within = (ratio, { low, high }) => ratio >= Number(low) && (high === "" || ratio < Number(high));

for (const button of document.querySelectorAll(".guesses button")) {
  button.addEventListener("click", () => {
    document.querySelectorAll(".guesses button").forEach((other) =>
      other.setAttribute("aria-pressed", String(other === button)));
    const came = data.measured.length ? data.measured : data.foretold;
    const how = data.measured.length ? "was measured" : "is predicted, and not measured yet";
    const right = came.filter(({ ratio }) => within(ratio, button.dataset));
    const said = came.map(({ machine, ratio }) => `${digits(ratio)} on ${machine}`);
    const verdict = right.length === came.length ? `That is what ${how}`
      : right.length ? `That ${how} on some machines, but not on all` : `Something else ${how}`;
    at("guessed").textContent = `You guessed ${button.textContent}. ${verdict}: ${said.join(", ")}.`;
    at("revealed").open = true;
  });
}

copyable();
