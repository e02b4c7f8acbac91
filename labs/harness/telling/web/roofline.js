// Of a lesson's page: a decode step under a machine's roof. Every figure was computed by
// labs/harness/telling/roofline.py; `roofs` is the file that a site has once for all lessons.
"use strict";

{
  const { dots, ...first } = data.roofline;
  const numbered = (names) => names.map((name, n) => [String(n), name]);
  const machine = choice("roof-machine", numbered(roofs.machines.map(({ name }) => name)), drawRoof);
  const model = choice("roof-model", numbered(roofs.models), offerPrecisions);
  const bits = choice("roof-bits", [], drawRoof);
  const context = choice("roof-context", roofs.contexts.map((n) => [String(n), `${n.toLocaleString("en")} tokens`]), drawRoof);
  const batch = at("roof-batch");
  const place = (list, value) => String(Math.max(0, list.indexOf(value)));
  const rate = (value) => ["", "k", "M", "G", "T", "P"].reduceRight((said, prefix, power) =>
    said || (value >= 0.9995 * 1000 ** power ? `${digits(value / 1000 ** power)} ${prefix}FLOP/s` : ""), "");
  const inTime = (s) => (s < 0.9995 ? `${digits(1000 * s)} ms` : `${digits(s)} s`);

  machine.value = place(roofs.machines.map(({ name }) => name), first.machine);
  model.value = place(roofs.models, first.model);
  context.value = String(first.context);
  batch.max = String(roofs.batches.length - 1);
  batch.value = place(roofs.batches, first.batch);
  batch.addEventListener("input", drawRoof);
  offerPrecisions();
  redraws.push(drawRoof);

  function offerPrecisions() {
    const before = bits.value;
    const there = roofs.works.filter((work) => work.model === Number(model.value)).map((work) => work.bits);
    bits.replaceChildren(...roofs.precisions.filter(([n]) => there.includes(n))
      .map(([n, told]) => new Option(told, String(n))));
    if (there.includes(Number(before))) bits.value = before;
    if (redraws.includes(drawRoof)) drawRoof();
  }

  const chosen = () => roofs.works.find((work) => work.model === Number(model.value) &&
    work.bits === Number(bits.value) && work.context === Number(context.value));

  function drawRoof() {
    const work = chosen(), on = Number(machine.value), now = Number(batch.value);
    const measured = [...new Set(dots.map(([name]) => name))];
    const shown = [...new Set([on, ...measured.map((name) => roofs.machines.findIndex((m) => m.name === name))])];
    const walk = work.flops.map((flop, n) => flop / work.step_s[on][n]);
    const traces = [
      ...shown.filter((n) => n >= 0).map((n) => roof(n, n === on)),
      { name: "decode, a dot for each batch", x: work.intensity, y: walk, mode: "lines+markers",
        line: { color: css("--soft"), width: 1.5 }, marker: { size: 5, color: css("--soft") },
        hovertext: roofs.batches.map((size, n) => `${size} in flight<br>${inTime(work.step_s[on][n])} a step`),
        hovertemplate: "%{hovertext}<extra></extra>" },
      { name: "prefill of one prompt", x: [work.prefill.intensity],
        y: [work.prefill.flops / work.prefill.s[on]], mode: "markers",
        marker: { symbol: "square-open", size: 12, color: css("--ink"), line: { width: 2 } },
        hovertext: [`prefill of ${context.value} tokens<br>${inTime(work.prefill.s[on])}`],
        hovertemplate: "%{hovertext}<extra></extra>" },
      { x: [work.intensity[now]], y: [walk[now]], mode: "markers", showlegend: false, hoverinfo: "skip",
        marker: { symbol: "circle-open", size: 16, color: css("--ink"), line: { width: 3 } } },
      ...measured.map((name) => measuredOn(name)),
    ];
    say(work, on, now);
    draw("roofline-plot", traces, layout(traces, shown));
  }

  const tint = (n) => colour(roofs.machines[n].card ? 4 : n);

  function roof(n, bold) {
    const { name, card, roofs: of } = roofs.machines[n];
    return {
      name: plain(name), ...of[bits.value], mode: "lines", hoverinfo: "skip",
      line: { color: tint(n), width: bold ? 3.5 : 1.5, dash: card ? "dash" : "solid" },
    };
  }

  function measuredOn(name) {
    const mine = dots.filter(([on]) => on === name);
    return {
      name: "measured", legendgroup: "measured", showlegend: name === dots[0][0],
      x: mine.map(([, , x]) => x), y: mine.map(([, , , y]) => y), mode: "markers",
      marker: { size: 9, color: tint(Math.max(0, roofs.machines.findIndex((m) => m.name === name))),
                line: { width: 1.5, color: css("--paper") } },
      hovertext: mine.map(([, point, x, y, share]) => `${plain(name)}<br>${plain(point)}<br>${digits(x)} FLOP a byte,` +
        ` ${rate(y)}<br>${digits(100 * share)}% of what the roof admits`),
      hovertemplate: "%{hovertext}<extra></extra>",
    };
  }

  function say(work, on, now) {
    const { name, told, roofs: of } = roofs.machines[on];
    const size = roofs.batches[now], { ridge } = of[bits.value];
    const left = work.intensity[now] < ridge;
    const limit = left ? "memory bandwidth is the limit" : "arithmetic is the limit";
    const said = `${size} in flight: ${digits(work.intensity[now])} FLOP a byte, ${left ? "left" : "right"} of the` +
      ` ridge at ${digits(ridge)}, so ${limit}. At least ${inTime(work.step_s[on][now])} a step, at most` +
      ` ${digits(size / work.step_s[on][now])} tok/s.`;
    at("roof-said").textContent = said;
    batch.setAttribute("aria-valuetext", said);
    at("roof-told").textContent = `${roofs.models[Number(model.value)]} on ${name}: ${told}.` +
      " The page Plan says whether it fits there.";
  }

  /** As far to the right as anything stands, and every ridge. */
  function layout(traces, shown) {
    const y = traces.flatMap((trace) => trace.y);
    const [low, high] = [Math.min(...y) / 1.5, Math.max(...y) * 1.5];
    const ridges = shown.filter((n) => n >= 0).map((n) => roofs.machines[n].roofs[bits.value].ridge);
    const stands = traces.filter((trace) => trace.mode !== "lines").flatMap((trace) => trace.x);
    const left = 0.25, right = 4 * Math.max(...ridges, ...stands);
    const ticks = ticksAt([1], low, high), x = ticksAt([1], left, right);
    return {
      height: 420,
      margin: { l: 10, r: 14, t: at("roofline-plot").clientWidth < 600 ? 96 : 50, b: 46 },
      xaxis: axis({ type: "log", range: [Math.log10(left), Math.log10(right)], tickvals: x, ticktext: x.map(digits),
                    title: { text: "arithmetic intensity (FLOP a byte)" } }),
      yaxis: axis({ type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: ticks, ticktext: ticks.map(rate),
                    title: { text: "" } }),
    };
  }
}
