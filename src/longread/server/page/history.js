// What a session has read: losses by position, and the text they belong to as far as this tab has seen it. Pure: no page,
// no network.

/** Losses in the order of reading, each with the bytes of text that it covers. */
export class History {
  #text = new Uint8Array(1024);
  #size = 0;
  #covered = 0;

  constructor(position = 0) {
    this.first = position;
    this.position = position;
    this.start = [];
    this.tokens = [];
    this.nll = [];
    this.frozen = [];
    this.byteStart = [];
    this.sums = { nll: new Sums(), frozen: new Sums() };
    this.written = []; // [start, end) of what it wrote itself
  }

  get length() {
    return this.start.length;
  }

  /** Bytes of text that the losses so far belong to. */
  get covered() {
    return this.#covered;
  }

  /** The losses that the server keeps of a session at `position`; no text of it is here. */
  static kept({ written, ...bins }, position) {
    const history = new History(bins.start[0] ?? position);
    history.add(bins);
    history.byteStart.fill(-1);
    bins.start.forEach((start, i) => {
      if (2 * written[i] < bins.tokens[i]) return;
      const last = history.written.at(-1);
      if (last?.[1] === start) last[1] += bins.tokens[i];
      else history.written.push([start, start + bins.tokens[i]]);
    });
    history.settle(position, false);
    return history;
  }

  /** Announces text whose losses are about to come; returns its size in bytes. */
  expect(text) {
    const bytes = new TextEncoder().encode(text);
    if (this.#size + bytes.length > this.#text.length) {
      const larger = new Uint8Array(2 * (this.#size + bytes.length));
      larger.set(this.#text.subarray(0, this.#size));
      this.#text = larger;
    }
    this.#text.set(bytes, this.#size);
    this.#size += bytes.length;
    return bytes.length;
  }

  /** Takes over bins as the server sends them: parallel lists of start, tokens, bytes, nll, frozen_nll, scored. */
  add(bins) {
    bins.start.forEach((start, i) => {
      if (start < this.position) return; // told before
      this.start.push(start);
      this.tokens.push(bins.tokens[i]);
      this.nll.push(bins.nll[i] ?? null);
      this.frozen.push(bins.frozen_nll?.[i] ?? null);
      const weight = bins.scored?.[i] ?? bins.tokens[i];
      this.sums.nll.push(this.nll.at(-1), weight);
      this.sums.frozen.push(this.frozen.at(-1), weight);
      this.byteStart.push(this.#covered);
      this.#covered = Math.min(this.#size, this.#covered + (bins.bytes?.[i] ?? 0));
      this.position = start + bins.tokens[i];
    });
  }

  /** Tokens that the session wrote itself. How little these surprise it says nothing, so they have no loss here. */
  addWritten(position, count, text) {
    const bytes = this.expect(text);
    if (!count) {
      this.#covered += bytes;
      return;
    }
    const last = this.written.at(-1);
    if (last?.[1] === position) last[1] += count;
    else this.written.push([position, position + count]);
    this.add({ start: [position], tokens: [count], bytes: [bytes], nll: [null] });
  }

  /** The session has come to `position`: all announced text was read, or, if `complete` is false, what bins cover. */
  settle(position, complete = true) {
    if (complete && position > this.position) {
      this.add({
        start: [this.position],
        tokens: [position - this.position],
        bytes: [this.#size - this.#covered],
        nll: [null],
      });
    } else if (complete) this.#covered = this.#size;
    else this.#size = this.#covered;
    this.position = Math.max(position, this.position);
  }

  /** The whole text that losses belong to. */
  text() {
    return this.slice(0, this.#covered);
  }

  /** The text of some bytes; a character of which only a part is inside is left out. */
  slice(from, to) {
    const inside = (i) => (this.#text[i] & 0xc0) === 0x80;
    let [a, b] = [Math.max(0, from), Math.min(to, this.#size)];
    while (a < b && inside(a)) a += 1;
    while (b > a && b < this.#size && inside(b)) b -= 1;
    return new TextDecoder().decode(this.#text.subarray(a, b));
  }

  /** Index of the bin that holds a position, or of the last one before it; −1 before all. */
  at(position) {
    return firstAtLeast(this.start, position + 1) - 1;
  }

  /** The text around a position: some bytes before it, and after; nothing where this tab has not seen it. */
  around(position, before = 90, after = 150) {
    const i = this.at(position);
    if (i < 0) return ["", ""];
    const byte = this.byteStart[i];
    if (byte < 0) return ["", ""];
    return [this.slice(byte - before, byte), this.slice(byte, Math.min(byte + after, this.#covered))];
  }

  /** Mean losses of the bins that start in bytes [from, to): nll, frozen, and the position of the first. */
  meanOfBytes(from, to) {
    const [first, end] = [from, to].map((byte) => firstAtLeast(this.byteStart, byte));
    return { position: this.start[first] ?? this.position, ...mean(this, first, end) };
  }

  /** Mean losses of the newest `tokens`, or of all. */
  recent(tokens = Infinity) {
    return mean(this, Math.max(0, this.at(this.position - tokens)), this.start.length);
  }

  /** A copy for a fork, which goes its own way. */
  copy() {
    const other = new History(this.first);
    other.expect(this.slice(0, this.#size));
    for (const list of ["start", "tokens", "nll", "frozen", "byteStart"]) other[list] = this[list].slice();
    other.written = this.written.map((pair) => pair.slice());
    for (const name of ["nll", "frozen"]) other.sums[name] = this.sums[name].copy();
    other.position = this.position;
    other.#covered = this.#covered;
    return other;
  }
}

/** Weighted sums of the beginnings of a list with gaps, so that any stretch's mean is one subtraction. */
class Sums {
  totals = [0];
  counts = [0];

  push(value, weight) {
    const known = value !== null;
    this.totals.push(this.totals.at(-1) + (known ? value * weight : 0));
    this.counts.push(this.counts.at(-1) + (known ? weight : 0));
  }

  mean(from, to) {
    const count = this.counts[to] - this.counts[from];
    return [count ? (this.totals[to] - this.totals[from]) / count : null, count];
  }

  copy() {
    return Object.assign(new Sums(), { totals: this.totals.slice(), counts: this.counts.slice() });
  }
}

function mean(history, from, to) {
  const [nll, tokens] = history.sums.nll.mean(from, to);
  const [frozen] = history.sums.frozen.mean(from, to);
  return { nll, frozen, gain: nll === null || frozen === null ? null : frozen - nll, tokens };
}

/** Where in an ascending list the first value of at least `wanted` stands; its length, if there is none. */
function firstAtLeast(ascending, wanted) {
  let [low, high] = [0, ascending.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The history in bins of `width` positions: a list of { start, end, tokens, nll, frozen, gain }. */
export function resample(history, width) {
  const found = [];
  let from = 0;
  while (from < history.length) {
    const to = firstAtLeast(history.start, (Math.floor(history.start[from] / width) + 1) * width);
    const end = history.start[to - 1] + history.tokens[to - 1];
    found.push({ start: history.start[from], end, ...mean(history, from, to) });
    from = to;
  }
  return found;
}
