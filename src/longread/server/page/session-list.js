// The list of sessions: what each is called and has read, when it was used, what it was forked from; and what is lost.

import { $, fragment, make, say } from "./dom.js";
import { formatCount, formatTime, shortId, tokens } from "./figures.js";

const NAMELESS = "Without a name";

/** What a session is called. */
export const nameOf = (info) => info.label || NAMELESS;

/** A session in so few words that it is no other: its name, what it has read, when it was used, its id. */
export const distinct = (info) =>
  [nameOf(info), formatCount(info.position), formatTime(info.used), shortId(info.id)].join("  ·  ");

/** What a session was forked from, in words; nothing if it was not. */
export function originOf({ parent }, infos) {
  if (!parent) return "";
  const there = infos.find((info) => info.id === parent);
  return `fork of ${there ? `${nameOf(there)}, ` : ""}${shortId(parent)}`;
}

/** What is lost of one session, in words. */
export function lossOf({ position, restored }) {
  if (!restored) return `it is lost, and had read ${tokens(position)}`;
  if (restored >= position) return `what it read after its first ${tokens(restored)} is lost`; // nobody knows how much
  return `its last ${tokens(position - restored)} of ${formatCount(position)} are lost`;
}

/** Shows the readers in their order, and what the server could not restore. */
export function showSessions(readers, lost) {
  $("no-sessions").hidden = readers.length + lost.length > 0;
  say($("toggle-list"), readers.length ? `Sessions (${readers.length})` : "Sessions");
  const list = $("sessions");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  while (list.childElementCount > readers.length) list.lastElementChild.remove();
  const infos = readers.map((reader) => reader.info);
  readers.forEach((reader, i) => showRow(list.children[i] ?? list.appendChild(newRow()), reader, infos));
  if (focused && document.activeElement?.dataset.id !== focused)
    list.querySelector(`button[data-id="${CSS.escape(focused)}"]`)?.focus(); // rows have changed places
  showLost(lost, infos);
}

const PARTS = ["who", "what", "which", "origin"];
const newRow = () => make("li", {}, make("button", { type: "button" }, ...PARTS.map((part) => make("span", { class: part }))));

function showRow(row, { info, activity, history }, infos) {
  const [button] = row.children;
  const [who, what, which, origin] = button.children;
  const doing = { reading: `reading, ${formatCount(history.position)}`, writing: "writing" }[activity?.kind];
  button.dataset.id = info.id;
  say(who, nameOf(info));
  say(what, (doing ?? tokens(info.position)) + (info.learn ? "" : " · frozen"));
  say(which, `${formatTime(info.used)} · ${shortId(info.id)}`);
  say(origin, originOf(info, infos));
  origin.hidden = !info.parent;
  if (info.id === fragment()) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
}

function showLost(lost, infos) {
  $("lost").hidden = !lost.length;
  const signature = JSON.stringify([lost, infos.filter(({ id }) => lost.some((one) => one.id === id)).map(nameOf)]);
  if ($("lost").dataset.signature === signature) return;
  $("lost").dataset.signature = signature;
  const rows = lost.map((one) => {
    const info = infos.find(({ id }) => id === one.id);
    return make(
      "li",
      {},
      make("strong", {}, info ? `${nameOf(info)}, ${shortId(one.id)}` : shortId(one.id)),
      `: ${lossOf(one)}. `,
      make("span", { class: "soft" }, one.reason),
    );
  });
  $("lost-sessions").replaceChildren(...rows);
}
