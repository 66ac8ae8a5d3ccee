// The next-token view: from its controls to a request, from the answer to panels. Typing asks again; the newest wins.
// What is asked is the text as it was typed and, behind it, the tokens that were chosen out of the answers, step by step.

import * as address from "./address.js";
import * as api from "./api.js";
import { byId, complain, h } from "./dom.js";
import { chartOf, panel, tableOf } from "./panel.js";
import { readout, refresh } from "./readout.js";
import * as stepping from "./steps.js";
import * as charts from "./study-charts.js";
import { milliseconds, visible } from "./text.js";

const PROMPT = "if x is not";
const TOP_K = 10;
const PAUSE_MS = 180; // between two keys of a person who types: longer than most, shorter than noticed
const CONTROLS = { prompt: "prompt", top_k: "top-k", tokens: "tokens" }; // by what the API calls them

let variants = null; // of /v1/models, by name
let typed = PROMPT;
let steps = []; // ids behind it
let answered = { typed, steps, results: [] }; // those of the answer that is shown, and itself
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
  run({ notice: unknown.length ? `The address names what is not served here: ${unknown.join(", ")}.` : "" });
}

/** Draw a chip per model and hear what the person does. Returns the models by name. */
function listen(models) {
  byId("variants").append(...models.map(({ id, head, formula }) =>
    h("label", { class: "chip", title: formula },
      h("input", { type: "checkbox", name: "model", value: id, "data-head": head }), h("span", {}, id))));
  byId("ask").addEventListener("input", ({ target }) => {
    if (target.id === "prompt") [typed, steps] = [target.value, []];
    running?.abort(); // at once: its answer would write an older text over what is typed
    clearTimeout(pause);
    pause = setTimeout(run, target.type === "checkbox" ? 0 : PAUSE_MS);
  });
  byId("answer-readout").append(
    readout({ name: "next-token", title: "the answer", table: () => tableOf(answered.results) }));
  byId("answer-plot-readout").append(readout({
    name: "next-token-chart", title: "the answer, side by side", legend: true, plot: () => byId("answer-plot"),
    table: () => charts.tableOf(chartOf(answered.results)),
  }));
  byId("side-by-side").addEventListener("toggle", sideBySide);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", sideBySide);
  byId("ask").addEventListener("submit", (event) => event.preventDefault());
  byId("answer").addEventListener("click", ({ target }) => {
    const button = target.closest(".step");
    if (button) step(Number(button.value), button.closest(".panel").dataset.model);
  });
  byId("trail").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) back(Number(button.value));
  });
  return new Map(models.map((model) => [model.id, model]));
}

const boxes = () => [...byId("variants").querySelectorAll("input")];
const chosen = () => boxes().filter((box) => box.checked).map((box) => box.value);

/** The controls as the address has them; by default two variants with a softmax head and one with a sigmoid head.
    Returns the variants in the address that are not served. */
function restore(fields) {
  const { named, unknown } = address.names(fields, "models", [...variants.keys()]);
  const ofHead = (head) => boxes().filter((box) => box.dataset.head === head).map((box) => box.value);
  const wanted = named.length ? named : [...ofHead("softmax").slice(0, 2), ...ofHead("sigmoid").slice(0, 1)];
  for (const box of boxes()) box.checked = wanted.includes(box.value);
  byId("prompt").value = typed = fields.get("prompt") ?? PROMPT;
  byId("top-k").value = fields.get("top_k") ?? TOP_K;
  byId("tokens").value = fields.get("tokens") ?? "";
  steps = (fields.get("steps") ?? "").split(",").filter((id) => /^\d+$/.test(id)).map(Number);
  return unknown;
}

/** Put token `id` behind the prompt; the focus stays with the variant in whose panel it was chosen. */
function step(id, model) {
  [typed, steps] = [answered.typed, [...answered.steps, id]];
  run({ push: true, focus: () => document.querySelector(`.panel[data-model="${CSS.escape(model)}"] .step`) });
}

/** Keep the first `count` of the steps. */
function back(count) {
  [typed, steps] = [answered.typed, answered.steps.slice(0, count)];
  byId("prompt").value = typed;
  run({ push: true, focus: () => byId("trail").querySelector("button") ?? byId("prompt") });
}

/** Ask what the controls say, and show the answer, with `notice` beside it. */
async function run({ notice = "", push = false, focus = null } = {}) {
  clearTimeout(pause);
  running?.abort();
  const mine = (running = new AbortController());
  const asked = { model: chosen(), prompt: typed, top_k: byId("top-k").valueAsNumber };
  const tokens = byId("tokens").value;
  address.write("next-token", {
    prompt: typed, models: asked.model, top_k: byId("top-k").value,
    ...(tokens.trim() && { tokens }), ...(steps.length && { steps }),
  }, push);
  try {
    if (!asked.prompt) return settle("Type a prompt: a model needs at least one token to go on from.", "prompt");
    if (Number.isNaN(asked.top_k)) return settle("Tokens shown: give a number from 1 to 100.", "top_k");
    if (!asked.model.length) return settle("Choose at least one variant.");
    const wanted = readTokens(tokens);
    if (wanted.length) asked.tokens = wanted;
    byId("answer").setAttribute("aria-busy", "true");
    const each = await addSteps(asked, mine.signal);
    if (mine.signal.aborted) return;
    const sent = performance.now();
    const { results } = await api.nextToken(asked, mine.signal);
    const roundTrip = performance.now() - sent;
    answered = { typed, steps, results };
    trail(each);
    byId("answer").replaceChildren(...results.map(panel));
    byId("answer-status").replaceChildren(
      `${results.length} ${results.length === 1 ? "variant" : "variants"}, one request: round trip `,
      h("b", { id: "round-trip" }, milliseconds(roundTrip)), " ms", notice && h("span", { id: "notice" }, notice));
    byId("curl").textContent = curl(asked);
    sideBySide();
    refresh(byId("view-next-token"));
    settle();
    focus?.()?.focus();
  } catch (error) {
    if (!mine.signal.aborted) settle(error.message, error.param);
  }
}

/** The answer as one chart, where it is wanted. */
function sideBySide() {
  const { results } = answered;
  if (!byId("side-by-side").open || !results.length) return;
  const chart = chartOf(results), plot = byId("answer-plot");
  const draw = () => charts.draw(plot, chart).catch((error) => complain(byId("ask-error"), error.message));
  byId("answer-legend").replaceChildren(charts.legend(chart, draw));
  draw();
}

function readTokens(line) {
  try {
    return stepping.asked(line);
  } catch (error) {
    throw Object.assign(error, { param: "tokens" });
  }
}

/** Where steps were made, `asked.prompt` becomes ids, and the box shows the text they make. Returns each step's text;
    of a request that `signal` has ended, nothing. */
async function addSteps(asked, signal) {
  if (!steps.length) return [];
  const tokenizers = new Set(asked.model.map((name) => variants.get(name).files["tokenizer.json"]));
  if (tokenizers.size > 1) {
    throw new Error("These variants cut text into different tokens, so no token can be put behind the prompt of all: " +
      "choose variants that share a tokenizer, or type what comes next.");
  }
  const { ids, text, each } = await stepping.grown(typed, steps, asked.model[0]).catch((error) => {
    if (!error.param?.startsWith("tokens")) throw error;
    throw new Error(`The steps behind the prompt: ${error.message}`); // not of the box "Tokens asked for"
  });
  if (signal.aborted) return [];
  asked.prompt = ids;
  byId("prompt").value = text;
  return each;
}

/** The steps made, each with the way back to it. */
function trail(each) {
  byId("trail").hidden = !each.length;
  if (!each.length) return byId("trail").replaceChildren();
  const before = each.length === 1 ? "Back to the prompt as it was typed" : "One step back";
  byId("trail").replaceChildren(
    h("button", { type: "button", class: "button quiet", value: each.length - 1, title: before }, "Step back"),
    h("button", { type: "button", class: "button quiet", value: 0 }, "Back to the start"),
    h("ol", { "aria-label": "Steps" }, each.map((token) => h("li", {}, h("code", {}, visible(token))))));
}

/** The request is over: say what is wrong, mark the control that `param` names, and the answer below as an older one; or
    clear all three. */
function settle(problem = "", param = "") {
  complain(byId("ask-error"), problem);
  const named = (param ?? "").replace(/\[.*/, ""); // tokens[0] is of tokens
  for (const [name, id] of Object.entries(CONTROLS)) byId(id).setAttribute("aria-invalid", name === named);
  byId("answer").classList.toggle("stale", Boolean(problem));
  byId("answer").setAttribute("aria-busy", "false");
}

function curl(asked) {
  const body = JSON.stringify(asked).replaceAll("'", "'\\''");
  return `curl -s ${location.origin}/v1/next-token -H 'content-type: application/json' \\\n  -d '${body}'`;
}
