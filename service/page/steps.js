// Tokens put behind the prompt one by one. They are kept as ids: the same text typed may be cut into other tokens.

import { detokenize, tokenize } from "./api.js";

const remembered = new Map(); // of a tokenizer's answers, which never change

function once(key, ask) {
  if (!remembered.has(key)) {
    remembered.set(key, ask().catch((error) => (remembered.delete(key), Promise.reject(error))));
  }
  return remembered.get(key);
}

const idsOf = (prompt, model) => once(JSON.stringify([model, prompt]), () => tokenize({ model, prompt }));
const textOf = (ids, model) => once(JSON.stringify([model, ids]), () => detokenize({ model, tokens: ids }));

/** `prompt` and the ids `steps` after it, by the tokenizer of `model`: all ids, the whole text, each step's own text. */
export async function grown(prompt, steps, model) {
  const { tokens } = await idsOf(prompt, model);
  const ids = [...tokens, ...steps];
  const [before, after, ...each] = await Promise.all(
    [tokens, ids, ...steps.map((id) => [id])].map((some) => textOf(some, model)));
  // Only what was added is taken: a tokenizer may put a token of its own before the prompt.
  const whole = after.prompt.startsWith(before.prompt) ? prompt + after.prompt.slice(before.prompt.length) : after.prompt;
  return { ids, text: whole, each: each.map(({ prompt: text, bytes }) => ({ text, bytes })) };
}

/** `" None", self, 17` as the API's `tokens`: texts in quotes or bare, and ids. Throws where a quote is not closed. */
export function asked(line) {
  const parts = line.match(/\s*("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)/gs) ?? [];
  return parts.map((part) => part.replace(/,$/, "").trim()).filter(Boolean).map((part) => {
    if (/^\d+$/.test(part)) return Number(part);
    if (!part.startsWith('"')) return part;
    try {
      return JSON.parse(part);
    } catch {
      throw new Error(`Tokens asked for: ${part} is no text in quotes; write it like " None".`);
    }
  });
}
