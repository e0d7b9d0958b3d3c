// Numbers and texts made fit to be shown. Pure functions: no page, no network.

const count = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const NONE = "–";
const MINUS = "−";

const known = (x) => typeof x === "number" && Number.isFinite(x);

/** 12840 → "12,840". */
export const formatCount = (n) => (known(n) ? count.format(n) : NONE);

/** Nats per token: 1.6182 → "1.618". */
export const formatLoss = (x, digits = 3) => (known(x) ? x.toFixed(digits).replace("-", MINUS) : NONE);

/** A difference, its sign always there: 0.31 → "+0.310". What rounds to nothing has no sign. */
export function formatSigned(x, digits = 3) {
  if (!known(x)) return NONE;
  const size = Math.abs(x).toFixed(digits);
  return Number(size) === 0 ? size : (x < 0 ? MINUS : "+") + size;
}

/** Tokens a second: three digits are enough for a number that moves. */
export const formatRate = (x) => (known(x) ? (x < 99.95 ? one : count).format(x) : NONE);

/** Relative size: 0.0321 → "3.2 %". */
export function formatPercent(x) {
  if (!known(x)) return NONE;
  const percent = 100 * x;
  return `${percent !== 0 && Math.abs(percent) < 10 ? percent.toPrecision(2) : count.format(percent)} %`;
}

/** Bytes in binary units: 361758720 → "345 MiB". */
export function formatBytes(n) {
  if (!known(n)) return NONE;
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (n >= 1023.5 && at < units.length - 1) {
    n /= 1024;
    at += 1;
  }
  return `${at > 0 && n < 9.95 ? one.format(n) : count.format(n)} ${units[at]}`;
}

/** Seconds as a person says them: 75 → "1 min 15 s". */
export function formatSeconds(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 9.95) return `${one.format(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const [minutes, rest] = [Math.floor(whole / 60), whole % 60];
  return rest ? `${count.format(minutes)} min ${rest} s` : `${count.format(minutes)} min`;
}

const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");

/** When something was, in seconds since the epoch: the time today, before that with the day, of other years the day. */
export function formatTime(seconds, now = Date.now() / 1000) {
  if (!known(seconds)) return NONE;
  const [then, today] = [seconds, now].map((time) => new Date(1000 * time));
  const clock = [then.getHours(), then.getMinutes()].map((part) => String(part).padStart(2, "0")).join(":");
  if (then.toDateString() === today.toDateString()) return clock;
  const day = `${then.getDate()} ${MONTHS[then.getMonth()]}`;
  return then.getFullYear() === today.getFullYear() ? `${day}, ${clock}` : `${day} ${then.getFullYear()}`;
}

/** As much of an id as tells sessions apart. */
export const shortId = (id) => id.slice(0, 8);

/** `n` tokens, in words. */
export const tokens = (n) => `${formatCount(n)} ${n === 1 ? "token" : "tokens"}`;

/** A file name of letters that every system allows. */
export function fileName(label) {
  const name = label
    .normalize("NFC")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 60);
  return `${name || "session"}.session`;
}

/** The first line of a text that says something, as a name for it. */
export function titleOf(text, longest = 48) {
  const line =
    text
      .slice(0, 4000)
      .split("\n")
      .find((candidate) => /[\p{L}\p{N}]/u.test(candidate)) ?? "";
  return excerpt(line.replace(/^[^\p{L}\p{N}“„«(]+/u, "").replace(/[.,:;]\s*$/, ""), longest);
}

/** At most `most` characters of a text on one line, cut between words. */
export function excerpt(text, most) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length <= most ? line : `${line.slice(0, most).replace(/\s+\S*$/, "")} …`;
}

/** Round numbers from `low` to `high`, about `wanted` of them. */
export function ticks(low, high, wanted) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => rough <= factor * power * 1.0001) ?? 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step || 0);
  return found;
}

/** A position on an axis that goes up to `most`, all in one unit: 16000 → "16K". */
export function formatTick(x, most) {
  if (!x || most < 1e4) return formatCount(x);
  return most < 1e6 ? `${Number((x / 1e3).toFixed(1))}K` : `${Number((x / 1e6).toFixed(2))}M`;
}

/** As many digits as the distance of ticks needs. */
export function formatLevel(y, step) {
  const digits = Math.max(0, Math.min(3, Math.ceil(-Math.log10(step) - 1e-9)));
  return formatLoss(y || 0, digits);
}

/** How wide a bin must be for `span` tokens in at most `most` bins: 1, 2, 4, 8 … */
export function binWidth(span, most) {
  let width = 1;
  while (span / width > most) width *= 2;
  return width;
}

/** The text in pieces of at most about `size` characters, each cut before the last white space it has. */
export function* pieces(text, size) {
  let at = 0;
  while (text.length - at > size) {
    let cut = at + size;
    while (cut > at && !/\s/.test(text[cut])) cut -= 1;
    if (cut === at) {
      cut = at + size;
      if (/[\uDC00-\uDFFF]/.test(text[cut])) cut -= 1; // never between the halves of one character
    }
    yield text.slice(at, cut);
    at = cut;
  }
  if (at < text.length) yield text.slice(at);
}

/** The text as passages of `least` to `most` characters, ended by a paragraph, else a line or a sentence, else a word. */
export function passages(text, least = 180, most = 420) {
  const found = [];
  let at = 0;
  while (at < text.length) {
    const end = text.length - at <= most ? text.length : at + passageEnd(text.slice(at, at + most), least);
    found.push(text.slice(at, end));
    at = end;
  }
  const last = found.length - 1;
  if (last > 0 && found[last].length < least / 3) found.splice(last - 1, 2, found[last - 1] + found[last]);
  return found;
}

function passageEnd(stretch, least) {
  for (const [border, which] of [
    [/\n\s*\n/g, "first"],
    [/\n/g, "last"],
    [/[.!?…]["'”’)\]]*\s+/g, "last"],
    [/\s+/g, "last"],
  ]) {
    const ends = [...stretch.matchAll(border)].map((hit) => hit.index + hit[0].length).filter((end) => end >= least);
    if (ends.length) return which === "first" ? ends[0] : ends.at(-1);
  }
  return /[\uD800-\uDBFF]/.test(stretch.at(-1)) ? stretch.length - 1 : stretch.length;
}

/** 0 … n − 1 in an order of which every beginning is spread over the whole. */
export function spread(n) {
  const bits = Math.max(1, Math.ceil(Math.log2(Math.max(2, n))));
  const order = [];
  for (let i = 0; i < 2 ** bits; i += 1) {
    let reversed = 0;
    for (let bit = 0; bit < bits; bit += 1) if (i & (1 << bit)) reversed |= 1 << (bits - 1 - bit);
    if (reversed < n) order.push(reversed);
  }
  return order;
}

/** Mean over neighbours, weighted by distance (`sigma`, in places) and by `weights`; a missing value stays missing. */
export function smooth(values, weights, sigma) {
  if (!(sigma > 0)) return values.slice();
  const reach = Math.ceil(3 * sigma);
  const kernel = Array.from({ length: reach + 1 }, (_, d) => Math.exp((-d * d) / (2 * sigma * sigma)));
  return values.map((own, i) => {
    if (!known(own)) return null;
    let sum = 0;
    let total = 0;
    for (let j = Math.max(0, i - reach); j <= Math.min(values.length - 1, i + reach); j += 1) {
      if (!known(values[j])) continue;
      const weight = kernel[Math.abs(i - j)] * weights[j];
      sum += weight * values[j];
      total += weight;
    }
    return sum / total;
  });
}

/** The value below which `share` of the known values lie. */
export function quantile(values, share) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : null;
}

/** Labels moved apart: the places nearest to the wanted ones, in order, `gap` between them, within `low` … `high`. */
export function apart(wanted, gap, low, high) {
  const order = wanted.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]);
  const placed = Array(wanted.length);
  let free = low;
  for (const [y, i] of order) {
    placed[i] = Math.max(y, free);
    free = placed[i] + gap;
  }
  let limit = high;
  for (const [, i] of order.reverse()) {
    placed[i] = Math.min(placed[i], limit);
    limit = placed[i] - gap;
  }
  return placed;
}
