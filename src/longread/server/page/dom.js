// The page's elements. Text goes in as text, never as markup.

/** The element of an id that index.html has. */
export const $ = (id) => document.getElementById(id);

/** An element with properties and children; a child that is a string becomes text. */
export function make(name, properties = {}, ...children) {
  const { class: className, ...rest } = properties;
  const element = document.createElement(name);
  if (className) element.className = className;
  for (const [key, value] of Object.entries(rest)) {
    if (key.includes("-") || key === "role" || key === "scope") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element of a picture, SVG, with attributes and children. */
export function draw(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Sets text only where it differs, so that nothing is announced or laid out for no reason. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** What the address names after its #; as it stands where it is no valid escape. */
export function fragment() {
  const raw = location.hash.slice(1);
  try {
    return decodeURIComponent(raw);
  } catch {
    return raw;
  }
}

const usable = (element) => element.checkVisibility() && !element.disabled;

/**
 * Runs `change`. Where that hides, disables or removes what has the focus, the focus does not fall back to the top of
 * the page: a control of the same bar takes it, or else the heading of the part where it was.
 */
export function keepingFocus(change) {
  const before = document.activeElement;
  const parts = [];
  for (let part = before?.parentElement; part; part = part.parentElement) parts.push(part);
  change();
  if (!parts.length || before === document.body || (before.isConnected && usable(before))) return;
  for (const part of parts.filter((candidate) => candidate.isConnected && candidate.checkVisibility())) {
    const bar = part.matches(".bar, .sheet, #alerts");
    const next = [...part.querySelectorAll(bar ? "button, textarea" : "h1, h2")].find(usable);
    if (!next) continue;
    if (!bar) next.tabIndex = -1;
    next.focus({ preventScroll: true });
    return;
  }
}

/** Tells screen readers, politely. */
export function announce(text) {
  $("announcer").textContent = "";
  setTimeout(() => say($("announcer"), text), 50);
}

/** Shows what went wrong until it is dismissed. */
export function alarm(error) {
  if (error?.name === "AbortError") return;
  const text = error.message;
  if (error.name !== "ApiError" && error.constructor !== Error) console.error(error); // a fault of the page itself
  const close = make("button", { class: "quiet", type: "button", "aria-label": "Dismiss this message" }, "Dismiss");
  const note = make("div", { class: "note" }, make("p", {}, text), close);
  close.addEventListener("click", () => keepingFocus(() => note.remove()));
  const notes = $("alerts");
  for (const other of notes.querySelectorAll("p")) if (other.textContent === text) other.parentElement.remove();
  notes.append(note);
  while (notes.childElementCount > 3) notes.firstElementChild.remove();
}

export const clearAlarms = () => keepingFocus(() => $("alerts").replaceChildren());

/** Runs `draw` at most once a frame, and about ten times a second. */
export function calmly(draw) {
  let [asked, last] = [false, 0];
  return () => {
    if (asked) return;
    asked = true;
    const wait = Math.max(0, last + 90 - performance.now());
    setTimeout(
      () =>
        requestAnimationFrame(() => {
          asked = false;
          last = performance.now();
          draw();
        }),
      wait,
    );
  };
}

/** Opens a dialog; resolves to whether it was confirmed. Escape is a no, and focus goes back where it was. */
export function confirmed(dialog, cancel) {
  const form = dialog.querySelector("form");
  return new Promise((resolve) => {
    let answer = false;
    const yes = (event) => {
      event.preventDefault();
      answer = true;
      dialog.close();
    };
    const no = () => dialog.close();
    form.addEventListener("submit", yes);
    cancel.addEventListener("click", no);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", yes);
        cancel.removeEventListener("click", no);
        resolve(answer);
      },
      { once: true },
    );
    dialog.showModal();
  });
}
