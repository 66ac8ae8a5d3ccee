// The compare view: a comparison is asked for, watched while it runs, and read; those of before are listed.

import * as address from "./address.js";
import * as api from "./api.js";
import * as charts from "./charts.js";
import * as comparison from "./comparison.js";
import { byId, complain, h } from "./dom.js";
import { when } from "./text.js";

const LOOK_MS = 2000; // each look asks the very service that is measured
const NUMBERS = { minutes: "Minutes", equivalence: "No difference within" };

let variants = null; // the names in /v1/models
let shown = null; // id of the comparison that stands below the form
let running = false; // any of those listed
let next = 0; // timer

export async function show(fields) {
  try {
    const first = !variants;
    if (first) {
      const { data } = await api.models();
      variants ??= listen(data);
    }
    const unknown = first || fields.has("variants") ? restore(fields) : [];
    complain(byId("compare-error"), unknown.length ? `The address names what is not served here: ${unknown.join(", ")}.` : "");
    if (shown !== fields.get("run")) byId("comparison").hidden = true;
    shown = fields.get("run");
    await list();
    write();
    await look();
  } catch (error) {
    complain(byId("compare-error"), error.message);
  }
}

/** Draw a chip per model and hear what the person does. Returns the models' names. */
function listen(models) {
  byId("compare-variants").append(...models.map(({ id, formula }) =>
    h("label", { class: "chip", title: formula },
      h("input", { type: "checkbox", name: "variant", value: id }), h("span", {}, id))));
  byId("compare-form").addEventListener("input", () => {
    plan();
    write();
  });
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  document.addEventListener("visibilitychange", () => !document.hidden && look().catch(retry));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => comparison.repaint());
  return models.map(({ id }) => id);
}

const boxes = () => [...byId("compare-variants").querySelectorAll("input")];
const chosen = () => boxes().filter((box) => box.checked).map((box) => box.value);

/** The form as the address has it; by default all variants, as `actuary compare` takes them.
    Returns the variants in the address that are not served. */
function restore(fields) {
  const { named, unknown } = address.names(fields, "variants", variants);
  for (const box of boxes()) box.checked = !named.length || named.includes(box.value);
  byId("load").value = fields.has("rate") ? "rate" : "users";
  byId("amount").value = fields.get("rate") ?? fields.get("users") ?? 4;
  byId("minutes").value = fields.get("minutes") ?? 5;
  byId("equivalence").value = fields.get("equivalence") ?? 2;
  plan(fields.get("baseline"));
  return unknown;
}

/** The baseline's choices, and what a comparison of what is chosen takes. */
function plan(baseline = byId("baseline").value) {
  const names = chosen();
  const offered = [...byId("baseline").options].map(({ value }) => value);
  if (String(offered) !== String(names)) byId("baseline").replaceChildren(...names.map((name) => h("option", {}, name)));
  if (names.includes(baseline)) byId("baseline").value = baseline;
  const minutes = byId("minutes").value || "?";
  byId("compare-plan").textContent = running ? "One runs; the next can start when it has ended."
    : names.length < 2 ? "Choose two variants or more."
    : `${names.length} variants and the baseline a second time, in turn, for at most ${minutes} ${minutes === "1" ? "minute" : "minutes"}, ` +
      "less when it is settled. Whoever asks this service meanwhile waits longer, and disturbs.";
}

function write() {
  const form = {
    variants: chosen(), baseline: byId("baseline").value, [byId("load").value]: byId("amount").value,
    minutes: byId("minutes").value, equivalence: byId("equivalence").value,
  };
  address.write("compare", shown ? { run: shown, ...form } : form);
}

async function start() {
  const load = byId("load").value;
  const asked = {
    variants: chosen(), baseline: byId("baseline").value, [load]: byId("amount").valueAsNumber,
    minutes: byId("minutes").valueAsNumber, equivalence: byId("equivalence").valueAsNumber / 100,
  };
  if (asked.variants.length < 2) return settle("Choose two variants or more.");
  const missing = Object.keys(asked).find((name) => Number.isNaN(asked[name]));
  if (missing) return settle(`${NUMBERS[missing] ?? "Load"}: give a number.`, missing);
  byId("compare-start").disabled = true;
  try {
    shown = (await api.startComparison(asked)).id;
    settle();
    await list();
    write();
    await look();
    comparison.focus();
  } catch (error) {
    settle(error.message, error.param);
  }
  byId("compare-start").disabled = running;
}

/** Say what is wrong and mark the control that `param` names, or clear both. */
function settle(problem = "", param = "") {
  const control = param === "users" || param === "rate" ? "amount" : param;
  for (const name of ["baseline", "amount", "minutes", "equivalence"]) byId(name).setAttribute("aria-invalid", name === control);
  complain(byId("compare-error"), problem);
}

/** All comparisons, newest first; one that runs is shown where the address names none. */
async function list() {
  const { data, why } = await api.comparisons();
  byId("compare-off").hidden = !why;
  byId("compare-off").textContent = why && `${why[0].toUpperCase()}${why.slice(1)}.`;
  byId("compare-form").hidden = Boolean(why);
  const live = data.find(({ state }) => state === "running");
  running = Boolean(live);
  byId("compare-start").disabled = running;
  plan();
  shown ??= live?.id ?? null;
  byId("past-title").hidden = !data.length;
  byId("past").replaceChildren(...data.map(entry));
}

function entry({ id, started, state, baseline, models, fit, sentences, said }) {
  const none = "Nothing is claimed: the machine was not fit, or the rounds were too few.";
  const words = fit === false ? none : sentences.join(" · ") || said[0];
  return h("li", {},
    h("p", {},
      h("a", { href: `#compare?run=${encodeURIComponent(id)}`, "aria-current": id === shown && "true" },
        comparison.headline(baseline, models)),
      " ", h("span", { class: `state ${state}` }, state), " ", h("span", { class: "facts" }, when(started))),
    words && h("p", { class: "facts" }, words));
}

/** Draw what is known of the comparison shown, and look again while it runs. */
async function look() {
  clearTimeout(next);
  if (!shown || byId("view-compare").hidden || document.hidden) return;
  const id = shown;
  const found = await api.comparison(id);
  if (id !== shown) return;
  byId("comparison").hidden = false;
  await comparison.draw(found, stop);
  charts.resized(byId("comparison"));
  if (found.state === "running") {
    clearTimeout(next);
    next = setTimeout(() => look().catch(retry), LOOK_MS);
  } else if (running) await list();
}

function retry(error) {
  complain(byId("compare-error"), error.message);
  next = setTimeout(() => look().then(() => complain(byId("compare-error")), retry), LOOK_MS);
}

async function stop(id) {
  try {
    await api.stopComparison(id);
    await look();
    await list();
    comparison.focus();
  } catch (error) {
    complain(byId("compare-error"), error.message);
  }
}
