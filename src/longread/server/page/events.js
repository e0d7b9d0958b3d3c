// Server-sent events, taken from pieces of text that may end anywhere. Pure.

/** Collects pieces; gives the events that are complete, as { event, data }. */
export class EventParser {
  #rest = "";

  push(piece) {
    const text = this.#rest + piece;
    const held = text.endsWith("\r") ? "\r" : ""; // its line feed may come with the next piece
    const blocks = text
      .slice(0, text.length - held.length)
      .replace(/\r\n?/g, "\n")
      .split("\n\n");
    this.#rest = blocks.pop() + held;
    return blocks.map(parse).filter((found) => found.data !== null);
  }
}

function parse(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    if (colon === 0) continue; // a comment that keeps the connection alive
    const [name, value] = colon < 0 ? [line, ""] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
    if (name === "event") event = value;
    else if (name === "data") data.push(value);
  }
  return { event, data: data.length ? data.join("\n") : null };
}
