// The pictures of a comparison: differences with their intervals, quality against latency, p50 by round.

import { axis, colour, config, css, plotly, shell } from "./charts.js";
import { milliseconds, percent } from "./text.js";

export const AGAIN = ":again"; // the baseline a second time, the machine's own check
// Shapes tell the outcomes apart without their colours.
const OUTCOMES = {
  slower: ["--slower", "triangle-right"], faster: ["--faster", "triangle-left"],
  equivalent: ["--equivalent", "square"], inconclusive: ["--inconclusive", "circle-open"],
};
const ROW = 34; // pixels of an arm
const SIDES = ["top right", "bottom right", "top left", "bottom left", "top center", "bottom center"];
const LETTER = [7.6, 15]; // pixels of a name's letter, wide and high
const OFF = 7; // pixels from a point's middle to its name
const points = (ratio) => (ratio - 1) * 100;

/** The CSS variable of an arm's colour; the baseline's second block has that of its first. */
export function hue(arm, arms) {
  const model = arm.endsWith(AGAIN) ? arm.slice(0, -AGAIN.length) : arm;
  return colour(model, arms.indexOf(model));
}

/** An arm as a person reads it. */
export const named = (arm) => (arm.endsWith(AGAIN) ? `${arm.slice(0, -AGAIN.length)} (A/A)` : arm);

/** Each arm's p50 over the baseline's with its interval, largest on top, the A/A arm last; the margin is shaded. */
export async function forest(element, arms, { baseline, aa, margin }) {
  const Plotly = await plotly();
  const check = `${baseline} (A/A)`;
  const rows = arms.map(({ model, outcome, p50 }) => whiskers(model, p50, ...OUTCOMES[outcome], outcome));
  if (aa?.ratio != null) rows.push(whiskers(check, aa, "--muted", "diamond", "check"));
  const alone = arms.filter(({ infer }) => infer?.ratio != null);
  rows.push({
    type: "scatter", mode: "markers",
    x: alone.map(({ infer }) => points(infer.ratio)), y: alone.map(({ model }) => model),
    marker: { symbol: "line-ns-open", size: 11, color: css("--muted"), line: { width: 2 } },
    hovertemplate: "%{y}: %{x:+.2f} % in the server’s inference<extra></extra>",
  });
  const names = [...arms.map(({ model }) => model), check];
  element.style.height = `${72 + ROW * names.length}px`;
  await Plotly.react(element, rows, {
    ...shell(), margin: { l: 8, r: 16, t: 8, b: 36 },
    shapes: [{
      type: "rect", yref: "paper", y0: 0, y1: 1, x0: points(1 / (1 + margin)), x1: points(1 + margin),
      fillcolor: css("--track"), line: { width: 0 }, layer: "below",
    }],
    xaxis: { ...axis(), ticksuffix: " %", zeroline: true, zerolinecolor: css("--faint") },
    yaxis: {
      ...axis(), type: "category", categoryorder: "array", categoryarray: names.reverse(),
      range: [-0.6, names.length - 0.4], automargin: true, showgrid: false, tickfont: { color: css("--ink"), size: 13 },
    },
  }, config());
}

function whiskers(row, { ratio, low, high }, variable, symbol, said) {
  const to = (end) => (end == null ? 0 : Math.abs(points(end) - points(ratio)));
  const paint = css(variable);
  return {
    type: "scatter", mode: "markers", x: [points(ratio)], y: [row],
    marker: { color: paint, symbol, size: 12, line: { width: 2, color: paint } },
    error_x: bar(to(low), to(high), paint, 2.5),
    hovertemplate: `%{y}: %{x:+.2f} %, ${said}<extra></extra>`,
  };
}

export const bar = (below, above, color, thickness) =>
  ({ type: "data", symmetric: false, array: [above], arrayminus: [below], color, thickness, width: 5 });

/** Bits per byte of held-out text against p50, both better when lower; a staircase joins those whom nobody beats. */
export async function frontier(element, found, models, baseline, ms) {
  const Plotly = await plotly();
  element.style.height = "24rem";
  const best = found.filter((point) => point.best);
  const xs = room(found.flatMap(({ ratio, low, high }) => [ratio, low, high].map(points)), 1);
  const ys = room(found.flatMap(({ bits, bitsLow, bitsHigh }) => [bits, bitsLow, bitsHigh]), 0.01);
  const places = sides(found, element, xs, ys);
  const line = {
    type: "scatter", mode: "lines", x: best.map(({ ratio }) => points(ratio)), y: best.map(({ bits }) => bits),
    hoverinfo: "skip", line: { shape: "hv", width: 2, dash: "dot", color: css("--faint") },
  };
  const dots = found.map(({ model, ratio, low, high, bits, bitsLow, bitsHigh, best }, i) => {
    const paint = css(hue(model, models));
    return {
      type: "scatter", mode: "markers+text", x: [points(ratio)], y: [bits], text: [best ? `<b>${model}</b>` : model],
      textposition: places[i], textfont: { color: paint },
      marker: { size: 12, color: paint, symbol: best ? "circle" : "circle-open", line: { width: 2, color: paint } },
      error_x: bar(points(ratio) - points(low), points(high) - points(ratio), paint, 1.5),
      error_y: bar(bits - bitsLow, bitsHigh - bits, paint, 1.5),
      hovertemplate: `${model}: ${percent(ratio)} p50, %{y:.4f} bits per byte<extra></extra>`,
    };
  });
  const ticks = steps(...xs, element.clientWidth / 75);
  const title = (text) => ({ text, font: { color: css("--muted"), size: 12 }, standoff: 8 });
  await Plotly.react(element, [line, ...dots], {
    ...shell(), margin: { l: 8, r: 12, t: 8, b: 8 },
    xaxis: {
      ...axis(), range: xs, zeroline: false, automargin: true, tickvals: ticks,
      title: title(`p50${ms ? ", ms" : ""}, and over ${baseline}’s`),
      ticktext: ticks.map((tick) => `${ms ? `${milliseconds(ms * (1 + tick / 100))}<br>` : ""}${tick > 0 ? "+" : ""}${tick} %`),
    },
    yaxis: { ...axis(), range: ys, zeroline: false, automargin: true, title: title("bits per byte") },
  }, config());
}

/** An axis' range: every bar, and space for the names beside the points. */
function room(values, least) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = 0.16 * Math.max(high - low, least);
  return [low - pad, high + pad];
}

/** Round numbers of percent within the range, at most `most`, 0 among them. */
function steps(low, high, most) {
  let step = 0.01;
  for (let i = 0; (high - low) / step > Math.max(2, most); i++) step *= [2, 2.5, 2][i % 3];
  const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
  return Array.from({ length: count }, (_, i) => Number(((Math.ceil(low / step) + i) * step).toFixed(6)) + 0);
}

/** Where each name stands: the first side on which it covers the least of points, bars, stairs and other names. */
function sides(found, element, xs, ys) {
  const wide = element.clientWidth - 70, high = element.clientHeight - 85; // without the axes' own texts
  const across = (ratio) => wide * (points(ratio) - xs[0]) / (xs[1] - xs[0]);
  const up = (bits) => high * (bits - ys[0]) / (ys[1] - ys[0]);
  const box = (left, bottom, right, top, air) => [left - air, bottom - air, right + air, top + air];
  const taken = found.flatMap((point) => {
    const x = across(point.ratio), y = up(point.bits);
    return [
      box(x, y, x, y, 5),
      box(across(point.low), y, across(point.high), y, 2), box(x, up(point.bitsLow), x, up(point.bitsHigh), 2),
    ];
  });
  const best = found.filter((point) => point.best);
  for (const [i, to] of best.slice(1).entries()) {
    const x = across(best[i].ratio), y = up(best[i].bits);
    taken.push(box(x, y, across(to.ratio), y, 1), box(across(to.ratio), up(to.bits), across(to.ratio), y, 1));
  }
  const shared = (a, b) =>
    Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const outside = (box) => shared(box, box) - shared(box, [0, 0, wide, high]);
  return found.map(({ model, ratio, bits }) => {
    const width = LETTER[0] * model.length + 4;
    const boxes = SIDES.map((side) => {
      const [vertical, horizontal] = side.split(" ");
      const left = across(ratio) + { right: OFF, center: -width / 2, left: -OFF - width }[horizontal];
      const bottom = up(bits) + { top: OFF, bottom: -OFF - LETTER[1] }[vertical];
      return [left, bottom, left + width, bottom + LETTER[1]];
    });
    const covered = boxes.map((box) => taken.reduce((sum, other) => sum + shared(box, other), 0) + outside(box));
    const least = covered.indexOf(Math.min(...covered));
    taken.push(boxes[least]);
    return SIDES[least];
  });
}

/** Each arm's p50 by round, the A/A arm dashed; a void block is a gap. */
export async function rounds(element, { rounds: count, arms, p50_ms: p50, void: gone }) {
  const Plotly = await plotly();
  const none = new Set(gone.map(({ round, arm }) => `${round} ${arm}`));
  const traces = arms.map((arm) => ({
    type: "scatter", mode: count < 40 ? "lines+markers" : "lines", name: named(arm),
    x: Array.from({ length: count }, (_, i) => i + 1),
    y: p50[arm].map((value, round) => (none.has(`${round} ${arm}`) ? null : value)),
    line: { color: css(hue(arm, arms)), width: count < 100 ? 1.8 : 1, dash: arm.endsWith(AGAIN) ? "dot" : "solid" },
    marker: { size: 5 }, hovertemplate: "%{y:.2f} ms",
  }));
  element.style.height = "";
  await Plotly.react(element, traces, {
    ...shell(), margin: { l: 8, r: 12, t: 12, b: 32 }, hovermode: "x unified",
    xaxis: {
      ...axis(), zeroline: false, range: [1 - count / 50, count * 1.02], dtick: count < 10 ? 1 : undefined,
      unifiedhovertitle: { text: "round %{x}" },
    },
    yaxis: {
      ...axis(), ...latencies(traces.flatMap(({ y }) => y.filter((ms) => ms > 0))), zeroline: false, automargin: true,
    },
  }, config());
}

/** An axis on which one stall does not flatten all else; an ordinary one where there is none. */
export function latencies(values) {
  const low = Math.min(...values) * 0.9, high = Math.max(...values) * 1.1;
  if (!(high > 3 * low)) return {};
  const digits = high > 12 * low ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const decades = Array.from({ length: 12 }, (_, i) => 10 ** (i - 4));
  const ticks = decades.flatMap((decade) => digits.map((digit) => Number((digit * decade).toPrecision(2))))
    .filter((tick) => tick >= low && tick <= high);
  return { type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: ticks, ticktext: ticks.map(String) };
}
