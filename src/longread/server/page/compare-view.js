// Two sessions side by side: facts, one text scored by both, one beginning continued by both.

import { $, alarm, announce, keepingFocus, make, say } from "./dom.js";
import { comparePlot } from "./curves.js";
import { formatBytes, formatCount, formatLoss, formatPercent, formatSigned, formatTime } from "./figures.js";
import { History } from "./history.js";
import { Plot } from "./plot.js";
import { Reader } from "./reader.js";
import { distinct, originOf } from "./session-list.js";
import { showPlace } from "./session-view.js";
import { number, showTurns } from "./writing.js";

const FINE = 1 << 15; // characters up to which every token is asked for

export class CompareView {
  #histories = null;
  #running = null;
  #scoring = false;

  constructor(app) {
    this.app = app;
    this.plot = new Plot($("probe-plot"), (x) => this.#under(x));
    for (const side of ["a", "b"]) $(`compare-${side}`).addEventListener("change", () => this.#chosen());
    for (const [form, action] of [
      ["probe", () => this.#score()],
      ["both", () => this.#write()],
    ]) {
      $(form).addEventListener("submit", (event) => {
        event.preventDefault();
        app.guard(action);
      });
    }
    $("both-stop").addEventListener("click", () => this.#running?.forEach((writer) => writer.stop()));
  }

  /** Shows the sessions there are; `first` is chosen as A. */
  show(first = null) {
    const infos = this.app.infos();
    const wanted = [first ?? $("compare-a").value, $("compare-b").value];
    for (const side of ["a", "b"]) {
      $(`compare-${side}`).replaceChildren(
        ...infos.map((info) =>
          make("option", { value: info.id }, distinct(info)),
        ),
      );
    }
    const ids = infos.map((info) => info.id);
    const a = ids.includes(wanted[0]) ? wanted[0] : ids[0];
    const b = ids.includes(wanted[1]) && wanted[1] !== a ? wanted[1] : (ids.find((id) => id !== a) ?? a);
    $("compare-a").value = a ?? "";
    $("compare-b").value = b ?? "";
    this.#facts();
  }

  #chosen() {
    this.#histories = null;
    $("probe-plot").hidden = true;
    $("probe-under").hidden = true;
    say($("probe-facts"), "");
    for (const side of ["a", "b"]) $(`output-${side}`).replaceChildren();
    this.#facts();
  }

  #pair() {
    return ["a", "b"].map((side) => this.app.infos().find((info) => info.id === $(`compare-${side}`).value));
  }

  #facts() {
    const pair = this.#pair();
    const known = pair.every(Boolean);
    for (const id of ["probe-go", "both-go"]) $(id).disabled = !known;
    if (!known) {
      $("compare-facts").replaceChildren(
        make("tr", {}, make("td", { colSpan: 3 }, "There is no session yet; let one read a text first.")),
      );
      return;
    }
    for (const info of pair) {
      const reader = this.app.reader(info.id);
      if (!reader.loaded) reader.load().then(() => this.#facts(), alarm);
    }
    const seen = (info) => this.app.reader(info.id)?.history.recent().nll ?? null;
    const rows = [
      ["Read", (info) => `${formatCount(info.position)} tokens`],
      ["Mean loss while reading", (info) => formatLoss(seen(info))],
      ["Learns", (info) => (info.learn ? "yes" : "no")],
      [
        "Steps",
        (info) => formatCount(info.steps) + (info.rolled_back ? `, ${formatCount(info.rolled_back)} rolled back` : ""),
      ],
      ["Weights moved by", (info) => formatPercent(info.drift)],
      ["Size", (info) => formatBytes(info.nbytes)],
      ["Made", (info) => formatTime(info.created)],
      ["Origin", (info) => originOf(info, this.app.infos()) || "–"],
      ["Id", (info) => info.id],
    ];
    $("compare-facts").replaceChildren(
      ...rows.map(([name, value]) =>
        make("tr", {}, make("th", { scope: "row" }, name), ...pair.map((info) => make("td", {}, value(info)))),
      ),
    );
  }

  async #score() {
    const text = $("probe-text").value;
    if (!text) {
      $("probe-text").focus();
      throw new Error("There is no text yet; paste one to score.");
    }
    if (this.#scoring) return;
    this.#scoring = true; // the button stays as it is, and keeps the focus
    say($("probe-facts"), "Scoring …");
    try {
      const sessions = this.#pair().map((info) => info.id);
      const { readings } = await this.app.api.compare({ sessions, text, bin: text.length <= FINE ? 1 : 16 });
      this.#histories = readings.map(({ bins, start }) => {
        const history = new History(start);
        history.expect(text);
        history.add(bins);
        return history;
      });
      $("probe-plot").hidden = false;
      this.#under(null);
      this.plot.show(comparePlot(this.#histories, $("compare-view").clientWidth < 520));
      const [a, b] = readings.map((reading) => reading.nll);
      say($("probe-facts"), `A ${formatLoss(a)}, B ${formatLoss(b)} nats per token; B − A ${formatSigned(b - a)}`);
    } catch (error) {
      say($("probe-facts"), "");
      throw error;
    } finally {
      this.#scoring = false;
    }
  }

  #under(x) {
    const history = this.#histories?.[0];
    $("probe-under").hidden = !history;
    if (!history || x === null) {
      say($("probe-under"), "Point at the plot to see the text there.");
      return;
    }
    showPlace($("probe-under"), history, x + history.first);
  }

  #writing(now) {
    keepingFocus(() => {
      $("both-go").disabled = now;
      $("both-stop").hidden = !now;
    });
  }

  async #write() {
    const prompt = $("both-prompt").value;
    const fields = { max_tokens: number("both-tokens", 200), temperature: 0.8, seed: number("both-seed", 0) };
    const writers = this.#pair().map((info) => new Reader(this.app.api, { ...info }));
    this.#running = writers;
    this.#writing(true);
    writers.forEach((writer, i) => {
      const output = $(`output-${"ab"[i]}`);
      writer.addEventListener("change", () => showTurns(output, writer.turns, Boolean(writer.activity)));
    });
    try {
      const done = await Promise.allSettled(writers.map((writer) => writer.write(prompt, fields, { copy: true })));
      const failed = done.find((result) => result.status === "rejected");
      if (failed) throw failed.reason;
      announce("Both have written.");
    } finally {
      this.#running = null;
      this.#writing(false);
    }
  }
}
