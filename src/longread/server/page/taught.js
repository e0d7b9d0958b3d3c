// The passages that taught a session most: what each cost when read, and when shown again.

import { $, draw, make, say } from "./dom.js";
import { excerpt, formatCount, formatLoss, formatSigned } from "./figures.js";

const ROWS = 8;
const ORDERS = {
  most: (a, b) => b.first - b.again - (a.first - a.again),
  least: (a, b) => a.first - a.again - (b.first - b.again),
  text: (a, b) => a.position - b.position,
};

/** The list under the plot. `onPoint(passage | null)` hears which one is looked at. */
export class Taught {
  #reader = null;
  #order = "most";

  constructor(app, onPoint) {
    this.onPoint = onPoint;
    $("measure").addEventListener("click", () => app.guard(() => this.#measure()));
    for (const order of Object.keys(ORDERS)) $(`order-${order}`).addEventListener("click", () => this.#sort(order));
  }

  show(reader) {
    this.#reader = reader;
    const { kept, activity, history } = reader;
    const some = history.covered > 0 && activity?.kind !== "reading";
    $("taught").hidden = !some;
    if (!some) return;
    const running = Boolean(kept?.running);
    const left = kept ? kept.order.length - kept.done : 1;
    $("measure").hidden = !running && left === 0;
    $("measure").disabled = !running && Boolean(activity);
    say($("measure"), running ? "Stop" : kept?.done ? "Show it more passages" : "Show it passages again");
    say($("measured"), progress(kept, running));
    this.#list(kept);
  }

  async #measure() {
    const reader = this.#reader;
    if (reader.kept?.running) reader.kept.running.abort();
    else await reader.showAgain();
  }

  #sort(order) {
    this.#order = order;
    for (const name of Object.keys(ORDERS)) $(`order-${name}`).setAttribute("aria-pressed", String(name === order));
    this.#list(this.#reader.kept);
  }

  #list(kept) {
    const shown = (kept?.all ?? []).filter((passage) => typeof passage.again === "number");
    const list = this.#order === "text" ? shown : [...shown].sort(ORDERS[this.#order]).slice(0, ROWS);
    $("passages").hidden = !list.length;
    const signature = `${this.#order} ${list.map((passage) => passage.from).join()} ${this.#reader.id}`;
    if ($("passages").dataset.signature === signature) return;
    $("passages").dataset.signature = signature;
    const losses = list.flatMap(({ first, again, frozenAgain }) => [first, again, frozenAgain ?? again]);
    const range = [Math.floor(2 * Math.min(...losses)) / 2, Math.ceil(2 * Math.max(...losses)) / 2];
    const twin = shown.some((passage) => typeof passage.frozenAgain === "number");
    $("taught-legend").hidden = !list.length;
    $("taught-legend").replaceChildren(...legend(twin, range));
    $("passages").replaceChildren(...list.map((passage) => this.#row(passage, range)));
  }

  #row(passage, range) {
    const change = passage.again - passage.first;
    const worse = change > 0 ? "worse" : "";
    const values = make(
      "p",
      { class: "values" },
      make("span", {}, `${formatLoss(passage.first, 2)} → ${formatLoss(passage.again, 2)}`),
      make("b", { class: worse }, formatSigned(change, 2)),
    );
    const row = make(
      "li",
      { class: "passage" },
      make(
        "div",
        {},
        make("p", { class: "words" }, excerpt(passage.text, 420)),
        make("p", { class: "where" }, `position ${formatCount(passage.position)} to ${formatCount(passage.end)}`),
      ),
      make("div", {}, values, dumbbell(passage, range, worse)),
    );
    row.addEventListener("pointerenter", () => this.onPoint(passage));
    row.addEventListener("pointerleave", () => this.onPoint(null));
    return row;
  }
}

function progress(kept, running) {
  if (!kept) return "";
  if (running) return `${kept.done} of ${kept.goal}`;
  const all = kept.order.length;
  return kept.done < all
    ? `${formatCount(kept.done)} of ${formatCount(all)} passages, evenly spread over the text`
    : `all ${formatCount(all)} passages`;
}

function legend(twin, [low, high]) {
  const item = (name, text) => make("span", {}, make("i", { class: name }), text);
  const items = [item("first", "read first"), item("again", "shown again")];
  if (twin) items.push(item("tick", "shown again to the frozen twin"));
  return [...items, make("span", {}, `lines from ${formatLoss(low, 1)} to ${formatLoss(high, 1)} nats per token`)];
}

function dumbbell({ first, again, frozenAgain }, [low, high], worse) {
  const x = (value) => 5 + (240 * (value - low)) / (high - low || 1);
  const y = 13;
  const svg = draw("svg", {
    class: "dumbbell",
    viewBox: "0 0 250 26",
    preserveAspectRatio: "xMinYMid meet",
    "aria-hidden": "true",
  });
  svg.append(
    draw("line", { class: "base", x1: 5, x2: 245, y1: y, y2: y }),
    draw("line", { class: `way ${worse}`, x1: x(first), x2: x(again), y1: y, y2: y }),
  );
  if (typeof frozenAgain === "number")
    svg.append(draw("line", { class: "frozen", x1: x(frozenAgain), x2: x(frozenAgain), y1: y - 7, y2: y + 7 }));
  svg.append(
    draw("circle", { class: "first", cx: x(first), cy: y, r: 4.5 }),
    draw("circle", { class: `again ${worse}`, cx: x(again), cy: y, r: 5 }),
  );
  return svg;
}
