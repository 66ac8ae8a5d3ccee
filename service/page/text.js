// Numbers and tokens as a person reads them.

import { h } from "./dom.js";

/** A probability in six characters, so that columns align: 0.7741, or 3.1e-5 where four decimals would lose it. */
export function probability(p) {
  return p === 0 || p >= 0.001 ? p.toFixed(4) : p.toExponential(1);
}

/** Four significant digits: 1.000, 415.2, 2012. */
export function significant(value) {
  return value >= 1000 ? Math.round(value).toString() : value.toPrecision(4);
}

export function milliseconds(ms) {
  return ms < 10 ? ms.toFixed(2) : ms < 100 ? ms.toFixed(1) : ms.toFixed(0);
}

const MARKS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
// Runs of one blank or control character, and everything between them.
const PIECES = /([\s\p{C}])\1*|[^\s\p{C}]+/gu;

/** A token with its blanks made visible, as nodes: "\n        if" is ↵ ␣×8 if. Bytes that are no text are in hex. */
export function visible({ text, bytes }) {
  if (bytes) return [mark(bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" "))];
  if (text === "") return [mark("∅")];
  return [...text.matchAll(PIECES)].map(([piece, blank]) => {
    if (blank === undefined) return piece;
    const sign = MARKS[blank] ?? `U+${blank.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    const count = [...piece].length;
    return mark(count <= 3 ? sign.repeat(count) : `${sign}×${count}`);
  });
}

const mark = (text) => h("span", { class: "mark" }, text);
