// Of the page of residuals: the figures that a reader chooses, each with the band of its forecast.
"use strict";

if (data.residuals.length) {
  // `value` is null where a figure of 0 leaves no ratio to draw: the prediction was missed by all
  const all = data.residuals.map(([lab, figure, run, what, predicted, measured, value, low, high, least, largest, within]) => ({
    lab, figure, run, title: what, where: "", value, low, high, predicted: largest === null ? null : 1,
    least, largest, within, valid: true, figures: `predicted ${predicted}, measured ${measured}`, verdict: "",
  }));
  const CHOSEN = {
    all: () => true,
    missed: ({ value }) => value === null || value < 1 / 1.25 || value > 1.25,
    outside: (one) => one.within === false,
  };
  const lab = choice("each-lab", [["", "all"], ...data.labs.map((name, n) => [String(n), name])], begin);
  const figure = choice("each-figure", [["", "all"]], show);
  const shown = at("each-shown");
  shown.addEventListener("change", begin);
  lab.value = "0";
  redraws.push(show);

  const here = () => all.filter((one) => (lab.value === "" || one.lab === Number(lab.value)) &&
    CHOSEN[shown.value](one));

  /** The figures that there are in the lab, the one that was chosen before if it is among them. */
  function offer() {
    const before = figure.value;
    const there = [...new Set(here().map((one) => one.figure))].sort((a, b) => a - b);
    figure.replaceChildren(new Option("all", ""), ...there.map((n) => new Option(data.figures[n], String(n))));
    if (there.some((n) => String(n) === before)) figure.value = before;
  }

  function begin() {
    offer();
    show();
  }

  function show() {
    const chosen = here().filter((one) => figure.value === "" || one.figure === Number(figure.value));
    at("each-said").textContent = `${chosen.length} of ${all.length} figures`;
    at("each-runs").replaceChildren(...links(chosen));
    if (!chosen.length) {
      Plotly.purge(at("each-plot"));
      return;
    }
    drawRatios("each-plot", chosen.map(placed), "measured / predicted");
  }

  /** What is not the same in every row stands below its name. */
  function placed(one) {
    const { machine, day } = data.runs[one.run];
    const parts = [lab.value === "" ? data.labs[one.lab] : "", figure.value === "" ? data.figures[one.figure] : "",
                   `${machine}, ${day}`];
    return { ...one, where: parts.filter(Boolean).join("; ") };
  }

  function links(chosen) {
    return [...new Set(chosen.map((one) => one.run))].flatMap((run, place) => {
      const { machine, day, href } = data.runs[run];
      const link = document.createElement("a");
      [link.textContent, link.href] = [`${machine}, ${day}`, href];
      return place ? ["; ", link] : [link];
    });
  }

  offer();
  if (figure.options.length > 1) figure.selectedIndex = 1;  // one figure at first: all are many
}
