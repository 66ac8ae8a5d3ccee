// One study: what is claimed and by whom, the verdict, its figures beside the article's, tables and charts.

import { byId, complain, h } from "./dom.js";
import * as charts from "./study-charts.js";
import * as moons from "./moons.js";
import { figures, readout, scrollable, shown } from "./readout.js";

const CLASSES = { holds: "holds", "holds in part": "part", "did not reproduce": "not" };
const AGREES = new Map([[true, "agrees"], [false, "does not agree"], [null, ""]]);

let last = null; // what is drawn
let live = null; // its snapshots, where it has any

export const badge = (verdict) => h("span", { class: `verdict-badge ${CLASSES[verdict]}` }, verdict);

/** What the address holds besides the study's name. */
export const state = () => (live ? { epoch: live.epoch() } : {});

export const moveTo = (epoch) => live?.moveTo(epoch);

export function leave() {
  live?.leave();
  last = live = null;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (last) paint();
});

/** `found` of GET /v1/studies/NAME into #study; `changed` is called when `state` has. */
export async function draw(found, { epoch, changed }) {
  leave();
  last = found;
  const { claim, verdict, sentence, quick, data } = found;
  live = data.snapshots ? moons.live(data.snapshots, { epoch, changed }) : null;
  byId("study").replaceChildren(...[
    h("p", { class: "back" }, h("a", { href: "#studies" }, "All studies")),
    h("header", {},
      h("h3", { id: "study-title", tabindex: -1 }, `${claim.number}. ${claim.title}`),
      badge(verdict), quick && h("span", { class: "state" }, "quick run")),
    h("p", { class: "sentence" }, sentence),
    h("dl", { class: "claim" }, [
      ["Claim", claim.statement], ["Source", claim.source], ["What would refute it", claim.refuted_by],
    ].map(([term, words]) => [h("dt", {}, term), h("dd", {}, words.replace(/^[a-z](?=[a-z]*[ ,])/, (first) => first.toUpperCase()))])),
    beside(found),
    live?.element,
    found.charts.length > 0 && h("div", { class: "gallery" }, found.charts.map((chart) => exhibited(claim.name, chart))),
    found.tables.map((table) => listed(claim.name, table)),
    circumstances(found),
  ].flat().filter(Boolean));
  await paint();
}

/** Every chart, in the colours of now. One that cannot be drawn is said; text and figures need none. */
async function paint() {
  const found = last;
  const failed = (error) => found === last && complain(byId("studies-error"), error.message);
  await live?.paint().catch(failed);
  for (const chart of found.charts) {
    if (found !== last) return;
    await charts.draw(byId(`chart-${chart.name}`), chart).catch(failed);
  }
}

/** Ours beside the article's. Whether they agree is said in words, and marked. */
function beside({ claim, figures: found }) {
  if (!found.length) return null;
  const title = "Figures beside the article’s";
  const rows = found.map(({ what, measured, published, agrees }) => [what, measured, published || "–", AGREES.get(agrees)]);
  const columns = ["figure", "measured here", "the article’s", "agreement"];
  const table = figures(columns, rows, { number: () => false });
  for (const [at, row] of [...table.tBodies[0].rows].entries()) {
    row.lastElementChild.classList.add(...(found[at].agrees == null ? [] : [found[at].agrees ? "agrees" : "differs"]));
  }
  return h("section", { class: "beside" },
    h("h4", {}, title), scrollable(title, [table]),
    readout({ name: `${claim.name}-figures`, title, table: () => ({ columns, rows }), listed: false }));
}

function exhibited(name, chart) {
  try {
    return exhibit(name, chart);
  } catch (error) {
    return h("p", { class: "error", role: "alert" }, `The chart “${chart.title}” is damaged: ${error.message}`);
  }
}

function exhibit(name, chart) {
  const plot = () => byId(`chart-${chart.name}`);
  const legend = charts.legend(chart, () => charts.draw(plot(), chart));
  return h("figure", { class: "exhibited" },
    h("figcaption", {}, h("h4", {}, chart.title), chart.note && h("p", { class: "note" }, chart.note)),
    legend,
    h("div", { id: `chart-${chart.name}`, class: "plot" }),
    readout({
      name: `${name}-${chart.name}`, title: chart.title, table: () => charts.tableOf(chart), plot, legend: Boolean(legend),
    }));
}

function listed(name, { title, columns, rows, note }) {
  const numeric = (at) => rows.some((row) => typeof row[at] === "number");
  const file = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  return h("section", {},
    h("h4", {}, title),
    scrollable(title, [figures(columns, rows.map((row) => row.map(shown)), { number: numeric })]),
    note && h("p", { class: "note" }, note),
    readout({ name: `${name}-${file}`, title, table: () => ({ columns, rows }), listed: false }));
}

/** A setting as text, whatever it is made of. */
function plain(value) {
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (typeof value !== "object" || value === null) return typeof value === "number" ? shown(value) : String(value);
  return Object.entries(value).map(([name, each]) => `${name}: ${plain(each)}`).join("; ");
}

/** All that another needs to repeat it. */
function circumstances({ claim, settings, machine, date, versions, seconds, quick }) {
  const facts = {
    date, machine, took: `${shown(seconds)} s${quick ? ", a quick run: smaller, and with a wider spread" : ""}`,
    versions: Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", "),
  };
  return h("section", { class: "circumstances" },
    h("h4", {}, "How it was run"),
    h("dl", {}, [...Object.entries(settings), ...Object.entries(facts)].map(([name, value]) =>
      h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, plain(value))))),
    h("p", { class: "note" }, "Again with ", h("code", {}, `actuary study ${claim.name}${quick ? " --quick" : ""} --again`), "."));
}
