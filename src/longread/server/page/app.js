// The page: which sessions there are, which one is looked at, and what is done to it.

import { Api } from "./api.js";
import { CompareView } from "./compare-view.js";
import { $, alarm, announce, clearAlarms, confirmed, fragment, keepingFocus, say } from "./dom.js";
import { formatCount, shortId, tokens } from "./figures.js";
import { Reader } from "./reader.js";
import { lossOf, nameOf, showSessions } from "./session-list.js";
import { SessionView, download } from "./session-view.js";

const LABEL = 200; // characters of a name

class App {
  #readers = new Map();
  #order = [];

  constructor() {
    this.api = new Api();
    this.lost = [];
    this.view = new SessionView(this);
    this.compare = new CompareView(this);
    this.#listen();
  }

  infos = () => this.#order.map((id) => this.#readers.get(id).info);
  reader = (id) => this.#readers.get(id);

  async start() {
    await this.guard(async () => {
      const { data } = await this.api.models();
      const [model] = data;
      const every = model.mini_batch_size ? `, learns every ${formatCount(model.mini_batch_size)} tokens` : "";
      $("model").replaceChildren(model.id + every);
      await this.#refresh();
      this.api.ready = true;
    });
    this.#route();
  }

  /** A session that has read nothing yet, on the server and on the screen. */
  async create(fields) {
    const info = await this.api.create(fields);
    return this.#open(new Reader(this.api, info));
  }

  #open(reader) {
    this.#add(reader);
    this.#go(`#${reader.id}`);
    return reader;
  }

  #add(reader) {
    this.#readers.set(reader.id, reader);
    this.#order = [reader.id, ...this.#order.filter((id) => id !== reader.id)];
    reader.addEventListener("change", () => this.#list());
    this.#list();
  }

  #go(hash) {
    if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
    this.#route();
  }

  #route() {
    keepingFocus(() => this.#show());
  }

  #show() {
    const id = fragment();
    const comparing = id === "compare" || id.startsWith("compare-");
    $("compare-view").hidden = !comparing;
    $("session-view").hidden = comparing;
    if (comparing) {
      document.title = "Compare · Longread";
      this.compare.show(id.slice("compare-".length) || null);
    } else {
      this.view.reader = this.#readers.get(id) ?? null;
      if (id && !this.view.reader && this.api.ready) this.#missing(id);
    }
    $("side").classList.remove("open");
    $("toggle-list").setAttribute("aria-expanded", "false");
    this.#list();
  }

  #missing(id) {
    const lost = this.lost.find((one) => one.id === id);
    alarm(
      new Error(
        lost
          ? `Of session ${shortId(id)} nothing is left: ${lossOf(lost)}. ${lost.reason}.`
          : `There is no session ${id.slice(0, 40)}; it may have been deleted. Choose another, or read a text.`,
      ),
    );
  }

  async #refresh() {
    const { data: infos, lost } = await this.api.sessions();
    this.lost = lost;
    const there = new Set(infos.map((info) => info.id));
    for (const info of infos) {
      const known = this.#readers.get(info.id);
      if (!known) this.#add(new Reader(this.api, info));
      else if (!known.activity) known.info = info;
    }
    for (const id of [...this.#readers.keys()])
      if (!there.has(id) && !this.#readers.get(id).activity) this.#readers.delete(id);
    this.#order = infos.map((info) => info.id).filter((id) => this.#readers.has(id));
    for (const id of this.#readers.keys()) if (!this.#order.includes(id)) this.#order.unshift(id);
    this.#list();
    this.view.follow();
  }

  #list() {
    showSessions(
      this.#order.map((id) => this.#readers.get(id)),
      this.lost,
    );
  }

  #listen() {
    addEventListener("hashchange", () => this.#route());
    addEventListener("focus", () => this.api.ready && this.#refresh().catch(() => {}));
    const on = (id, action) => $(id).addEventListener("click", () => this.guard(action));
    on("new", () => this.#go(""));
    on("open-compare", () => this.#go("#compare"));
    on("compare-this", () => this.#go(`#compare-${this.view.reader.id}`));
    on("open-key", () => this.#askKey());
    on("fork", () => this.#fork());
    on("save", () => this.#save());
    on("delete", () => this.#delete());
    on("restore", () => $("restore-file").click());
    $("restore-file").addEventListener("change", () => this.guard(() => this.#restore($("restore-file").files[0])));
    $("sessions").addEventListener("click", (event) => {
      const id = event.target.closest("button")?.dataset.id;
      if (id) this.guard(() => this.#go(`#${id}`));
    });
    $("toggle-list").addEventListener("click", () => {
      const open = $("side").classList.toggle("open");
      $("toggle-list").setAttribute("aria-expanded", String(open));
    });
    addEventListener("beforeunload", (event) => {
      if ([...this.#readers.values()].some((reader) => reader.activity)) event.preventDefault();
    });
    let over = null;
    const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    addEventListener("dragover", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      $("drop-hint").hidden = false;
      clearTimeout(over);
      over = setTimeout(() => ($("drop-hint").hidden = true), 300);
    });
    addEventListener("drop", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      $("drop-hint").hidden = true;
      if (!$("compare-view").hidden) this.#go("");
      this.guard(() => this.view.take(event.dataTransfer.files[0]));
    });
  }

  /** Runs an action; a missing key is asked for, anything else that goes wrong is shown. */
  async guard(action) {
    clearAlarms();
    try {
      await action();
    } catch (error) {
      if (
        error.status === 401 &&
        (await this.#askKey(this.api.key ? "The server does not know this key." : "This server wants a key."))
      )
        return;
      alarm(error);
    }
  }

  async #askKey(why = "A server that has keys wants one.") {
    say($("key-about"), `${why} It stays in this tab, and is forgotten when you close it.`);
    $("key").value = this.api.key;
    if (!(await confirmed($("key-dialog"), $("key-cancel")))) return false;
    const key = $("key").value.trim();
    $("key").value = "";
    if (/[^\x21-\x7e]/.test(key)) return this.#askKey("A key has neither spaces nor letters beyond a to z.");
    this.api.key = key;
    await this.start();
    return true;
  }

  async #fork() {
    const { reader } = this.view;
    const info = await this.api.fork(reader.id, forkName(reader.info.label).slice(0, LABEL));
    const fork = new Reader(this.api, info);
    fork.history = reader.history.copy();
    fork.loaded = reader.loaded;
    fork.turns = reader.turns.map((turn) => ({ ...turn }));
    fork.kept = reader.kept && {
      ...reader.kept,
      running: null,
      all: reader.kept.all.map((passage) => ({ ...passage })),
    };
    this.#open(fork);
    announce(`Forked. You are looking at the fork, ${info.label}.`);
  }

  async #save() {
    const { reader } = this.view;
    announce("Saving …");
    download(await this.api.file(reader.id), reader.info.label);
    announce("Saved to a file.");
  }

  async #restore(file) {
    $("restore-file").value = "";
    if (!file) return;
    const info = await this.api.restore(file, file.name.replace(/\.(session|safetensors)$/i, "").slice(0, LABEL));
    this.#open(new Reader(this.api, info));
    announce(`Restored ${info.label}, ${tokens(info.position)}.`);
  }

  async #delete() {
    const { reader } = this.view;
    say(
      $("delete-about"),
      `“${nameOf(reader.info)}”, ${shortId(reader.id)}, has read ${tokens(reader.info.position)}. They cannot be had back.`,
    );
    if (!(await confirmed($("delete-dialog"), $("delete-cancel")))) return;
    reader.kept?.running?.abort();
    await this.api.remove(reader.id);
    this.#readers.delete(reader.id);
    this.#order = this.#order.filter((id) => id !== reader.id);
    this.#go("");
    announce("Deleted.");
  }
}

function forkName(label) {
  const [, name, number] = /^(.*?)(?:, fork(?: (\d+))?)?$/s.exec(label);
  return label === name ? `${name}, fork` : `${name}, fork ${Number(number ?? 1) + 1}`;
}

new App().start();
