// From a history to what a plot shows. Pure.

import { binWidth, formatCount, formatLoss, formatSigned, smooth } from "./figures.js";
import { resample } from "./history.js";

const BINS = 200;
const NARROW = 90;
const SMOOTH = 40; // of the whole span one deviation of the smooth line is such a part

/** Smooth and faint points of one history's losses: { bins, nll, frozen, gain, width }, x in the middle of a bin. */
export function curves(history, span, narrow, offset = 0) {
  const width = binWidth(span, narrow ? NARROW : BINS);
  const bins = resample(history, width);
  const weights = bins.map((bin) => bin.tokens);
  const sigma = Math.max(0.7, span / width / SMOOTH);
  const x = bins.map((bin) => (bin.start + bin.end) / 2 - offset);
  const found = { bins, width };
  for (const name of ["nll", "frozen", "gain"]) {
    const values = bins.map((bin) => bin[name]);
    const means = smooth(values, weights, sigma);
    found[name] = { faint: x.map((at, i) => [at, values[i]]), strong: x.map((at, i) => [at, means[i]]) };
  }
  return found;
}

/** What the plot of one session's reading shows. `end` is where the text is expected to end; `kept`, passages shown again. */
export function readingPlot(history, end, kept, narrow) {
  const { bins, nll, frozen, gain } = curves(history, end - history.first, narrow);
  const twin = bins.some((bin) => bin.gain !== null);
  const lines = [{ key: "learning", label: "learning", points: nll.strong, faint: nll.faint }];
  const panels = [{ title: "Loss, nats per token", height: narrow ? 190 : 250, lines }];
  if (twin) {
    lines.unshift({ key: "frozen", label: "frozen", points: frozen.strong, faint: frozen.faint });
    panels[0].bands = [{ key: "gap", upper: frozen.strong, lower: nll.strong }];
    panels.push({
      title: "Gain over frozen reading, nats per token",
      short: "Gain over frozen, nats",
      height: 78,
      area: { points: gain.strong },
    });
  }
  const shown = kept?.all.filter((passage) => passage.again !== undefined && passage.again !== null) ?? [];
  if (shown.length) {
    const bars = shown.map((passage) => ({
      from: passage.position,
      to: passage.end,
      y: passage.first - passage.again,
      chosen: passage.chosen,
    }));
    panels.push({
      title: "Kept: how much lower the loss is when shown again, nats per token",
      short: "Kept: loss lower when shown again",
      height: 78,
      bars,
    });
  }
  const { nll: mean, gain: meanGain } = history.recent();
  const over = twin ? `, ${formatSigned(meanGain)} gained over frozen reading` : "";
  return {
    summary: `Loss by position from ${formatCount(history.first)} to ${formatCount(history.position)}: mean ${formatLoss(mean)} nats per token${over}.`,
    x: [history.first, Math.max(end, history.first + 1)],
    xTitle: "Position, tokens",
    panels,
    shades: history.written.map(([from, to]) => ({ from, to, label: "wrote this itself" })),
    describe: (at) => describe(at, nll.strong, twin ? frozen.strong : null),
  };
}

function describe(at, learning, frozen) {
  const i = nearest(learning, at);
  if (i < 0) return `at ${formatCount(at)}`;
  const own = learning[i][1];
  const other = frozen?.[i][1];
  const gain = own === null || other === null || other === undefined ? null : other - own;
  const words = [`at ${formatCount(at)}`, `loss ${formatLoss(own, 2)}`];
  if (gain !== null) words.push(`frozen ${formatLoss(other, 2)}`, `gain ${formatSigned(gain, 2)}`);
  return words.join(" · ");
}

/** What the plot of one text scored by two sessions shows; `histories` begin where each session is. */
export function comparePlot([a, b], narrow) {
  const span = Math.max(a.position - a.first, b.position - b.first, 1);
  const [one, two] = [a, b].map((history) => curves(history, span, narrow, history.first));
  return {
    summary: `Loss by place in the text: A ${formatLoss(a.recent().nll)}, B ${formatLoss(b.recent().nll)} nats per token.`,
    x: [0, span],
    xTitle: "Place in the text, tokens",
    panels: [
      {
        title: "Loss, nats per token",
        height: narrow ? 190 : 240,
        lines: [
          { key: "a", label: "A", points: one.nll.strong, faint: one.nll.faint },
          { key: "b", label: "B", points: two.nll.strong, faint: two.nll.faint },
        ],
      },
    ],
    describe: (at) => {
      const [i, j] = [nearest(one.nll.strong, at), nearest(two.nll.strong, at)];
      return `at ${formatCount(at)} · A ${formatLoss(one.nll.strong[i]?.[1], 2)} · B ${formatLoss(two.nll.strong[j]?.[1], 2)}`;
    },
  };
}

function nearest(points, at) {
  let best = -1;
  points.forEach(([x], i) => {
    if (best < 0 || Math.abs(x - at) < Math.abs(points[best][0] - at)) best = i;
  });
  return best;
}
