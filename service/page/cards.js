// One activation as a card: its curve, formula and paper, whether it runs fused, what it costs and what it buys.

import { h } from "./dom.js";
import { significant } from "./text.js";

const RUNS = { fused: "fused", inlined: "not fused", standard: "a standard operator" };

/** `activation` of /v1/activations, `fact` of facts.js. */
export function card({ name, formula, kind, paper, learned, units, unfused }, fact) {
  const details = Object.entries(learned).map(([parameter, start]) => `${parameter} is learned from ${start}`);
  if (units > 1) details.push(`drawn for one of ${units} units`);
  const { variants } = fact;
  return h("article", { class: "card", "data-name": name, "aria-labelledby": `card-${name}` },
    h("div", { class: "pick" },
      h("h3", { id: `card-${name}` }, h("label", {}, h("input", { type: "checkbox", value: name }), name)),
      h("span", { class: "badge" }, kind.replace("_", " ")),
      h("div", { id: `curve-${name}`, class: "thumbnail", "aria-hidden": "true" }),
    ),
    h("code", { class: "formula" }, formula),
    details.length > 0 && h("p", { class: "paper" }, details.join("; ")),
    h("p", { class: "paper" }, cited(paper)),
    h("dl", { class: "measures" },
      h("div", { class: "cost" }, h("dt", {}, "Cost"), h("dd", {}, ...cost(fact))),
      h("div", { class: "bits" }, h("dt", {}, "Bits per byte"), h("dd", {}, ...quality(fact)))),
    h("p", { class: variants.length ? "served" : "served not" },
      variants.length ? ["Served as ", variants.map(served).join(", ")]
        : ["Not served here; ", h("span", { title: unfused || null }, unfused ? "would not run fused" : "can be fused")]),
  );
}

function cost({ ns, kernel, others }) {
  if (ns == null) return ["not measured"];
  const beside = Object.entries(others).filter(([kind, value]) => kind !== kernel && value != null);
  const said = beside.map(([kind, value]) => `${kind} ${significant(value)}`).join(", ");
  return [h("data", { value: ns, title: said || null }, significant(ns)), ` ns ${kernel}`];
}

function quality({ quality, variants }) {
  const measured = variants.filter(({ quality }) => quality);
  if (quality?.mean != null) {
    const spread = quality.sd == null ? "" : ` ± ${quality.sd.toFixed(3)}`;
    const seeds = `${quality.seeds} ${quality.seeds === 1 ? "seed" : "seeds"}`;
    return [h("data", { value: quality.mean, title: `the study language, ${seeds}` }, quality.mean.toFixed(3)), spread];
  }
  if (!measured.length) return ["not measured"];
  const { id, quality: { bits_per_byte: bits } } =
    measured.reduce((best, each) => (each.quality.bits_per_byte < best.quality.bits_per_byte ? each : best));
  return [h("data", { value: bits, title: `of ${id}, as it is served` }, bits.toFixed(3)), " served"];
}

const served = ({ id, audit }) => `${id} (${RUNS[audit.activation]})`;

/** The paper's text, its arXiv numbers as links. */
function cited(paper) {
  return paper.split(/(arXiv:\d{4}\.\d{4,5})/).map((part, at) =>
    at % 2 ? h("a", { href: `https://arxiv.org/abs/${part.slice(6)}`, rel: "noreferrer" }, part) : part);
}
