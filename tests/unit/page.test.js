// dashboards/page/page.js on the little of a document that it touches: what a panel becomes.
import { strictEqual as same } from "node:assert";
import { test } from "node:test";

class Element {
  id = "";
  /** @type {any} */
  parentElement = null;
  /** @type {any[]} */
  children = [];
  className = "";
  /** @type {any} */
  dataset = {};
  style = { setProperty: () => {} };
  get classList() {
    return { contains: (name) => this.className.split(" ").includes(name) };
  }
  append(...children) {
    for (const child of children) if (child instanceof Element) child.parentElement = this;
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.children = [];
    this.append(...children);
  }
  replaceWith(other) {
    const { children } = this.parentElement;
    other.parentElement = this.parentElement;
    children.splice(children.indexOf(this), 1, other);
  }
  addEventListener() {}
  find(id) {
    if (this.id === id) return this;
    return this.children.map((child) => child instanceof Element ? child.find(id) : null).find(Boolean);
  }
}

const TABLE = { id: 1, type: "table", title: "Verdicts", gridPos: { w: 24 }, fieldConfig: {},
  targets: [{ expr: "lab_verdict", refId: "A", instant: true }] };
const BOARD = { uid: "compare", title: "Compare", description: "", templating: { list: [] }, panels: [TABLE] };
const VERDICTS = { result: [{ metric: { outcome: "helps" }, value: [60, "1"] }] };
const body = new Element();
for (const id of ["choices", "said", "panels"]) body.append(Object.assign(new Element(), { id }));
const prometheus = { answers: true };
let redraw;

/** @type {any} */ (globalThis).document = {
  body, createElement: () => new Element(), getElementById: (id) => body.find(id),
  querySelectorAll: () => [],
};
/** @type {any} */ (globalThis).location = { search: "" };
/** @type {any} */ (globalThis).matchMedia = () => ({ addEventListener: (_, listener) => { redraw = listener; } });
/** @type {any} */ (globalThis).Plotly = { purge: () => {} };
/** @type {any} */ (globalThis).fetch = (url) => Promise.resolve({
  json: () => Promise.resolve(answer(String(url))), statusText: "Bad Gateway",
});

function answer(url) {
  if (url === "boards.json") return { boards: [BOARD], colours: [] };
  if (url.includes("/series?")) return { status: "success", data: [] };
  return prometheus.answers ? { status: "success", data: VERDICTS } : { error: "Bad Gateway" };
}

async function drawn(turn) {
  for (let waits = 0; body.dataset.drawn !== String(turn) && waits < 5000; waits++) {
    await new Promise((done) => setTimeout(done, 1));
  }
  return body.find("panel-1");
}

test("a table is a table again once Prometheus answers again", async () => {
  await import("../../dashboards/page/page.js");
  const panel = await drawn(2);
  same(panel.className, "scroll");
  prometheus.answers = false;
  redraw();
  same((await drawn(3)).className, "plot empty");
  same(panel.children[0], "Prometheus did not answer: Bad Gateway");
  prometheus.answers = true;
  redraw();
  same((await drawn(4)).className, "scroll");
  same(panel.children.every((child) => child instanceof Element), true);
});
