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

/** +2.1 % of the ratio 1.021. */
export function percent(ratio) {
  const points = (Math.round((ratio - 1) * 1000) / 10 + 0).toFixed(1);
  return `${points.startsWith("-") ? "" : "+"}${points} %`;
}

/** +2.1 % [1.2, 3.0] of {ratio, low, high}; a dash where it was not measured. */
export function interval(measure) {
  if (measure?.ratio == null) return "–";
  const end = (ratio) => (Math.round((ratio - 1) * 1000) / 10 + 0).toFixed(1);
  const { ratio, low, high } = measure;
  return `${percent(ratio)} ${low == null || high == null ? "[open]" : `[${end(low)}, ${end(high)}]`}`;
}

/** 2026-11-21 22:00 UTC, of what the API has in ISO 8601. */
export const when = (iso) => iso.replace("T", " ").replace(/:\d\d(\.\d+)?(\+00:00|Z)$/, " UTC");

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
