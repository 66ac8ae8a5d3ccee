// The activations view: a card for each, drawn small, and the chosen ones drawn large over each other; below, what is
// served of them, and how well.

import * as address from "./address.js";
import * as api from "./api.js";
import { card } from "./cards.js";
import * as charts from "./charts.js";
import { byId, complain, h } from "./dom.js";
import * as facts from "./facts.js";
import * as quality from "./quality.js";
import { readout, refresh, tableOf } from "./readout.js";

const FRAME_MS = 12; // of drawing thumbnails before the browser may answer the person
const LARGE = { y: ["plot-y", "Activations"], slope: ["plot-slope", "Slopes of activations"] };

let activations = null; // of /v1/activations
let known = null; // of facts.js
const slots = []; // names of the chosen; the place says the colour, and an empty one is taken first

// What the cards can be ordered by; null stands for not measured, and comes last.
const ORDERS = {
  registered: (_, at) => at,
  name: ({ name }) => name,
  cost: ({ name }) => known.get(name).ns,
  quality: ({ name }) => facts.bits(known.get(name)),
};

export async function show(fields) {
  try {
    const { data } = await api.activations();
    if (!activations) {
      const found = await facts.known(data);
      if (!activations) [known, activations] = [found, data];
      if (!byId("cards").childElementCount) listen();
    }
    const unknown = restore(fields);
    await draw();
    await quality.show();
    if (fields.get("at") === "served") reveal(byId("served-title"));
    if (!byId("cards").dataset.drawn) await drawCards();
    complain(byId("activations-error"), unknown.length ? `The address names no activation: ${unknown.join(", ")}.` : "");
    charts.resized(byId("view-activations"));
  } catch (error) {
    complain(byId("activations-error"), error.message);
  }
}

function listen() {
  const served = activations.filter(({ served_by }) => served_by.length).length;
  byId("count").textContent = `${activations.length} activations, ${served} served here`;
  byId("cards").append(...activations.map((activation) => card(activation, known.get(activation.name))));
  byId("cards").addEventListener("change", ({ target }) => choose(target.value, target.checked));
  byId("legend").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) remove(button);
  });
  byId("sort").addEventListener("change", () => {
    order();
    write();
    refresh(byId("activations-readout"));
  });
  for (const [field, [id, title]] of Object.entries(LARGE)) {
    byId(id).parentElement.append(readout({
      name: id.replace("plot-y", "activations").replace("plot-", ""), title, plot: () => byId(id), legend: true,
      table: () => tableOf("x", chosen().map(({ name, curve }) => ({ name, x: curve.x, y: curve[field] }))),
    }));
  }
  byId("activations-readout").append(
    readout({ name: "activations-measured", title: "what was measured of each activation", table: measured }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    draw();
    drawCards();
  });
}

/** The chosen and the order as the address has them; by default those served, without the gated, whose curves hide
    others. Returns the names in the address that are no activation's. */
function restore(fields) {
  const { named, unknown } = address.names(fields, "show", activations.map(({ name }) => name));
  const served = activations.filter(({ kind, served_by }) => served_by.length && kind !== "gated");
  const usual = (served.length > 1 ? served : activations.slice(0, 4)).map(({ name }) => name);
  slots.splice(0, slots.length, ...(named.length ? named : usual));
  byId("sort").value = Object.hasOwn(ORDERS, fields.get("sort")) ? fields.get("sort") : "registered";
  order();
  return unknown;
}

function choose(name, wanted) {
  const free = slots.indexOf(null);
  if (!wanted) slots[slots.indexOf(name)] = null;
  else if (free >= 0) slots[free] = name;
  else slots.push(name);
  draw();
}

/** The button goes, so the focus goes to the next one, or to the card. */
function remove(button) {
  const { value } = button, at = [...byId("legend").querySelectorAll("button")].indexOf(button);
  choose(value, false);
  const left = byId("legend").querySelectorAll("button");
  (left[Math.min(at, left.length - 1)] ?? byId("cards").querySelector(`input[value="${value}"]`)).focus();
}

/** Put the cards in the order asked for; those of which nothing is known, last. */
function order() {
  const key = ORDERS[byId("sort").value];
  const keyed = activations.map((activation, at) => ({ name: activation.name, key: key(activation, at) }));
  const unknown = keyed.filter(({ key }) => key == null).length;
  keyed.sort((a, b) => (a.key == null) - (b.key == null) || (a.key < b.key ? -1 : a.key > b.key ? 1 : 0));
  const cards = new Map([...byId("cards").children].map((element) => [element.dataset.name, element]));
  if (keyed.some(({ name }, at) => byId("cards").children[at] !== cards.get(name))) {
    byId("cards").append(...keyed.map(({ name }) => cards.get(name)));
  }
  byId("unmeasured").textContent = unknown === 0 ? ""
    : unknown === activations.length ? "Of none this was measured: run `actuary study cost language`." : `${unknown} not measured, last`;
}

const chosen = () => slots
  .map((name, slot) => ({ ...activations.find((activation) => activation.name === name), slot }))
  .filter(({ name }) => name);

function write() {
  const sort = byId("sort").value;
  address.write("activations", { show: chosen().map(({ name }) => name), ...(sort !== "registered" && { sort }) });
}

/** The legend, the two large charts and the cards' marks, from `slots`. */
async function draw() {
  const shown = chosen();
  write();
  byId("legend").replaceChildren(...shown.map(({ name, slot }) =>
    h("li", {}, h("button", { type: "button", value: name, "aria-label": `Remove ${name}`, style: tint(name, slot) }, name))));
  for (const element of byId("cards").children) {
    const slot = slots.indexOf(element.dataset.name);
    element.querySelector("input").checked = slot >= 0;
    element.setAttribute("style", slot >= 0 ? tint(element.dataset.name, slot) : "");
  }
  const names = shown.map(({ name }) => name).join(", ") || "none chosen";
  refresh(byId("view-activations"));
  charts.described(byId("plot-y"), `Curves of ${names}`);
  charts.described(byId("plot-slope"), `Slopes of ${names}`);
  await Promise.all(Object.entries(LARGE).map(([field, [id]]) => charts.overlay(byId(id), shown, field)));
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

/** All cards' figures as one table, in the cards' order. */
function measured() {
  const columns = ["activation", "kind", "formula", "ns alone", "kernel", "bits per byte", "spread", "seeds", "served as"];
  const rows = [...byId("cards").children].map(({ dataset: { name } }) => {
    const { kind, formula } = activations.find((activation) => activation.name === name);
    const { ns, kernel, quality, variants } = known.get(name);
    const served = variants.map(({ id }) => id).join(" ");
    return [name, kind, formula, ns, kernel ?? null, quality?.mean ?? null, quality?.sd ?? null, quality?.seeds ?? null, served];
  });
  return { columns, rows };
}

/** What a link leads to, though it stands further down. */
function reveal(element) {
  element.scrollIntoView();
  element.focus({ preventScroll: true });
}
