// The server's API: JSON calls, event streams, waiting when it is busy. The key lives in this tab only.

import { EventParser } from "./events.js";

const STORED = "longread-key";
const ATTEMPTS = 6;
const LONGEST_WAIT = 30; // seconds

/** What the server refused, in its own words. `status` 0: it could not be reached; `wait`: seconds until it may do it. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, wait });
  }
}

/** Calls relative to the address that the page came from, so that it works behind a prefix. */
export class Api {
  #key = "";

  constructor(base = document.baseURI) {
    this.base = base;
    try {
      this.#key = sessionStorage.getItem(STORED) ?? "";
    } catch {
      // storage is off: the key lasts as long as the page
    }
  }

  get key() {
    return this.#key;
  }

  set key(key) {
    this.#key = key;
    try {
      if (key) sessionStorage.setItem(STORED, key);
      else sessionStorage.removeItem(STORED);
    } catch {
      // as above
    }
  }

  /** One call. Waits and tries again on 429 and 503; `onWait(seconds)` is told. */
  async call(method, path, { json, body, query, signal, onWait } = {}) {
    const url = new URL(path, this.base);
    for (const [name, value] of Object.entries(query ?? {})) url.searchParams.set(name, value);
    const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
    if (json !== undefined) headers["Content-Type"] = "application/json";
    else if (body !== undefined) headers["Content-Type"] = "application/octet-stream";
    for (let attempt = 1; ; attempt += 1) {
      const response = await this.#fetch(url, {
        method,
        headers,
        body: json === undefined ? body : JSON.stringify(json),
        signal,
      });
      if (response.ok) return response;
      const error = await refusal(response);
      if (error.wait === null || attempt === ATTEMPTS) throw error;
      onWait?.(error.wait);
      await pause(error.wait, signal);
    }
  }

  async #fetch(url, options) {
    try {
      return await fetch(url, { ...options, cache: "no-store", credentials: "omit", redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached; check that it runs, then try again.");
    }
  }

  async json(method, path, options) {
    return (await this.call(method, path, options)).json();
  }

  /** The events of a streamed answer, as { event, data }; an `error` event is thrown. */
  async *events(path, json, { signal, onWait } = {}) {
    const response = await this.call("POST", path, { json: { ...json, stream: true }, signal, onWait });
    const parser = new EventParser();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        for (const { event, data } of parser.push(value)) {
          const content = JSON.parse(data);
          if (event === "error") throw fromBody(content, response.status);
          yield { event, data: content };
          if (event === "done") return;
        }
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError("The connection to the server broke while it answered.");
    } finally {
      reader.cancel().catch(() => {});
    }
    throw new ApiError("The server ended its answer too early.");
  }

  models = () => this.json("GET", "v1/models");
  sessions = () => this.json("GET", "v1/sessions");
  losses = (id) => this.json("GET", at(id, "losses"));
  session = (id) => this.json("GET", at(id));
  create = (fields) => this.json("POST", "v1/sessions", { json: fields });
  change = (id, fields) => this.json("PATCH", at(id), { json: fields });
  remove = (id) => this.json("DELETE", at(id));
  fork = (id, label) => this.json("POST", at(id, "fork"), { json: { label } });
  cancel = (id) => this.json("POST", at(id, "cancel"));
  append = (id, fields, options) => this.events(at(id, "append"), fields, options);
  generate = (id, fields, options) => this.events(at(id, "generate"), fields, options);
  score = (id, fields, options) => this.json("POST", at(id, "score"), { json: fields, ...options });
  compare = (fields, options) => this.json("POST", "v1/sessions/compare", { json: fields, ...options });
  file = async (id) => (await this.call("GET", at(id, "file"))).blob();
  restore = (file, label) => this.json("POST", "v1/sessions/restore", { body: file, query: { label } });
}

const at = (id, action = "") => `v1/sessions/${encodeURIComponent(id)}${action && `/${action}`}`;

async function refusal(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // not ours: a proxy's page, say
  }
  const error = fromBody(body, response.status);
  const busy = (response.status === 429 && error.code !== "insufficient_quota") || response.status === 503;
  if (busy) error.wait = Math.min(LONGEST_WAIT, Math.max(1, Number(response.headers.get("Retry-After")) || 1));
  return error;
}

function fromBody(body, status) {
  const error = body?.error ?? body ?? {};
  const message = typeof error.message === "string" ? error.message : `The server answered with status ${status}.`;
  return new ApiError(sentence(message), { status, code: error.code ?? null });
}

/** The server's messages begin with a small letter, as on a command line. */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}
