// Charts as a study describes them: lines, points or bars with their spread, and fields of colour with points over them.

import { axis, colour, config, css, DASHES, described, faint, HUES, literal, plotly, shell } from "./charts.js";
import { h } from "./dom.js";
import * as readout from "./readout.js";

const ROW_PX = 22, BAR_PX = 11; // of a row, and of each of its bars where there are several
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star"];
const FIELD_SYMBOLS = ["circle", "triangle-up", "square", "diamond"];
const FEW = 6; // names that stand side by side; more are rows

const hidden = new WeakMap(); // chart -> the names of its lines that are switched off

const off = (chart) => hidden.get(chart) ?? new Set();
const isText = ({ lines }) => lines.some(({ x }) => x.some((value) => typeof value === "string"));
const namesOf = ({ lines }) => [...new Set(lines.flatMap(({ x }) => x))];
const lying = (chart) => chart.kind !== "lines" && isText(chart) && namesOf(chart).length > FEW;

/** The lines' names as buttons that switch them; null where there is one line, or a field. */
export function legend(chart, changed) {
  if (chart.type === "field" || chart.lines.length < 2) return null;
  const switched = (name) => {
    const names = new Set(off(chart));
    if (!names.delete(name)) names.add(name);
    hidden.set(chart, names);
  };
  return h("ul", { class: "legend switches", "aria-label": "Lines shown" }, chart.lines.map(({ name, dashed }, slot) => {
    const style = `--tint: var(${colour(name, slot)})`;
    const pressed = String(!off(chart).has(name));
    const button = h("button", { type: "button", "aria-pressed": pressed, class: dashed && "dashed", style }, name);
    button.addEventListener("click", () => {
      switched(name);
      button.setAttribute("aria-pressed", String(!off(chart).has(name)));
      changed();
    });
    return h("li", {}, button);
  }));
}

/** {columns, rows} of what is drawn: of a field, a row for each y. */
export function tableOf(chart) {
  if (chart.type === "field") {
    const rows = chart.y.map((y, row) => [y, ...chart.z[row]]);
    return { columns: ["y \\ x", ...chart.x.map((x) => readout.shown(x))], rows };
  }
  return readout.tableOf(chart.x_label || "x", chart.lines, chart.y_label || "y");
}

/** `chart` of a study's JSON into `element`. */
export async function draw(element, chart) {
  const Plotly = await plotly();
  if (!element?.isConnected) return;
  const drawn = chart.type === "field" ? field(chart) : lines(chart, element);
  described(element, words(chart));
  await Plotly.react(element, drawn.data, drawn.layout, config());
}

function words(chart) {
  if (chart.type === "field") return `${chart.title}: values by colour over x and y`;
  const names = chart.lines.map(({ name }) => name).join(", ");
  return `${chart.title}: ${chart.y_label} by ${chart.x_label}, of ${names}`;
}

// A bar's length says nothing where its axis has no 0.
const drawnAs = ({ kind, log_y: log }) => (kind === "bars" && log ? "points" : kind);

function lines(chart, element) {
  const flat = lying(chart);
  const data = chart.lines.flatMap((line, slot) => {
    if (off(chart).has(line.name)) return [];
    const paint = css(colour(line.name, slot));
    line = { ...line, name: literal(line.name), x: line.x.map(literal) };
    if (chart.kind === "lines") return [...band(line, paint), curve(line, slot, paint)];
    if (chart.kind === "points" && line.dashed) return [curve(line, slot, paint)]; // a bound that the points lie under
    return [marks(drawnAs(chart), line, slot, paint, flat)];
  });
  const row = drawnAs(chart) === "bars" ? Math.max(ROW_PX, BAR_PX * (chart.lines.length + 1)) : ROW_PX;
  element.style.height = flat ? `${80 + row * namesOf(chart).length}px` : "";
  const all = (field) => chart.lines.flatMap((line) => line[field] ?? []);
  const x = axisOf(chart.x_label, chart.log_x, all("x")), y = axisOf(chart.y_label, chart.log_y, ["y", "low", "high"].flatMap(all));
  const names = isText(chart) ? { type: "category", categoryorder: "array", categoryarray: namesOf(chart).map(literal) } : {};
  return {
    data,
    layout: {
      ...shell(), margin: { l: 8, r: 12, t: 8, b: 8 }, hovermode: chart.kind === "lines" ? "x unified" : "closest",
      barmode: "group", bargap: 0.25,
      xaxis: flat ? y : { ...x, ...names },
      yaxis: flat ? { ...axisOf(""), ...names, autorange: "reversed", dtick: 1, zeroline: false, tickfont: { color: css("--ink"), size: 12 } } : y,
    },
  };
}

function axisOf(label, log = false, values = []) {
  const title = { text: literal(label), font: { color: css("--muted"), size: 12 }, standoff: 8 };
  const sizes = values.filter((value) => value > 0);
  // Over a hundredfold range powers of ten alone say enough, and of many not all; below, 2 and 5 too. More would crowd.
  const decades = Math.log10(Math.max(...sizes) / Math.min(...sizes));
  const dtick = decades > 2 ? Math.ceil(decades / 8) : "D2";
  const ticks = log ? { type: "log", exponentformat: "power", dtick } : {};
  return { ...axis(), ...ticks, automargin: true, title: label ? title : undefined };
}

/** Its spread, as a band; gaps are left out of it. */
function band({ x, low, high }, paint) {
  if (!low || !high) return [];
  const known = x.map((_, at) => at).filter((at) => low[at] != null && high[at] != null);
  const at = [...known, ...known.toReversed()];
  const ys = [...known.map((i) => high[i]), ...known.toReversed().map((i) => low[i])];
  return [{
    type: "scatter", mode: "lines", x: at.map((i) => x[i]), y: ys, fill: "toself", fillcolor: faint(paint, 0.18),
    line: { width: 0, color: paint }, hoverinfo: "skip", showlegend: false,
  }];
}

function curve({ name, x, y, dashed }, slot, paint) {
  const dash = dashed ? "dash" : DASHES[Math.floor(slot / HUES) % DASHES.length];
  const mode = x.length <= 16 ? "lines+markers" : "lines";
  return {
    type: "scatter", mode, name, x, y, line: { color: paint, width: 2, dash, simplify: false },
    marker: { size: 5, symbol: SYMBOLS[slot % SYMBOLS.length] }, hovertemplate: "%{y:.4g}",
  };
}

function marks(kind, { name, x, y, low, high, names }, slot, paint, flat) {
  const error = low && high && {
    type: "data", symmetric: false, color: kind === "bars" ? css("--ink") : paint, thickness: 1.5, width: 4,
    array: y.map((value, at) => (high[at] == null ? 0 : high[at] - value)),
    arrayminus: y.map((value, at) => (low[at] == null ? 0 : value - low[at])),
  };
  const trace = {
    type: kind === "bars" ? "bar" : "scatter", mode: "markers", name,
    customdata: names?.map(literal),
    hovertemplate: `${name}${names ? ", %{customdata}" : ""}: ${flat ? "%{y}, %{x:.4g}" : "%{x}, %{y:.4g}"}<extra></extra>`,
    marker: { color: kind === "bars" ? faint(paint, 0.75) : paint, size: 9, symbol: SYMBOLS[slot % SYMBOLS.length] },
    ...(flat ? { x: y, y: x, orientation: "h", error_x: error || undefined } : { x, y, error_y: error || undefined }),
  };
  if (kind === "bars") delete trace.mode;
  return trace;
}

/** Colours from one hue through paper to the other; a line where a probability is one half. */
export function field({ x, y, z, points }) {
  const values = z.flat().filter((value) => value != null);
  const probability = Math.min(...values) >= 0 && Math.max(...values) <= 1;
  const range = probability ? { zmin: 0, zmax: 1 } : {};
  const scale = [[0, css("--hue-5")], [0.5, css("--raised")], [1, css("--hue-2")]];
  const data = [{
    type: "heatmap", x, y, z, colorscale: scale, ...range, zsmooth: "best", opacity: 0.75, showlegend: false,
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: css("--muted"), size: 11 } },
    hovertemplate: "x %{x:.3g}, y %{y:.3g}: %{z:.3g}<extra></extra>",
  }];
  if (probability) {
    data.push({
      type: "contour", x, y, z, showscale: false, hoverinfo: "skip", showlegend: false,
      contours: { start: 0.5, end: 0.5, size: 1, coloring: "none" }, line: { color: css("--ink"), width: 2 },
    });
  }
  for (const [slot, [name, [xs, ys]]] of Object.entries(points ?? {}).entries()) {
    data.push({
      type: "scatter", mode: "markers", name: literal(name), x: xs, y: ys, hovertemplate: `${literal(name)}<extra></extra>`,
      marker: {
        symbol: FIELD_SYMBOLS[slot % FIELD_SYMBOLS.length], size: 6, color: css(slot % 2 ? "--hue-2" : "--hue-5"),
        line: { color: css("--raised"), width: 0.8 },
      },
    });
  }
  const plain = { ...axis(), zeroline: false, showgrid: false, automargin: true };
  return {
    data,
    layout: {
      ...shell(), margin: { l: 8, r: 8, t: 8, b: 8 },
      xaxis: { ...plain, range: [x[0], x.at(-1)] }, yaxis: { ...plain, range: [y[0], y.at(-1)] },
    },
  };
}
