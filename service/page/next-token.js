// The next-token view: from its controls to a request, from the answer to panels. Typing asks again; the newest wins.

import * as address from "./address.js";
import * as api from "./api.js";
import { byId, complain, h } from "./dom.js";
import { panel } from "./panel.js";
import { milliseconds } from "./text.js";

const PROMPT = "if x is not";
const TOP_K = 10;
const PAUSE_MS = 180; // between two keys of a person who types: longer than most, shorter than noticed

let variants = null; // the names in /v1/models
let running = null; // the AbortController of the request under way
let pause = 0;

export async function show(fields) {
  if (!variants) {
    try {
      const { data } = await api.models();
      variants ??= listen(data);
    } catch (error) {
      return complain(byId("ask-error"), error.message);
    }
  }
  const unknown = restore(fields);
  run(unknown.length ? `The address names what is not served here: ${unknown.join(", ")}.` : "");
}

/** Draw a chip per model and hear what the person does. Returns the models' names. */
function listen(models) {
  byId("variants").append(...models.map(({ id, head, formula }) =>
    h("label", { class: "chip", title: formula },
      h("input", { type: "checkbox", name: "model", value: id, "data-head": head }), h("span", {}, id))));
  byId("ask").addEventListener("input", ({ target }) => {
    clearTimeout(pause);
    pause = setTimeout(run, target.type === "checkbox" ? 0 : PAUSE_MS);
  });
  byId("ask").addEventListener("submit", (event) => event.preventDefault());
  return models.map(({ id }) => id);
}

const boxes = () => [...byId("variants").querySelectorAll("input")];

/** The controls as the address has them; by default two variants with a softmax head and one with a sigmoid head.
    Returns the variants in the address that are not served. */
function restore(fields) {
  const { named, unknown } = address.names(fields, "models", variants);
  const ofHead = (head) => boxes().filter((box) => box.dataset.head === head).map((box) => box.value);
  const chosen = named.length ? named : [...ofHead("softmax").slice(0, 2), ...ofHead("sigmoid").slice(0, 1)];
  for (const box of boxes()) box.checked = chosen.includes(box.value);
  byId("prompt").value = fields.get("prompt") ?? PROMPT;
  byId("top-k").value = fields.get("top_k") ?? TOP_K;
  return unknown;
}

/** Ask what the controls say, and show the answer, with `notice` beside it. */
async function run(notice = "") {
  running?.abort();
  const mine = (running = new AbortController());
  const asked = {
    model: boxes().filter((box) => box.checked).map((box) => box.value),
    prompt: byId("prompt").value,
    top_k: byId("top-k").valueAsNumber,
  };
  address.write("next-token", { prompt: asked.prompt, models: asked.model, top_k: byId("top-k").value });
  if (!asked.prompt) return settle("Type a prompt: a model needs at least one token to go on from.", "prompt");
  if (Number.isNaN(asked.top_k)) return settle("Tokens shown: give a number from 1 to 100.", "top_k");
  if (!asked.model.length) return settle("Choose at least one variant.");

  byId("answer").setAttribute("aria-busy", "true");
  const sent = performance.now();
  try {
    const { results } = await api.nextToken(asked, mine.signal);
    const roundTrip = performance.now() - sent;
    byId("answer").replaceChildren(...results.map(panel));
    byId("answer-status").replaceChildren(
      `${results.length} ${results.length === 1 ? "variant" : "variants"}, one request: round trip `,
      h("b", { id: "round-trip" }, milliseconds(roundTrip)), " ms", notice && h("span", { id: "notice" }, notice));
    byId("curl").textContent = curl(asked);
    settle();
  } catch (error) {
    if (!mine.signal.aborted) settle(error.message, error.param);
  }
}

/** The request is over: say what is wrong, mark the control that `param` names, and the answer below as an older one; or
    clear all three. */
function settle(problem = "", param = "") {
  complain(byId("ask-error"), problem);
  byId("prompt").setAttribute("aria-invalid", param === "prompt");
  byId("top-k").setAttribute("aria-invalid", param === "top_k");
  byId("answer").classList.toggle("stale", Boolean(problem));
  byId("answer").setAttribute("aria-busy", "false");
}

function curl(asked) {
  const body = JSON.stringify(asked).replaceAll("'", "'\\''");
  return `curl -s ${location.origin}/v1/next-token -H 'content-type: application/json' \\\n  -d '${body}'`;
}
