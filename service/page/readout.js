// What every chart offers besides itself: its numbers as a table, and both as files.

import { css, literal, plotly } from "./charts.js";
import { h } from "./dom.js";

const SMALLEST_PX = 640; // width of a saved picture; a phone's chart would be cut
const HEADING_PX = 48; // above it, for its title
const LEGEND_PX = 26; // below it, for each row of four names

/** A table of figures. `number` says which columns are; by default all but the first. */
export function figures(headings, rows, { number = (column) => column > 0 } = {}) {
  const cls = (column) => (number(column) ? "number" : null);
  return h("table", { class: "figures" },
    h("thead", {}, h("tr", {}, headings.map((each, column) => h("th", { scope: "col", class: cls(column) }, each)))),
    h("tbody", {}, rows.map(([head, ...cells]) =>
      h("tr", {},
        h("th", { scope: "row", class: cls(0) }, head),
        cells.map((cell, at) => h("td", { class: cls(at + 1) }, cell))))));
}

/** Around a table that may be wider than the page; to be scrolled by keyboard too. */
export const scrollable = (name, content = [], attributes = {}) =>
  h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": name, ...attributes }, content);

/**
 * The line under a chart: its table, folded, and buttons that save.
 *
 * name: of the files. title: said in them, and of the table. table: gives {columns, rows} of texts, numbers and nulls,
 * when it is wanted. plot: gives the element that Plotly drew into; null where there is no picture. listed: whether
 * the table is to be folded here; false where it stands elsewhere. legend: whether a picture needs its lines' names.
 */
export function readout({ name, title, table, plot = null, listed = true, legend = false }) {
  const complain = (problem = "") => {
    line.querySelector(".error")?.remove();
    if (problem) line.append(h("p", { class: "error", role: "alert" }, problem));
  };
  const button = (label, said, save) => {
    const element = h("button", { type: "button", class: "save", "aria-label": `Save ${title} as ${said}` }, label);
    element.addEventListener("click", () =>
      Promise.resolve().then(save).then(() => complain(), ({ message }) => complain(message)));
    return element;
  };
  const line = h("div", { class: "readout", "data-readout": name },
    listed && table && folded(title, table),
    h("span", { class: "saves" },
      plot && button("PNG", "a PNG picture", () => picture(plot(), "png", { name, title, legend })),
      plot && button("SVG", "an SVG picture", () => picture(plot(), "svg", { name, title, legend })),
      table && button("CSV", "a CSV table", () => download(`${name}.csv`, "text/csv", csv(table())))));
  return line;
}

/** Draw the open tables in `element` anew: what they are of has changed. */
export function refresh(element) {
  for (const details of element.querySelectorAll(".readout details[open]")) details.dispatchEvent(new Event("toggle"));
}

/** Made when it is opened, and anew each time. */
function folded(title, table) {
  const inside = scrollable(`${title}, as a table`);
  const details = h("details", {}, h("summary", {}, "Table", h("span", { class: "aside" }, ` of ${title}`)), inside);
  details.addEventListener("toggle", () => {
    if (!details.open) return inside.replaceChildren();
    const { columns, rows } = table();
    inside.replaceChildren(figures(columns, rows.map((row) => row.map(shown)), { number: (at) => numeric(rows, at) }));
  });
  return details;
}

const numeric = (rows, at) => rows.some((row) => typeof row[at] === "number");

/** A cell as a person reads it: five digits of a number, a dash for what was not measured. */
export function shown(cell) {
  if (cell == null) return "–";
  if (typeof cell !== "number") return cell;
  return String(Number(cell.toPrecision(5))).replace("-", "−");
}

/**
 * Lines {name, x, y, low, high} as one table: a row for each x, a column for each line, its spread beside it. Where a line
 * has several points at one x, or names for them, a row for each point, and the values under `label`.
 */
export function tableOf(heading, lines, label = "y") {
  if (lines.some(({ x, names }) => names || new Set(x).size < x.length)) return pointsOf(heading, lines, label);
  const xs = [...new Set(lines.flatMap(({ x }) => x))];
  if (xs.every((x) => typeof x === "number")) xs.sort((a, b) => a - b);
  const columns = [heading], places = [];
  for (const { name, x, y, low, high } of lines) {
    const at = new Map(x.map((value, i) => [value, i]));
    for (const [label, values] of [[name, y], [`${name}, low`, low], [`${name}, high`, high]]) {
      if (!values) continue;
      columns.push(label);
      places.push((value) => values[at.get(value)] ?? null);
    }
  }
  return { columns, rows: xs.map((x) => [x, ...places.map((place) => place(x))]) };
}

function pointsOf(heading, lines, label) {
  const spreads = ["low", "high"].filter((each) => lines.some((line) => line[each]));
  const named = lines.some(({ names }) => names);
  const own = (line, at) => (named ? [line.names?.[at] ?? null] : []);
  const rows = lines.flatMap((line) => line.x.map((x, at) =>
    [line.name, ...own(line, at), x, line.y[at], ...spreads.map((each) => line[each]?.[at] ?? null)]));
  return { columns: ["line", ...(named ? ["point"] : []), heading, label, ...spreads], rows };
}

function csv({ columns, rows }) {
  const cell = (value) => {
    const text = value == null ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

/** What Plotly drew in `plot` as a file: on paper, under its title, since it will stand alone. */
async function picture(plot, format, { name, title, legend }) {
  const Plotly = await plotly();
  if (!plot?.data) throw new Error("It is not drawn yet.");
  const names = plot.data.filter((trace) => trace.showlegend !== false).length;
  const foot = legend ? LEGEND_PX * Math.ceil(names / 4) : 0;
  const { margin = {}, ...layout } = plot.layout;
  const height = plot.clientHeight + HEADING_PX + foot;
  const font = { family: css("--sans"), color: css("--ink") };
  const figure = {
    data: plot.data,
    layout: {
      ...layout, paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"), showlegend: legend,
      legend: { orientation: "h", x: 0, y: 0, yanchor: "bottom", yref: "container", font },
      title: { text: literal(title), x: 0.02, xanchor: "left", y: 1 - 24 / height, yanchor: "middle", font: { ...font, size: 16 } },
      margin: { ...margin, t: (margin.t ?? 0) + HEADING_PX, b: (margin.b ?? 0) + foot },
    },
  };
  const width = Math.max(plot.clientWidth, SMALLEST_PX);
  const image = await Plotly.toImage(figure, { format, width, height, scale: format === "png" ? 2 : 1, imageDataOnly: true });
  if (format === "svg") return download(`${name}.svg`, "image/svg+xml", image);
  download(`${name}.png`, "image/png", Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0)));
}

function download(name, type, content) {
  const link = h("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
