// Of a lesson's page and the planner: buttons that copy a command.
// deno-lint-ignore-file no-unused-vars -- the script that follows in the same page uses it
"use strict";

function copyable() {
  for (const button of document.querySelectorAll(".copy")) {
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(button.dataset.copy);
        button.textContent = "Copied";
      } catch {  // a browser may refuse: then it is selected, to be copied by hand
        getSelection().selectAllChildren(button.previousElementSibling);
        button.textContent = "Selected";
      }
    };
  }
}
