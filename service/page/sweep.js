// The sweep of rates of a comparison: latency against rate, each variant's knee, and how many answers were in time.

import { axis, config, css, described, faint, plotly, shell } from "./charts.js";
import { AGAIN, bar, hue, latencies, named } from "./compare-charts.js";
import { byId, h } from "./dom.js";
import { figures, readout, scrollable } from "./readout.js";
import { milliseconds, significant } from "./text.js";

const TITLE = "Latency against rate";
const SPLIT = 0.34; // of the height, below it the good answers
const AIR = 0.07; // between the two

const rate = (value) => String(Number(significant(value)));
const armsOf = ({ sweep }, models) => [...new Set(sweep.map(({ arm }) => arm))]
  .sort((a, b) => place(a, models) - place(b, models));
const place = (arm, models) => (arm.endsWith(AGAIN) ? models.length : models.indexOf(arm));

/** Its exhibit, yet to be drawn; null where there was no sweep. */
export function exhibit(result, models) {
  if (!result.sweep?.length) return null;
  const { objective_ms: bound, objective_given: given } = result;
  const arms = armsOf(result, models);
  const key = (arm) => h("span", { class: "key", style: `--key: var(${hue(arm, models)})` }, named(arm));
  return h("section", { id: "sweep", class: "exhibit", "aria-labelledby": "sweep-title" },
    h("div", { class: "said" },
      h("h4", { id: "sweep-title" }, TITLE),
      h("p", { class: "note" },
        "Above, latency from the planned send: p99 with a mark for each rate, a cross where the plan was not kept, and p50 " +
        `dotted. The dashed line is the objective, ${milliseconds(bound)} ms, ` +
        `${given ? "as asked for" : "5 times the baseline’s idle p50, since none was asked for"}; a diamond on it is a ` +
        "variant’s knee, the highest rate at which p99 stays within, and its bar the 95 % interval. Below, answers within " +
        "the objective: on the grey line all are.")),
    h("div", { id: "sweep-plot", class: "plot" }),
    scrollable(`${TITLE}, the knees`, [
      figures(["variant", "knee, /s", "95 % interval", "most in time, /s", "at, /s"], arms.map((arm) => [key(arm), ...kneeOf(result, arm)])),
    ], { id: "sweep-table" }),
    readout({
      name: "comparison-sweep", title: TITLE, table: () => tableOf(result, arms), plot: () => byId("sweep-plot"), legend: true,
    }));
}

/** Knee, its interval, most good answers and at which rate, as texts. */
function kneeOf({ sweep, knee, goodput, objective_ms: bound }, arm) {
  const rows = sweep.filter((row) => row.arm === arm);
  const rates = rows.map((row) => row.rate);
  const below = `below ${rate(Math.min(...rates))}`, above = `above ${rate(Math.max(...rates))}`;
  const lowest = rows.reduce((least, row) => (row.rate < least.rate ? row : least));
  const { rate: at, low, high, few } = knee[arm] ?? {};
  const outside = lowest.kept_plan && lowest.p99_ms <= bound ? above : below;
  const interval = at == null ? "–" : few ? "too few blocks"
    : `${low == null ? below : rate(low)} to ${high == null ? above : rate(high)}`;
  const best = goodput[arm];
  return [at == null ? outside : rate(at), interval, best ? rate(best.per_s) : "0", best ? rate(best.rate) : "–"];
}

/** All that is drawn, a row for each arm and rate. */
function tableOf({ sweep }, arms) {
  const columns = ["variant", "rate, /s", "p50, ms", "p99, ms", "in time, /s", "answered, /s", "plan kept", "blocks"];
  const rows = arms.flatMap((arm) => sweep.filter((row) => row.arm === arm).map((row) => [
    named(arm), row.rate, row.p50_ms, row.p99_ms, row.goodput_per_s, row.requests_per_s, row.kept_plan ? "yes" : "no", row.blocks,
  ]));
  return { columns, rows };
}

/** Into `element`, where there was a sweep. */
export async function draw(element, result, models) {
  if (!element || !result.sweep?.length) return;
  const Plotly = await plotly();
  const arms = armsOf(result, models);
  described(element, `${TITLE} of ${arms.map(named).join(", ")}: p99 and p50, each one’s knee, and good answers per second`);
  const { objective_ms: bound, sweep } = result;
  const rates = sweep.map((row) => row.rate), widest = Math.max(...rates);
  const known = sweep.flatMap((row) => [row.p50_ms, row.p99_ms]).filter((ms) => ms > 0);
  const title = (text) => ({ text, font: { color: css("--muted"), size: 12 }, standoff: 8 });
  const plain = { type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false };
  element.style.height = "30rem";
  await Plotly.react(element, [
    { ...plain, x: [0, 1.04 * widest], y: [bound, bound], line: { color: css("--muted"), width: 1, dash: "dash" } },
    { ...plain, x: [0, widest], y: [0, widest], yaxis: "y2", line: { color: css("--faint"), width: 1 } },
    ...arms.flatMap((arm) => traces(result, arm, css(hue(arm, models)))),
  ], {
    ...shell(), margin: { l: 8, r: 12, t: 8, b: 8 },
    xaxis: {
      ...axis(), range: [0, 1.04 * widest], zeroline: false, automargin: true, anchor: "y2", title: title("planned arrivals per second"),
    },
    yaxis: {
      ...axis(), ...latencies([...known, bound]), domain: [SPLIT + AIR, 1], zeroline: false, automargin: true, title: title("ms"),
    },
    yaxis2: { ...axis(), domain: [0, SPLIT], rangemode: "tozero", zeroline: false, automargin: true, title: title("in time, /s") },
  }, config());
}

function traces({ sweep, knee, objective_ms: bound }, arm, paint) {
  const rows = sweep.filter((row) => row.arm === arm);
  const again = arm.endsWith(AGAIN);
  const x = rows.map((row) => row.rate);
  const of = (field) => rows.map((row) => row[field]);
  const said = (what) => `${named(arm)}: ${what} at %{x:.4g}/s<extra></extra>`;
  const symbol = rows.map((row) => (row.kept_plan ? (again ? "circle-open" : "circle") : "x-thin-open"));
  const marker = { symbol, size: 7, color: paint, line: { width: 1.5, color: paint } };
  const line = { color: paint, width: again ? 1 : 2 };
  const quiet = { type: "scatter", showlegend: false };
  const { rate: at, low, high } = knee[arm] ?? {};
  return [
    { ...quiet, mode: "lines", x, y: of("p50_ms"), line: { color: faint(paint, 0.8), width: 1.5, dash: "dot" }, hovertemplate: said("p50 %{y:.1f} ms") },
    { type: "scatter", mode: "lines+markers", name: named(arm), x, y: of("p99_ms"), line, marker, hovertemplate: said("p99 %{y:.1f} ms") },
    { ...quiet, mode: "lines+markers", x, y: of("goodput_per_s"), yaxis: "y2", line, marker: { ...marker, size: 5 }, hovertemplate: said("%{y:.4g}/s in time") },
    at != null && {
      ...quiet, mode: "markers", x: [at], y: [bound],
      marker: { symbol: again ? "diamond-open" : "diamond", size: 12, color: paint, line: { width: 1.5, color: again ? paint : css("--paper") } },
      error_x: bar(low == null ? 0 : at - low, high == null ? 0 : high - at, paint, 2),
      hovertemplate: `${named(arm)}: knee at %{x:.4g}/s<extra></extra>`,
    },
  ].filter(Boolean);
}
