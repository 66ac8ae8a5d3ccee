// One comparison: what it found in sentences, then pictures, each with its table; while it runs, p50 by round.

import { reportOf } from "./api.js";
import * as charts from "./compare-charts.js";
import { byId, h } from "./dom.js";
import { figures, readout, scrollable } from "./readout.js";
import * as sweep from "./sweep.js";
import { interval, milliseconds, percent, when } from "./text.js";

const ROUNDS_LISTED = 200;

let drawn = ""; // what the article was built for
let last = null; // what was drawn

export const headline = (baseline, models) =>
  models.length > 1 ? `${models.filter((name) => name !== baseline).join(", ")} against ${baseline}` : "A comparison";

export const focus = () => byId("comparison-title")?.focus();

/** `found` of GET /v1/comparisons/ID. What stays the same keeps its elements, and with them the focus. */
export async function draw(found, stop) {
  last = found;
  const of = `${found.id} ${found.state} ${found.report}`;
  if (drawn !== of) {
    byId("comparison").replaceChildren(...article(found, stop));
    drawn = of;
    if (found.result && found.state !== "running") await verdict(found);
  }
  if (found.state === "running") follow(found);
  if (found.progress?.rounds) await rounds(found.progress);
}

/** In the colours of now. */
export async function repaint() {
  if (!last || !drawn) return;
  if (last.result && last.state !== "running") await verdict(last);
  if (last.progress?.rounds) await charts.rounds(byId("rounds-plot"), last.progress);
}

function article(found, stop) {
  const { id, state, started, baseline, models, design, result, progress, said, report, mine } = found;
  const over = state !== "running" && result;
  return [
    h("header", {},
      h("h3", { id: "comparison-title", tabindex: -1 }, headline(baseline, models)),
      h("span", { class: `state ${state}` }, state),
      state === "running" && mine && stopButton(id, stop),
      report && h("a", { class: "button quiet", href: reportOf(id), target: "_blank" }, "Full report"),
    ),
    h("p", { class: "facts" }, [when(started), ...about(design, result)].join(" · ")),
    state === "running" && h("div", { class: "going" },
      h("progress", { id: "going", "aria-label": "Rounds" }), h("p", { id: "doing", class: "status", role: "status" })),
    over && unfit(result) && h("p", { class: "error alarm", role: "alert" }, unfit(result)),
    over && h("ul", { class: "verdict" }, result.arms.map(({ outcome, sentence }) =>
      h("li", {}, h("b", { class: `outcome ${outcome}` }, outcome), h("span", {}, sentence)))),
    over && h("p", { class: "note" }, check(result)),
    state === "failed" && h("p", { class: "error" }, said[0]),
    state === "stopped" && !result && h("p", { class: "notice" }, progress?.rounds
      ? "It was cut off, and not judged. `actuary compare --resume` with its folder goes on."
      : "It was stopped before its first round was finished: there is nothing to judge."),
    state !== "failed" && said.length > 0 &&
      h("ul", { class: "notice" }, said.map((sentence) => h("li", {}, sentence))),
    over && exhibit("forest", `Over ${baseline}`,
      `p50 over ${baseline}’s in the same round; right is slower. The bars hold together at ${sure(result)} %. ` +
      `Within the shaded ${round1(result.margin * 100)} % a difference does not matter; the grey tick is the server’s ` +
      "inference alone."),
    over && exhibit("frontier", "What quality costs",
      "Further left answers sooner, further down predicts held-out text better. The filled, on the dotted line, are " +
      "beaten by nobody in both. Bars are intervals; a variant trained once has none for its quality."),
    over && sweep.exhibit(result, models),
    exhibit("rounds", "Round by round",
      "p50 of each block, in ms. What slows all of a round alike cancels in the verdict; dashed is the baseline’s " +
      "second block."),
    found.command && h("details", { class: "curl" }, h("summary", {}, "The command that repeats it"),
      h("pre", {}, h("code", {}, found.command))),
  ].filter(Boolean);
}

function stopButton(id, stop) {
  const button = h("button", { type: "button", class: "button quiet" }, "Stop");
  button.addEventListener("click", () => {
    button.disabled = true;
    byId("doing").textContent = "Stopping: what was measured is judged, which takes some seconds.";
    byId("doing").dataset.stopping = "true";
    stop(id);
  });
  return button;
}

const exhibit = (name, title, said) =>
  h("section", { id: name, class: "exhibit", "aria-labelledby": `${name}-title`, hidden: name === "rounds" },
    h("div", { class: "said" }, h("h4", { id: `${name}-title` }, title), h("p", { class: "note" }, said)),
    h("div", { id: `${name}-plot`, class: "plot" }),
    scrollable(`${title}, as a table`, [], { id: `${name}-table` }),
    readout({ name: `comparison-${name}`, title, table: () => written(byId(`${name}-table`)), plot: () => byId(`${name}-plot`),
      listed: false, legend: name === "rounds" }));

/** The texts of the table in `element`. */
function written(element) {
  const [columns, ...rows] = [...element.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  return { columns: columns ?? [], rows };
}

function about(design, result) {
  if (!design) return [];
  const load = design.rate ? `${design.rate} ${design.arrivals} arrivals/s` : `${design.users} users in a closed loop`;
  const void_ = result?.void_rounds ? `, ${result.void_rounds} of them void` : "";
  const rounds = result ? `${result.rounds} rounds${void_}` : `at most ${design.rounds} rounds`;
  return [load, rounds, `blocks of ${design.block_s} s`];
}

const round1 = (value) => Number(value.toFixed(1));
const sure = ({ alpha }) => round1((1 - (alpha ?? 0.05)) * 100);

/** What must be read first, where nothing may be claimed. */
function unfit({ fit, aa, baseline, rounds, void_rounds }) {
  if (fit) return "";
  if (aa?.ratio == null) return `Too few rounds for any claim: ${rounds - (void_rounds ?? 0)} count. Measure longer.`;
  return `Do not trust the differences below: this machine was not fit. ${baseline} against itself came out at ` +
    `${interval(aa)} p50, where 0 is the truth. Stop what else runs, or measure longer.`;
}

const check = ({ fit, aa, baseline }) => (fit
  ? `${baseline} against itself, the machine’s own check: ${interval(aa)} p50; nothing speaks against the machine.` : "");

/** How far it is. */
function follow({ progress }) {
  const done = progress?.rounds ?? 0;
  byId("going").max = progress?.planned ?? 1;
  byId("going").value = done;
  if (byId("doing").dataset.stopping) return;
  const doing = progress?.doing ?? "starting";
  const said = doing === "measuring" ? `${done} of at most ${progress.planned} rounds` : doing;
  if (byId("doing").textContent !== said) byId("doing").textContent = said;
}

/** The pictures of what was found, and their tables. */
async function verdict({ result, progress, models }) {
  // Taken now: another comparison may stand here when Plotly has come.
  const [differences, differencesTable, quality, qualityTable, swept] =
    ["forest-plot", "forest-table", "frontier-plot", "frontier-table", "sweep-plot"].map(byId);
  const arms = [...result.arms].filter(({ p50 }) => p50).sort((a, b) => b.p50.ratio - a.p50.ratio);
  differencesTable.replaceChildren(figures(
    ["variant", "p50", "p99", "inference"],
    [
      ...arms.map((arm) => [arm.model, ...["p50", "p99", "infer"].map((name) => interval(arm[name]))]),
      [`${result.baseline} (A/A)`, interval(result.aa), "", ""],
    ]));
  const { points, why } = frontier(result);
  quality.hidden = qualityTable.hidden = Boolean(why);
  if (why) byId("frontier").querySelector(".note").replaceChildren(why);
  const ms = median(counted(progress)[result.baseline] ?? []);
  qualityTable.replaceChildren(figures(
    ["variant", ms ? "p50, ms" : "p50", "bits per byte", "best"],
    points.map(({ model, ratio, bits, best }) =>
      [model, ms ? milliseconds(ms * ratio) : percent(ratio), bits.toFixed(4), best ? "yes" : ""])));
  await charts.forest(differences, arms, result);
  if (!why) await charts.frontier(quality, points, models, result.baseline, ms);
  await sweep.draw(swept, result, models);
}

/** The variants whose quality and latency are known, fastest first, and which of them nobody beats in both. */
function frontier({ baseline, arms }) {
  const known = arms.filter(({ p50, bits_per_byte: bits }) => p50?.ratio && bits?.value && bits.ratio);
  if (!known.length) {
    return { points: [], why: "The variants’ bits per byte are not known, or of different texts: there is nothing to draw." };
  }
  const base = known[0].bits_per_byte.baseline;
  const points = known.map(({ model, p50, bits_per_byte: bits }) => ({
    model, ratio: p50.ratio, low: p50.low ?? p50.ratio, high: p50.high ?? p50.ratio,
    bits: bits.value,
    bitsLow: bits.low ? base * bits.low : bits.value, bitsHigh: bits.high ? base * bits.high : bits.value,
  }));
  points.push({ model: baseline, ratio: 1, low: 1, high: 1, bits: base, bitsLow: base, bitsHigh: base });
  const beats = (a, b) => a.ratio <= b.ratio && a.bits <= b.bits && (a.ratio < b.ratio || a.bits < b.bits);
  for (const point of points) point.best = !points.some((other) => beats(other, point));
  return { points: points.sort((a, b) => a.ratio - b.ratio || a.bits - b.bits), why: "" };
}

/** p50 by arm, of rounds without a void block. */
function counted(progress) {
  const gone = new Set((progress?.void ?? []).map(({ round }) => round));
  return Object.fromEntries(Object.entries(progress?.p50_ms ?? {}).map(([arm, values]) =>
    [arm, values.filter((value, round) => value != null && !gone.has(round))]));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : sorted.length ? (sorted[half - 1] + sorted[half]) / 2 : null;
}

async function rounds(progress) {
  const section = byId("rounds");
  if (section.dataset.rounds === String(progress.rounds)) return;
  section.dataset.rounds = progress.rounds;
  section.hidden = false;
  const { arms, p50_ms: p50 } = progress;
  const why = new Map(progress.void.map(({ round, arm, why }) => [`${round} ${arm}`, why]));
  const cell = (arm, round) => why.has(`${round} ${arm}`)
    ? h("abbr", { title: why.get(`${round} ${arm}`) }, "void") : number(p50[arm][round]);
  const known = counted(progress);
  const listed = Array.from({ length: Math.min(progress.rounds, ROUNDS_LISTED) }, (_, i) => progress.rounds - 1 - i);
  const heading = (arm) => h("span", { class: "key", style: `--key: var(${charts.hue(arm, arms)})` }, charts.named(arm));
  byId("rounds-table").replaceChildren(figures(["round", ...arms.map(heading)], [
    ["median", ...arms.map((arm) => number(median(known[arm])))],
    ...listed.map((round) => [round + 1, ...arms.map((arm) => cell(arm, round))]),
  ]));
  await charts.rounds(byId("rounds-plot"), progress);
}

const number = (value) => (value == null ? "–" : milliseconds(value));
