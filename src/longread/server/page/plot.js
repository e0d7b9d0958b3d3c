// Plots of losses by position, as SVG: panels over one axis, lines named where they end, a cursor to read off values.

import { draw, make, say } from "./dom.js";
import { apart, formatLevel, formatTick, quantile, ticks } from "./figures.js";

const TITLE = 26; // pixels above a panel, for its title
const GAP = 14;
const AXIS = 40;
const LINE = 15; // distance of two labels

/**
 * A plot in an element of the page.
 *
 * `show` takes { summary, x: [low, high], xTitle, panels, shades, describe }. A panel has a title, a height, and any of:
 *   lines: [{ key, label, points: [[x, y | null]], faint }], bands: [{ key, upper, lower }] between two lists of points,
 *   area: { points } above and below 0, bars: [{ from, to, y, chosen }].
 * `describe(x)` gives the words for a position; `onCursor(x | null)` hears where the cursor is.
 */
export class Plot {
  #model = null;
  #x = null;
  #at = null;

  constructor(root, onCursor = () => {}) {
    this.root = root;
    this.onCursor = onCursor;
    this.readout = make("p", { class: "readout" }); // stands where a narrow plot has its legend
    this.svg = draw("svg", { role: "img" });
    this.slider = make("input", { type: "range", class: "unseen", "aria-label": "Position in the text" });
    root.append(this.readout, this.svg, this.slider);
    new ResizeObserver(() => this.#draw()).observe(root);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerdown", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => document.activeElement !== this.slider && this.cursor(null));
    this.slider.addEventListener("input", () => this.cursor(Number(this.slider.value)));
    this.slider.addEventListener("focus", () => this.cursor(this.#at ?? Number(this.slider.value)));
    this.slider.addEventListener("blur", () => this.cursor(null));
  }

  show(model) {
    this.#model = model;
    this.#draw();
  }

  /** Puts the cursor at a position, or takes it away. */
  cursor(x) {
    this.#at = x;
    this.#drawCursor();
    this.onCursor(x);
  }

  #point(event) {
    if (!this.#x) return;
    const [low, high] = this.#model.x;
    const x = this.#x.invert(event.clientX - this.svg.getBoundingClientRect().left);
    this.cursor(Math.round(Math.min(high, Math.max(low, x))));
  }

  #draw() {
    const model = this.#model;
    const width = this.root.clientWidth;
    if (!model || width < 50) return;
    const narrow = width < 520;
    const labels = model.panels.flatMap((panel) => panel.lines ?? []).map((line) => line.label.length);
    const right = narrow ? 10 : Math.max(16, 7.2 * Math.max(0, ...labels) + 14);
    const left = 44;
    const scale = linear(model.x, [left, width - right]);
    this.#x = scale;
    const children = [];
    let top = 0;
    for (const panel of model.panels) {
      const y = linear(extent(panel), [top + TITLE + panel.height, top + TITLE]);
      Object.assign(panel, { y, top });
      children.push(...drawPanel(panel, scale, y, { left, right: width - right, top, narrow }));
      top += TITLE + panel.height + GAP;
    }
    const bottom = top - GAP;
    children.unshift(...shades(model.shades ?? [], scale, bottom));
    children.push(...axis(model, scale, bottom, { left, right: width - right, narrow }));
    this.cursorLayer = draw("g", { class: "cursor" });
    const height = bottom + AXIS;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("aria-label", model.summary);
    this.svg.replaceChildren(...children, this.cursorLayer);
    this.bottom = bottom;
    const [low, high] = model.x.map(Math.floor);
    Object.assign(this.slider, {
      min: low,
      max: Math.max(high, low + 1),
      step: Math.max(1, Math.round((high - low) / 100)),
    });
    this.#drawCursor();
  }

  #drawCursor() {
    if (!this.cursorLayer) return;
    const at = this.#at;
    const inside = at !== null && at >= this.#model.x[0] && at <= this.#model.x[1];
    this.root.classList.toggle("pointing", inside);
    if (!inside) {
      this.cursorLayer.replaceChildren();
      say(this.readout, "");
      return;
    }
    const x = this.#x(at);
    const marks = [];
    for (const panel of this.#model.panels) {
      marks.push(draw("line", { x1: x, x2: x, y1: panel.top + TITLE - 4, y2: panel.top + TITLE + panel.height }));
      for (const line of panel.lines ?? []) {
        const near = nearest(line.points, at);
        if (near)
          marks.push(
            draw("circle", {
              class: `dot ${line.key}`,
              cx: this.#x(near[0]),
              cy: panel.y.inside(near[1]),
              r: 3.5,
            }),
          );
      }
    }
    this.cursorLayer.replaceChildren(...marks);
    const words = this.#model.describe(at);
    say(this.readout, words);
    this.slider.value = at;
    this.slider.setAttribute("aria-valuetext", words);
  }
}

/** A small line without axes, for a number that moves. */
export function spark(svg, points) {
  const [width, height] = [72, 20];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (points.length < 3) return svg.replaceChildren();
  const x = linear([points[0][0], points.at(-1)[0]], [1, width - 1]);
  const y = linear([0, 1.1 * Math.max(...points.map((point) => point[1]))], [height - 1, 1]);
  return svg.replaceChildren(draw("path", { class: "spark", d: path(thinned(points, 72), x, y) }));
}

const thinned = (points, most) =>
  points.filter((_, i) => i % Math.ceil(points.length / most) === 0 || i === points.length - 1);

function linear([low, high], [from, to]) {
  const factor = (to - from) / (high - low || 1);
  const scale = (value) => from + (value - low) * factor;
  const [near, far] = [Math.min(from, to), Math.max(from, to)];
  return Object.assign(scale, {
    domain: [low, high],
    invert: (pixel) => low + (pixel - from) / factor,
    inside: (value) => Math.min(far, Math.max(near, scale(value))),
  });
}

/** What the y axis must hold: all smooth lines, most of the faint points, 0 under bars and areas. */
function extent(panel) {
  const strong = [];
  const weak = [];
  for (const line of panel.lines ?? []) {
    strong.push(...line.points.map((point) => point[1]));
    weak.push(...(line.faint ?? []).map((point) => point[1]));
  }
  for (const [, y] of panel.area?.points ?? []) strong.push(y);
  for (const bar of panel.bars ?? []) strong.push(bar.y);
  let values = strong.filter((y) => y !== null);
  if (weak.length) values = [...values, quantile(weak, 0.03), quantile(weak, 0.97)].filter((y) => y !== null);
  if (panel.area || panel.bars) values.push(0);
  if (!values.length) return [0, 1];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const least = panel.area || panel.bars ? 0.1 : 0.4;
  if (high - low < least)
    [low, high] = panel.area || panel.bars ? [low, low + least] : [(low + high - least) / 2, (low + high + least) / 2];
  const room = 0.06 * (high - low);
  return [low === 0 ? 0 : Math.max(low - room, low > 0 ? 0 : -Infinity), high + room];
}

function drawPanel(panel, x, y, { left, right, top, narrow }) {
  const [low, high] = y.domain;
  const levels = ticks(low, high, panel.height > 150 ? 6 : 3);
  const step = levels.length > 1 ? levels[1] - levels[0] : 1;
  const drawn = [
    draw("text", { class: "panel-title", x: 0, y: top + 13 }, narrow ? (panel.short ?? panel.title) : panel.title),
  ];
  for (const level of levels) {
    const zero = level === 0 && (panel.area || panel.bars);
    drawn.push(
      draw("line", { class: zero ? "zero" : "grid", x1: left, x2: right, y1: y(level), y2: y(level) }),
      draw("text", { class: "tick", x: left - 8, y: y(level) + 4, "text-anchor": "end" }, formatLevel(level, step)),
    );
  }
  for (const { key, upper, lower } of panel.bands ?? [])
    drawn.push(...between(upper, lower, x, y).map((d) => draw("path", { class: `band ${key}`, d })));
  for (const line of panel.lines ?? [])
    if (line.faint) drawn.push(draw("path", { class: `faint ${line.key}`, d: path(line.faint, x, y) }));
  if (panel.area) drawn.push(...area(panel.area.points, x, y));
  for (const bar of panel.bars ?? []) {
    const [from, to] = [x(bar.from), x(bar.to)];
    const [a, b] = [y.inside(Math.max(0, bar.y)), y.inside(Math.min(0, bar.y))];
    const wide = Math.max(1.5, to - from - 1);
    drawn.push(
      draw("rect", {
        class: `kept ${bar.y < 0 ? "loss" : ""} ${bar.chosen ? "chosen" : ""}`,
        x: from,
        width: wide,
        y: a,
        height: Math.max(1, b - a),
      }),
    );
  }
  for (const line of panel.lines ?? [])
    drawn.push(draw("path", { class: `strong ${line.key}`, d: path(line.points, x, y) }));
  const ends = (panel.lines ?? [])
    .map((line) => ({ line, end: line.points.findLast((point) => point[1] !== null) }))
    .filter(({ end }) => end);
  const places = apart(
    ends.map(({ end }) => y.inside(end[1])),
    LINE,
    top + TITLE,
    top + TITLE + panel.height,
  );
  ends.forEach(({ line, end }, i) => {
    drawn.push(draw("circle", { class: `dot ${line.key}`, cx: x(end[0]), cy: y.inside(end[1]), r: 2.5 }));
    if (!narrow)
      drawn.push(draw("text", { class: `name ${line.key}`, x: x(end[0]) + 9, y: places[i] + 4 }, line.label));
  });
  if (narrow) drawn.push(legend(panel.lines ?? [], right, top + 13));
  return drawn;
}

/** Names of the lines above a panel that has no room beside them. */
function legend(lines, right, y) {
  const names = lines.flatMap(({ key, label }, i) => {
    const name = draw("tspan", { class: `name ${key}` }, label);
    if (i) name.setAttribute("dx", 10);
    return [name];
  });
  return draw("text", { x: right, y, "text-anchor": "end" }, ...names);
}

function axis(model, x, bottom, { left, right, narrow }) {
  const drawn = [draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom })];
  for (const tick of ticks(...model.x, narrow ? 4 : 8)) {
    if (tick !== Math.round(tick)) continue;
    drawn.push(
      draw("line", { class: "axis", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4 }),
      draw(
        "text",
        { class: "tick", x: x(tick), y: bottom + 17, "text-anchor": x(tick) > right - 8 && narrow ? "end" : "middle" },
        formatTick(tick, model.x[1]),
      ),
    );
  }
  drawn.push(
    draw("text", { class: "axis-title", x: right, y: bottom + 35, "text-anchor": "end" }, `${model.xTitle} →`),
  );
  return drawn;
}

function shades(list, x, bottom) {
  return list.flatMap(({ from, to, label }) => {
    const [a, b] = [x(from), x(to)];
    const shade = draw("rect", {
      class: "shade",
      x: a,
      width: Math.max(1, b - a),
      y: TITLE,
      height: bottom - TITLE,
    });
    return b - a < 7 * label.length + 8
      ? [shade]
      : [shade, draw("text", { class: "shade-label", x: a + 5, y: TITLE + 13 }, label)];
  });
}

function path(points, x, y) {
  let pen = "M";
  let d = "";
  for (const [at, value] of points) {
    if (value === null) {
      pen = "M";
      continue;
    }
    d += `${pen}${x(at).toFixed(1)} ${(y.inside ? y.inside(value) : y(value)).toFixed(1)}`;
    pen = "L";
  }
  return d;
}

/** Closed shapes between two lists of points at the same places, interrupted where one has no value. */
function between(upper, lower, x, y) {
  const shapes = [];
  let run = [];
  const close = () => {
    if (run.length > 1) {
      const there = run.map(([at, a]) => `${x(at).toFixed(1)} ${y.inside(a).toFixed(1)}`);
      const back = run.map(([at, , b]) => `${x(at).toFixed(1)} ${y.inside(b).toFixed(1)}`).reverse();
      shapes.push(`M${there.join("L")}L${back.join("L")}Z`);
    }
    run = [];
  };
  upper.forEach(([at, a], i) => {
    const b = lower[i][1];
    if (a === null || b === null) close();
    else run.push([at, a, b]);
  });
  close();
  return shapes;
}

function area(points, x, y) {
  const zero = points.map(([at, value]) => [at, value === null ? null : 0]);
  const part = (keep) => points.map(([at, value]) => [at, value === null ? null : keep(value, 0)]);
  return [
    ...between(part(Math.max), zero, x, y).map((d) => draw("path", { class: "area gained", d })),
    ...between(part(Math.min), zero, x, y).map((d) => draw("path", { class: "area lost", d })),
    draw("path", { class: "contour", d: path(points, x, y) }),
  ];
}

function nearest(points, at) {
  let best = null;
  for (const point of points) {
    if (point[1] !== null && (best === null || Math.abs(point[0] - at) < Math.abs(best[0] - at))) best = point;
  }
  return best;
}
