// Of a lesson's page: the reader's guess before the answer, and commands to copy.
"use strict";

const within = (ratio, { low, high }) => ratio >= Number(low) && (high === "" || ratio < Number(high));

for (const button of document.querySelectorAll(".guesses button")) {
  button.addEventListener("click", () => {
    document.querySelectorAll(".guesses button").forEach((other) =>
      other.setAttribute("aria-pressed", String(other === button)));
    const right = data.measured.filter(({ ratio }) => within(ratio, button.dataset));
    const said = data.measured.map(({ machine, ratio }) => `${digits(ratio)} on ${machine}`);
    const verdict = right.length === data.measured.length ? "That is what was measured"
      : right.length ? "So it was on one machine, not on every one" : "It came otherwise";
    at("guessed").textContent = `You guessed ${button.textContent}. ${verdict}: ${said.join(", ")}.`;
    at("revealed").open = true;
  });
}

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
    } catch {  // a browser may refuse: then it is selected, to be copied by hand
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Selected";
    }
  });
}
