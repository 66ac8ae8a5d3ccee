// Plotly in the page's own colours. Its script is 4.8 MB, so it is fetched when the first chart is wanted.

import { saturated } from "./saturation.js";

let script = null;

/** Plotly, fetched once. */
export function plotly() {
  script ??= new Promise((resolve, reject) => {
    const element = document.createElement("script");
    element.src = "/assets/plotly.min.js";
    element.onload = () => resolve(window.Plotly);
    element.onerror = () => {
      script = null;
      element.remove();
      reject(new Error("The service did not give Plotly's script, so no curve can be drawn."));
    };
    document.head.append(element);
  });
  return script;
}

/** The value of a CSS variable as the colour scheme has it now. */
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// x where every bend is seen, and the most of y that is shown of what grows fast (relu2) or has poles (solu's slope).
const X = [-4, 4];
const REACH = { y: [-2.6, 4.4], slope: [-1, 2.6] };
export const DASHES = ["solid", "dash", "dot"];
const line = (variable, width, dash) => ({ color: css(variable), width, dash, simplify: false });

const touch = () => matchMedia("(hover: none)").matches; // there a drag must scroll the page

/** `#rrggbb` with an opacity. */
export function faint(colour, opacity) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

/** A text as Plotly draws it letter by letter: of its own it takes <b> for markup and &lt; for <. Numbers as they are. */
export const literal = (text) =>
  (typeof text === "string" ? text.replaceAll("&", "&amp;").replaceAll("<", "&lt;") : text);

/** Say to who cannot see it what a chart shows; its table, beside it, has the figures. */
export function described(element, words) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", words);
}

/** What every chart with axes has, in the colours of now. */
export function shell() {
  return {
    showlegend: false, hovermode: "closest", dragmode: touch() ? false : "zoom",
    paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: css("--sans"), color: css("--ink"), size: 13 },
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 } },
    modebar: { bgcolor: "transparent", color: css("--muted"), activecolor: css("--ink") },
  };
}

export function axis() {
  return {
    gridcolor: css("--grid"), zerolinecolor: css("--zero"), zerolinewidth: 1, fixedrange: touch(),
    tickfont: { color: css("--muted"), size: 12 }, ticklabelstandoff: 8,
  };
}

export function config() {
  return {
    responsive: true, displaylogo: false, displayModeBar: touch() ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    showSendToCloud: false, plotlyServerURL: "", // since 4.0 Plotly offers to send a chart to its makers
  };
}

/** The lines of `chosen` [{name, curve, slot}] over each other; `field` is y or slope. The slot says the colour. Of a
    single one the parts where it saturates are shaded. */
export async function overlay(element, chosen, field) {
  const Plotly = await plotly();
  const traces = chosen.map(({ name, curve, slot }) => ({
    type: "scatter", mode: "lines", name, x: curve.x, y: curve[field], hovertemplate: "%{y:.4f}",
    line: line(colour(name, slot), 2.2, DASHES[Math.floor(slot / HUES) % DASHES.length]),
  }));
  const layout = {
    ...shell(), margin: { l: 40, r: 12, t: 12, b: 32 }, hovermode: "x unified",
    shapes: chosen.length === 1 ? shades(chosen[0].curve) : [],
    xaxis: { ...axis(), range: X, hoverformat: ".2f", showspikes: false, unifiedhovertitle: { text: "x = %{x}" } },
    yaxis: { ...axis(), range: visibleRange(traces, REACH[field]) },
  };
  await Plotly.react(element, traces, layout, config());
}

/** Where an activation saturates, as bands of the whole height. */
function shades(curve) {
  return saturated(curve).map(([x0, x1]) => ({
    type: "rect", yref: "paper", y0: 0, y1: 1, x0, x1, fillcolor: css("--shade"), line: { width: 0 }, layer: "below",
  }));
}

/** A thumbnail: the curve, its slope fainter behind it, in the same window for every activation; shaded where it
    saturates. */
export async function thumbnail(element, curve) {
  const Plotly = await plotly();
  const trace = (field, colour, width) => ({
    type: "scatter", mode: "lines", x: curve.x, y: curve[field], line: line(colour, width), hoverinfo: "skip",
  });
  const axis = { showgrid: false, showticklabels: false, zerolinecolor: css("--grid"), fixedrange: true };
  const layout = {
    margin: { l: 0, r: 0, t: 0, b: 0 }, showlegend: false, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    xaxis: { ...axis, range: X }, yaxis: { ...axis, range: [-1.4, 2.8] }, shapes: shades(curve),
  };
  const traces = [trace("slope", "--faint", 1.2), trace("y", "--ink", 1.8)];
  await Plotly.react(element, traces, layout, { staticPlot: true, responsive: true });
}

/** Tell the charts in `element` that its size may have changed while it was hidden. */
export function resized(element) {
  for (const plot of element.querySelectorAll(".js-plotly-plot")) window.Plotly.Plots.resize(plot);
}

export const HUES = 7; // --hue-0 to --hue-6

/** The CSS variable of a line's colour; softmax and sigmoid keep theirs everywhere. */
export function colour(name, slot) {
  return name === "softmax" || name === "sigmoid" ? `--${name}` : `--hue-${slot % HUES}`;
}

/** The range of y over X, no further than `reach`, and a little air. */
function visibleRange(traces, [low, high]) {
  const seen = traces.flatMap(({ x, y }) => y.filter((_, i) => x[i] >= X[0] && x[i] <= X[1]));
  const bottom = Math.max(low, Math.min(0, ...seen));
  const top = Math.min(high, Math.max(1, ...seen));
  const air = 0.06 * (top - bottom);
  return [bottom - air, top + air];
}
