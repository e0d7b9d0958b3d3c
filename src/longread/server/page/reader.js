// One session as this tab knows it: what the server says and keeps of it, what it was seen reading, what it does now.

import { ApiError } from "./api.js";
import { binWidth, passages, pieces, spread } from "./figures.js";
import { History } from "./history.js";

const PIECE = 1 << 16; // characters of one append
const FINEST = 1 << 18; // bytes up to which every token's loss is asked for
const AGAIN = 96; // passages shown again in one go
const RUN_UP = 160; // characters before a passage, so that its first word is in no stranger place than it was

/** Tells "change" to whoever looks at it. */
export class Reader extends EventTarget {
  #loading = null;

  constructor(api, info) {
    super();
    this.api = api;
    this.info = info;
    this.history = new History(info.position);
    this.loaded = info.position === 0; // whether it is known what the server keeps of its losses
    this.activity = null; // { kind, from, share, rate, note, stop }
    this.rates = []; // of this reading: [position, tokens/s]
    this.turns = []; // { prompt, text, end, tokens, rate, copy }
    this.kept = null; // { all, order, shown, done, running }
  }

  get id() {
    return this.info.id;
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }

  async refresh() {
    this.info = await this.api.session(this.id);
    this.changed();
  }

  /** Asks for the losses that the server keeps, where this tab did not see all that the session read. */
  load() {
    if (this.loaded && this.history.position === this.info.position) return Promise.resolve();
    this.#loading ??= this.#load().finally(() => (this.#loading = null));
    return this.#loading;
  }

  async #load() {
    const losses = await this.api.losses(this.id);
    this.history = History.kept(losses, this.info.position);
    this.kept = null;
    this.loaded = true;
    this.changed();
  }

  async change(fields) {
    this.info = await this.api.change(this.id, fields);
    this.changed();
  }

  stop() {
    this.activity?.stop.abort();
  }

  #begin(kind) {
    if (this.activity) throw new ApiError("This session is busy; wait until it is done, or stop it.");
    this.#stopShowing();
    this.activity = {
      kind,
      from: this.history.position,
      share: 0,
      rate: null,
      note: "",
      stop: new AbortController(),
    };
    this.changed();
    return this.activity;
  }

  #options(activity) {
    return {
      signal: activity.stop.signal,
      onWait: (seconds) => {
        activity.note = `The server is busy; trying again in ${seconds} s`;
        this.changed();
      },
    };
  }

  async #end() {
    this.activity = null;
    await this.refresh().catch(() => this.changed());
  }

  /** Reads a text, piece by piece. Resolves when it is read or stopped. */
  async read(text) {
    const activity = this.#begin("reading");
    await this.load().catch(() => {});
    const total = new TextEncoder().encode(text).length;
    const bin = total <= FINEST ? 1 : binWidth(total, FINEST);
    const speed = new Speed();
    const before = this.history.covered;
    this.rates = [];
    this.kept = null;
    try {
      for (const piece of pieces(text, PIECE)) {
        this.history.expect(piece);
        await this.#append(piece, bin, activity, (data) => {
          if (data.bins) this.history.add(data.bins);
          Object.assign(activity, {
            note: "",
            share: (this.history.covered - before) / total,
            rate: speed.at(data.position),
          });
          if (activity.rate) this.rates.push([data.position, activity.rate]);
          this.changed();
        });
        this.history.settle(this.info.position);
      }
    } catch (error) {
      await this.api.cancel(this.id).catch(() => {});
      this.info = await this.api.session(this.id).catch(() => this.info);
      this.history.settle(this.info.position, false);
      if (error.name !== "AbortError") throw error;
    } finally {
      await this.#end();
    }
  }

  async #append(text, bin, activity, onProgress) {
    const fields = { text, bin, expected_position: this.info.position };
    for (let attempt = 1; ; attempt += 1) {
      try {
        for await (const { event, data } of this.api.append(this.id, fields, this.#options(activity))) {
          if (event === "progress") onProgress(data);
          else if (event === "done") Object.assign(this.info, { position: data.position });
        }
        return;
      } catch (error) {
        // An append says where it begins: the server does not read it twice.
        if (!(error instanceof ApiError) || error.status !== 0 || attempt > 1) throw error;
        await new Promise((resolve) => setTimeout(resolve, 1000));
      }
    }
  }

  /** Goes on writing, after reading `prompt`. With `copy`, a fork does it that is then deleted. */
  async write(prompt, fields, { copy = false } = {}) {
    const activity = this.#begin("writing");
    const turn = { prompt, text: "", end: null, tokens: 0, rate: null, copy };
    this.turns.push(turn);
    if (!copy) await this.load().catch(() => {});
    let writer = this;
    try {
      if (copy) writer = new Reader(this.api, await this.api.fork(this.id, `${this.info.label} (asked)`));
      if (prompt) {
        writer.history.expect(prompt);
        await writer.#append(prompt, 1, activity, (data) => data.bins && writer.history.add(data.bins));
        writer.history.settle(writer.info.position);
      }
      const speed = new Speed();
      const options = this.#options(activity);
      for await (const { event, data } of this.api.generate(writer.id, fields, options)) {
        if (event === "token") {
          turn.text += data.text;
          activity.rate = speed.at(data.position);
          turn.tokens += data.tokens.length;
          writer.history.addWritten(data.position - data.tokens.length, data.tokens.length, data.text);
        } else if (event === "done") {
          Object.assign(turn, {
            end: data.finish_reason,
            tokens: data.tokens.length,
            rate: data.tokens_per_second,
          });
          writer.info.position = data.position;
          writer.history.settle(data.position);
        }
        this.changed();
      }
    } catch (error) {
      if (!turn.text) this.turns.splice(this.turns.indexOf(turn), 1);
      turn.end = "cancelled";
      await this.api.cancel(writer.id).catch(() => {});
      if (!copy) {
        this.info = await this.api.session(this.id).catch(() => this.info);
        this.history.settle(this.info.position, false);
      }
      if (error.name !== "AbortError") throw error;
    } finally {
      if (writer !== this) await this.api.remove(writer.id).catch(() => {});
      await this.#end();
    }
    return turn;
  }

  /** Shows it passages of what it read once more, evenly spread over the text, and notes the losses. */
  async showAgain() {
    if (this.activity || this.kept?.running) return;
    this.kept ??= this.#passages();
    const kept = this.kept;
    kept.running = new AbortController();
    const todo = kept.order.filter((i) => kept.all[i].again === undefined).slice(0, AGAIN);
    kept.goal = kept.done + todo.length;
    this.changed();
    try {
      for (const i of todo) {
        Object.assign(kept.all[i], await this.#again(kept.all[i], kept.running.signal));
        kept.done += 1;
        this.changed();
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      kept.running = null;
      this.changed();
    }
  }

  #stopShowing() {
    this.kept?.running?.abort();
  }

  #passages() {
    const encoder = new TextEncoder();
    let [at, byte] = [0, 0];
    const text = this.history.text();
    const all = passages(text).map((own) => {
      const from = byte;
      byte += encoder.encode(own).length;
      at += own.length;
      const lead = text.slice(Math.max(0, at - own.length - RUN_UP), at - own.length).replace(/^\S*\s/, "");
      const { position, nll, frozen } = this.history.meanOfBytes(from, byte);
      return { text: own, lead, from, to: byte, position, first: nll, frozen };
    });
    all.forEach((passage, i) => {
      passage.end = all[i + 1]?.position ?? this.history.position;
    });
    const order = spread(all.length).filter((i) => all[i].first !== null && all[i].text.trim());
    return { all, order, done: 0, goal: 0, running: null };
  }

  async #again({ lead, text }, signal) {
    const { bins } = await this.api.score(this.id, { text: lead + text, bin: 1 }, { signal });
    const run = new History(bins.start[0]);
    const before = run.expect(lead);
    run.expect(text);
    run.add(bins);
    const { nll, frozen } = run.meanOfBytes(before, Infinity);
    return { again: nll, frozenAgain: frozen };
  }
}

/** Tokens a second over the last two seconds. */
class Speed {
  #seen = [];

  at(position) {
    const now = performance.now() / 1000;
    this.#seen.push([now, position]);
    while (this.#seen.length > 2 && now - this.#seen[0][0] > 2) this.#seen.shift();
    const [then, from] = this.#seen[0];
    return now - then > 0.25 ? (position - from) / (now - then) : null;
  }
}
