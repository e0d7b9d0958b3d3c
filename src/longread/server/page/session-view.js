// One session on the screen: its name and facts, the text that goes in, the curves that come out.

import { $, alarm, announce, calmly, keepingFocus, make, say } from "./dom.js";
import { readingPlot } from "./curves.js";
import {
  binWidth,
  fileName,
  formatBytes,
  formatCount,
  formatLoss,
  formatPercent,
  formatRate,
  formatSeconds,
  formatSigned,
  formatTime,
  titleOf,
  tokens,
} from "./figures.js";
import { resample } from "./history.js";
import { Plot, spark } from "./plot.js";
import { lossOf, nameOf, originOf } from "./session-list.js";
import { Taught } from "./taught.js";
import { Writing } from "./writing.js";

const NEWEST = 512; // tokens of "loss now"
const LARGEST = 1 << 28; // bytes of a file that a browser can be asked to hold
const SOURCES = ["history.js", "figures.js", "plot.js"];

export class SessionView {
  #reader = null;
  #file = null; // { name, text }

  constructor(app) {
    this.app = app;
    this.plot = new Plot($("plot"), (x) => this.#under(x));
    this.taught = new Taught(app, (passage) => this.#choose(passage));
    this.writing = new Writing(app);
    this.draw = calmly(() => this.#draw());
    $("compose").addEventListener("submit", (event) => {
      event.preventDefault();
      app.guard(() => this.#read());
    });
    $("stop").addEventListener("click", () => this.#reader?.stop());
    $("choose").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => app.guard(() => this.take($("file").files[0])));
    $("chip-remove").addEventListener("click", () => this.#setFile(null));
    $("sample").addEventListener("click", () => app.guard(() => this.#sample()));
    $("label").addEventListener("change", () =>
      app.guard(() => this.#reader?.change({ label: $("label").value.trim() })),
    );
    $("label").addEventListener("keydown", (event) => event.key === "Enter" && $("label").blur());
    $("learn").addEventListener("change", () => app.guard(() => this.#reader?.change({ learn: $("learn").checked })));
    $("numbers").addEventListener("toggle", () => this.#rows());
  }

  /** Shows a session, or the empty sheet for a new one. */
  set reader(reader) {
    this.#reader?.removeEventListener("change", this.draw);
    this.#reader = reader;
    reader?.addEventListener("change", this.draw);
    this.plot.cursor(null);
    $("label").value = reader?.info.label ?? "";
    this.#draw();
    this.follow();
  }

  /** Shows what the server says of the session by now, and the losses of what was read elsewhere. */
  follow() {
    if (!this.#reader || this.#reader.activity) return;
    this.draw();
    this.#reader.load().catch(alarm);
  }

  get reader() {
    return this.#reader;
  }

  /** A file was dropped or chosen. */
  async take(file) {
    $("file").value = "";
    if (!file) return;
    if (file.size > LARGEST)
      throw new Error(
        `${file.name} has ${formatBytes(file.size)}; this page takes up to ${formatBytes(LARGEST)}, longread read takes more.`,
      );
    const bytes = new Uint8Array(await file.arrayBuffer());
    let text = "";
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
      throw new Error(`${file.name} is not UTF-8 text; convert it to a text file first.`);
    }
    if (text.includes("\0")) throw new Error(`${file.name} is not a text; it holds zero bytes.`);
    if (!text) throw new Error(`${file.name} is empty; give a text of at least one character.`);
    this.#setFile({ name: file.name, text });
    announce(`${file.name} is ready to be read.`);
    $("read").focus();
  }

  #setFile(file) {
    this.#file = file;
    keepingFocus(() => {
      $("text").hidden = Boolean(file);
      $("chip").hidden = !file;
    });
    if (!file) return;
    say($("chip-name"), file.name);
    say($("chip-size"), formatBytes(new Blob([file.text]).size));
  }

  async #sample() {
    const texts = await Promise.all(SOURCES.map(async (name) => (await fetch(new URL(name, import.meta.url))).text()));
    this.#setFile({ name: "This page’s source", text: texts.join("\n") });
    $("read").focus();
  }

  async #read() {
    const file = this.#file;
    const text = file?.text ?? $("text").value;
    if (!text) {
      $("text").focus();
      throw new Error("There is no text yet; paste one, or choose a file.");
    }
    const reader =
      this.#reader ?? (await this.app.create({ label: file?.name ?? titleOf(text), compare: $("twin").checked }));
    const from = reader.info.position;
    const begun = performance.now();
    this.#setFile(null);
    $("text").value = "";
    const reading = reader.read(text);
    this.#draw();
    $("stop").focus();
    try {
      await reading;
    } catch (error) {
      if (reader.info.position === from && this.#reader === reader) $("text").value = text;
      throw error;
    }
    const read = reader.info.position - from;
    reader.spent = { tokens: read, seconds: (performance.now() - begun) / 1000 };
    announce(
      `Read ${tokens(read)} in ${formatSeconds(reader.spent.seconds)}. Mean loss ${formatLoss(reader.history.recent().nll)} nats per token.`,
    );
    reader.changed();
    await reader.showAgain();
  }

  #draw() {
    keepingFocus(() => this.#show());
  }

  #show() {
    const reader = this.#reader;
    const reading = reader?.activity?.kind === "reading";
    $("session-view").classList.toggle("draft", !reader);
    for (const id of ["head", "writing"]) $(id).hidden = !reader;
    for (const id of ["hero", "draft-options", "sample"]) $(id).hidden = Boolean(reader);
    $("compose-title").hidden = !reader;
    $("compose").hidden = reading;
    $("read").disabled = Boolean(reader?.activity);
    const curve = Boolean(reader) && (reader.history.length > 0 || reading);
    $("watch").hidden = !curve;
    $("no-curve").hidden = !reader?.loaded || curve || reader.info.position === 0;
    if (!reader) {
      $("taught").hidden = true;
      document.title = "Longread";
      return;
    }
    this.#head(reader);
    if (curve) this.#watch(reader, reading);
    this.taught.show(reader);
    this.writing.show(reader);
  }

  #head({ info, activity }) {
    say($("heading"), info.label || "Session without a name");
    const identity = [`Session ${info.id}`, `made ${formatTime(info.created)}`, `used ${formatTime(info.used)}`];
    const lost = this.app.lost.find(({ id }) => id === info.id);
    say($("identity"), [...identity, originOf(info, this.app.infos())].filter(Boolean).join("  ·  "));
    $("loss").hidden = !lost;
    if (lost) say($("loss"), `Of this session ${lossOf(lost)}. ${lost.reason}.`);
    if (document.activeElement !== $("label")) $("label").value = info.label;
    $("label").placeholder = nameOf({});
    const facts = [
      `${formatBytes(info.nbytes)} ${{ device: "on the device", host: "in memory", disk: "on disk" }[info.tier] ?? ""}`,
    ];
    if (activity) facts.push({ reading: "reading …", writing: "writing …" }[activity.kind]);
    else
      facts.push(
        `${formatCount(info.steps)} ${info.steps === 1 ? "step" : "steps"}`,
        `weights moved by ${formatPercent(info.drift)}`,
      );
    if (!activity && !this.#reader.history.length) facts.unshift(tokens(info.position));
    if (info.rolled_back) facts.push(`${formatCount(info.rolled_back)} rolled back`);
    say($("facts"), facts.join("  ·  "));
    $("learn").checked = info.learn;
    for (const id of ["fork", "save", "delete", "learn"]) $(id).disabled = Boolean(activity);
    const share = activity?.kind === "reading" ? `${formatPercent(Math.floor(100 * activity.share) / 100)} · ` : "";
    document.title = `${share}${info.label || "Session"} · Longread`;
  }

  #watch(reader, reading) {
    const { history, activity } = reader;
    const { nll } = history.recent(NEWEST);
    const all = history.recent();
    say($("figure-position"), formatCount(history.position));
    say($("figure-loss"), formatLoss(reading ? nll : all.nll));
    say($("figure-loss-of"), reading ? `Loss, newest ${NEWEST}` : "Mean loss");
    say($("figure-gain"), formatSigned(all.gain));
    const { tokens: count, seconds } = reader.spent ?? {};
    say($("figure-rate"), formatRate(reading ? activity.rate : count / seconds));
    spark($("spark"), reader.rates);
    $("progress").hidden = !reading;
    const narrow = $("reading").clientWidth < 520;
    let end = history.position;
    if (reading) {
      $("bar").value = activity.share;
      say($("progress-text"), activity.note || formatPercent(Math.floor(100 * activity.share) / 100));
      end = Math.max(end, expectedEnd(reader));
    }
    this.plot.show(readingPlot(history, end, reader.kept, narrow));
    this.#rows();
  }

  #under(x) {
    const history = this.#reader?.history;
    $("under").hidden = !history?.length;
    if (x === null || !history?.length) say($("under"), "Point at the plot to see the text there.");
    else showPlace($("under"), history, x);
  }

  #choose(passage) {
    for (const other of this.#reader.kept?.all ?? []) other.chosen = other === passage;
    this.plot.cursor(passage ? passage.position : null);
    this.draw();
  }

  #rows() {
    const history = this.#reader?.history;
    if (!$("numbers").open || !history) return;
    const width = binWidth(Math.max(1, history.position - history.first), 32);
    const rows = resample(history, width).map(({ start, end, nll, frozen, gain }) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, `${formatCount(start)}–${formatCount(end)}`),
        ...[formatLoss(nll), formatLoss(frozen), formatSigned(gain)].map((text) => make("td", {}, text)),
      ),
    );
    $("rows").replaceChildren(...rows);
  }
}

/** Where the text will end if it goes on as it began: so the axis stays as it is. */
function expectedEnd({ activity, history }) {
  return activity.share > 0 ? activity.from + (history.position - activity.from) / activity.share : history.position;
}

/** Shows the text around a position, its word marked. */
export function showPlace(element, history, position) {
  if (!history.around(position).join("")) return say(element, "This tab has not seen the text there.");
  const [before, after] = history.around(position).map((text) => text.replace(/\s+/g, " "));
  const [head] = /\S*$/.exec(before);
  const [tail] = /^\S*/.exec(after);
  element.replaceChildren(
    `… ${before.slice(0, before.length - head.length)}`,
    make("mark", {}, head + tail),
    `${after.slice(tail.length)} …`,
  );
}

/** Gives the browser a file to keep. */
export function download(blob, label) {
  const link = make("a", { href: URL.createObjectURL(blob), download: fileName(label) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
