// What a session is asked and what it writes, as it comes.

import { $, announce, make, say } from "./dom.js";
import { formatRate, tokens } from "./figures.js";

const ENDS = { stop: "it came to an end", cancelled: "stopped" };

/** The column that lets the session go on. */
export class Writing {
  #reader = null;

  constructor(app) {
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      app.guard(() => this.#write());
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
    $("write-stop").addEventListener("click", () => this.#reader.stop());
  }

  show(reader) {
    this.#reader = reader;
    const writing = reader.activity?.kind === "writing";
    $("write").disabled = Boolean(reader.activity);
    $("write-stop").hidden = !writing;
    say(
      $("write-facts"),
      writing
        ? reader.activity.note || (reader.activity.rate ? `${formatRate(reader.activity.rate)} tokens/s` : "")
        : "",
    );
    showTurns($("output"), reader.turns, writing);
  }

  async #write() {
    const reader = this.#reader;
    const prompt = $("prompt").value;
    const fields = { max_tokens: number("max-tokens", 200), temperature: number("temperature", 0.8) };
    if ($("seed").value !== "") fields.seed = number("seed", 0);
    $("prompt").value = "";
    try {
      const turn = await reader.write(prompt, fields, { copy: $("aside").checked });
      announce(`${turn.copy ? "A copy continued" : "Continued"}: ${noteOf(turn)}.`);
    } catch (error) {
      if (!$("prompt").value) $("prompt").value = prompt;
      throw error;
    }
  }
}

function noteOf({ copy, tokens: count, rate, end }) {
  return [copy ? "by a copy" : "", tokens(count), rate ? `${formatRate(rate)} tokens/s` : "", ENDS[end] ?? ""]
    .filter(Boolean)
    .join(" · ");
}

/** The number in a field, or what it is otherwise. */
export function number(id, otherwise) {
  const value = $(id).valueAsNumber;
  return Number.isFinite(value) ? value : otherwise;
}

/** Puts turns into an element; of those that are there already only the text grows. */
export function showTurns(element, turns, live) {
  while (element.childElementCount > turns.length) element.lastElementChild.remove();
  turns.forEach((turn, i) => {
    let row = element.children[i];
    if (row?.turn !== turn) {
      const fresh = make(
        "div",
        { class: "turn" },
        make("span", { class: "prompt" }, turn.prompt),
        make("span", { class: "wrote" }),
        make("span", { class: "note-line" }),
      );
      fresh.turn = turn;
      if (row) row.replaceWith(fresh);
      else element.append(fresh);
      row = fresh;
    }
    const last = live && i === turns.length - 1;
    row.classList.toggle("live", last);
    say(row.children[1], turn.text);
    say(row.children[2], last ? "" : noteOf(turn));
  });
}
