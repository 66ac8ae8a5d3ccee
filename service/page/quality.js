// What is served, within the activations view: what each variant buys, as its manifest has it, and the bundles refused.

import * as api from "./api.js";
import { byId, h } from "./dom.js";
import { readout } from "./readout.js";

export async function show() {
  const { data, refused } = await api.models();
  byId("quality-about").textContent = about(data.filter(({ quality }) => quality));
  byId("quality").replaceChildren(
    table(data),
    readout({ name: "served", title: "what is served", table: () => figures(data), listed: false }),
    ...(refused?.length ? refusals(refused) : []));
}

function figures(models) {
  const columns = ["variant", "activation", "head", "precision", "parameters", "bits per byte", "ECE", "activation runs"];
  return { columns, rows: models.map(({ id, activation, head, precision, parameters, quality, audit }) =>
    [id, activation, head, precision, parameters, quality?.bits_per_byte ?? null, quality?.ece ?? null, audit.activation]) };
}

function about(measured) {
  if (!measured.length) return "These variants have random weights: there is no quality to compare.";
  const corpora = new Set(measured.map(({ quality }) => quality.corpus_sha256));
  return corpora.size === 1
    ? "Held-out quality, best first; all on the same text, each trained once: seeds alone move bits per byte by about 0.01. Lower is better in both columns."
    : "Held-out quality. The variants saw different texts, so their bits per byte do not compare.";
}

function table(models) {
  const bits = ({ quality }) => quality?.bits_per_byte ?? Infinity;
  const sorted = [...models].sort((a, b) => (bits(a) === bits(b) ? 0 : bits(a) - bits(b)));
  return h("table", { class: "quality", "aria-labelledby": "served-title" },
    h("thead", {}, h("tr", {},
      h("th", { scope: "col" }, "Variant"),
      h("th", { scope: "col", class: "number" }, "Bits per byte"),
      h("th", { scope: "col", class: "number" }, h("abbr", { title: "expected calibration error" }, "ECE")),
    )),
    h("tbody", {}, sorted.map(row)),
  );
}

function row({ id, formula, head, precision, layers, dim, context, parameters, quality, audit }) {
  const facts = [
    `${head} head`, precision, { fused: "fused", inlined: "not fused", standard: "a standard operator" }[audit.activation], `${parameters.toLocaleString("en")} parameters`,
    `${layers} layers of ${dim}`, `context ${context}`,
  ];
  return h("tr", { "data-model": id },
    h("th", { scope: "row" },
      h("span", { class: "variant" }, id),
      h("code", {}, formula),
      h("span", { class: "facts" }, facts.join(" · "))),
    h("td", { class: "number" }, quality ? quality.bits_per_byte.toFixed(3) : "–"),
    h("td", { class: "number" }, quality ? quality.ece.toFixed(4) : "–"),
  );
}

function refusals(refused) {
  return [
    h("h4", {}, "Refused bundles"),
    h("dl", { class: "refused" }, refused.map(({ name, reason }) => [h("dt", {}, name), h("dd", {}, reason)])),
  ];
}
