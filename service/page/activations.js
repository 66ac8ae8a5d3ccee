// The activations view: a card for each, drawn small, and the chosen ones drawn large over each other.

import * as address from "./address.js";
import * as api from "./api.js";
import * as charts from "./charts.js";
import { byId, complain, h } from "./dom.js";

const FRAME_MS = 12; // of drawing thumbnails before the browser may answer the person

let activations = null; // of /v1/activations
const slots = []; // names of the chosen; the place says the colour, and an empty one is taken first

export async function show(fields) {
  try {
    const { data } = await api.activations();
    if (!activations) listen((activations = data));
    const unknown = restore(fields);
    await draw();
    if (!byId("cards").dataset.drawn) await drawCards();
    complain(byId("activations-error"), unknown.length ? `The address names no activation: ${unknown.join(", ")}.` : "");
    charts.resized(byId("view-activations"));
  } catch (error) {
    complain(byId("activations-error"), error.message);
  }
}

function listen(activations) {
  const served = activations.filter(({ served_by }) => served_by.length).length;
  byId("count").textContent = `${activations.length} activations, ${served} served here`;
  byId("cards").append(...activations.map(card));
  byId("cards").addEventListener("change", ({ target }) => choose(target.value, target.checked));
  byId("legend").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) choose(button.value, false);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    draw();
    drawCards();
  });
}

/** The chosen as the address has them; by default those served, without the gated, whose curves hide others.
    Returns the names in the address that are no activation's. */
function restore(fields) {
  const { named, unknown } = address.names(fields, "show", activations.map(({ name }) => name));
  const served = activations.filter(({ kind, served_by }) => served_by.length && kind !== "gated");
  const usual = (served.length > 1 ? served : activations.slice(0, 4)).map(({ name }) => name);
  slots.splice(0, slots.length, ...(named.length ? named : usual));
  return unknown;
}

function choose(name, wanted) {
  const free = slots.indexOf(null);
  if (!wanted) slots[slots.indexOf(name)] = null;
  else if (free >= 0) slots[free] = name;
  else slots.push(name);
  draw();
}

/** The legend, the two large charts and the cards' marks, from `slots`. */
async function draw() {
  const chosen = slots
    .map((name, slot) => ({ ...activations.find((activation) => activation.name === name), slot }))
    .filter(({ name }) => name);
  address.write("activations", { show: chosen.map(({ name }) => name) });
  byId("legend").replaceChildren(...chosen.map(({ name, slot }) =>
    h("li", {}, h("button", { type: "button", value: name, "aria-label": `Remove ${name}`, style: tint(name, slot) }, name))));
  for (const element of byId("cards").children) {
    const slot = slots.indexOf(element.dataset.name);
    element.querySelector("input").checked = slot >= 0;
    element.setAttribute("style", slot >= 0 ? tint(element.dataset.name, slot) : "");
  }
  await Promise.all([
    charts.overlay(byId("plot-y"), chosen, "y"),
    charts.overlay(byId("plot-slope"), chosen, "slope"),
  ]);
}

const tint = (name, slot) => `--tint: var(${charts.colour(name, slot)})`;

async function drawCards() {
  let since = performance.now();
  for (const { name, curve } of activations) {
    await charts.thumbnail(byId(`curve-${name}`), curve);
    if (performance.now() - since > FRAME_MS) {
      await new Promise(requestAnimationFrame);
      since = performance.now();
    }
  }
  byId("cards").dataset.drawn = "true";
}

function card({ name, formula, kind, paper, learned, units, served_by }) {
  const details = Object.entries(learned).map(([parameter, start]) => `${parameter} is learned from ${start}`);
  if (units > 1) details.push(`drawn for one of ${units} units`);
  return h("article", { class: "card", "data-name": name, "aria-labelledby": `card-${name}` },
    h("div", { class: "pick" },
      h("h3", { id: `card-${name}` }, h("label", {}, h("input", { type: "checkbox", value: name }), name)),
      h("span", { class: "badge" }, kind.replace("_", " ")),
      h("div", { id: `curve-${name}`, class: "thumbnail", "aria-hidden": "true" }),
    ),
    h("code", { class: "formula" }, formula),
    details.length > 0 && h("p", { class: "paper" }, details.join("; ")),
    h("p", { class: "paper" }, cited(paper)),
    h("p", { class: served_by.length ? "served" : "served not" },
      served_by.length ? `Served as ${served_by.join(", ")}` : "Not served here"),
  );
}

/** The paper's text, its arXiv numbers as links. */
function cited(paper) {
  return paper.split(/(arXiv:\d{4}\.\d{4,5})/).map((part, at) =>
    at % 2 ? h("a", { href: `https://arxiv.org/abs/${part.slice(6)}`, rel: "noreferrer" }, part) : part);
}
