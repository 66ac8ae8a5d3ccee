// The decision boundaries of two moons as they were while the networks learned: snapshots, and a slider over the epochs.

import { config, described, plotly } from "./charts.js";
import { h } from "./dom.js";
import { readout, scrollable } from "./readout.js";
import { field } from "./study-charts.js";

const FRAME_MS = 450; // of a snapshot while it plays

/** `snapshots` of the study's data. {element, paint, epoch, moveTo, leave}; `changed` is called when the epoch has. */
export function live(snapshots, { epoch, changed }) {
  const { epochs, models, loss, accuracy } = snapshots;
  const names = Object.keys(models);
  const slider = h("input", { id: "epoch", type: "range", min: 0, max: epochs.length - 1, step: 1 });
  const said = h("output", { for: "epoch" });
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const play = h("button", { type: "button", class: "button quiet", id: "play" }, "Play");
  const panes = names.map((name) => {
    const plot = h("div", { class: "plot moons-plot", id: `moons-${name}` });
    const facts = h("span", { class: "facts" });
    return { name, plot, facts };
  });
  let timer = 0;

  const columns = ["epoch", ...names.flatMap((name) => [`${name}, loss`, `${name}, accuracy`])];
  const table = () => ({
    columns, rows: epochs.map((each, at) => [each, ...names.flatMap((name) => [loss[name][at], accuracy[name][at]])]),
  });
  const element = h("section", { class: "moons", "aria-labelledby": "moons-title" },
    h("h4", { id: "moons-title" }, "The decision boundary, epoch by epoch"),
    h("p", { class: "note" }, "The colour is the probability of the upper or the lower moon, the line where it is one half."),
    h("div", { class: "slider" }, h("label", { for: "epoch" }, "Epoch"), slider, said, play),
    h("div", { class: "pair-of-plots" }, panes.map(({ name, plot, facts }) =>
      h("figure", {},
        h("figcaption", {}, h("b", {}, name), " ", facts), plot,
        readout({ name: `moons-${name}`, title: `Decision boundary of ${name}`, plot: () => plot })))),
    readout({ name: "moons-epochs", title: "loss and accuracy by epoch", table }));

  const place = () => Number(slider.value);

  function tell() {
    const at = place();
    said.value = String(epochs[at]);
    slider.setAttribute("aria-valuetext", `epoch ${epochs[at]}`);
    for (const { name, facts } of panes) {
      facts.textContent = `loss ${loss[name][at].toFixed(3)}, accuracy ${(100 * accuracy[name][at]).toFixed(1)} %`;
    }
  }

  async function paint() {
    const Plotly = await plotly();
    const at = place();
    for (const { name, plot, facts } of panes) {
      if (!plot.isConnected) return;
      const { data, layout } = field(picture(snapshots, models[name][at]));
      data[0].showscale = false;
      described(plot, `Decision boundary of ${name} at epoch ${epochs[at]}: ${facts.textContent}`);
      await Plotly.react(plot, data, layout, config());
    }
  }

  function go(at) {
    slider.value = at;
    tell();
    changed();
    return paint();
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  }

  play.addEventListener("click", () => {
    if (timer) return stop();
    if (place() === epochs.length - 1) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (element.closest("[hidden]") || !element.isConnected) return stop();
      go(place() + 1);
      if (place() === epochs.length - 1) stop();
    }, FRAME_MS);
  });
  slider.addEventListener("input", () => {
    stop();
    go(place());
  });
  const calm = () => {
    play.hidden = still.matches;
    if (still.matches) stop();
  };
  still.addEventListener("change", calm);
  calm();

  /** The snapshot nearest to an epoch of the address; the last where it names none. */
  function nearest(wanted) {
    if (wanted == null || !Number.isFinite(Number(wanted))) return epochs.length - 1;
    const away = epochs.map((each) => Math.abs(each - Number(wanted)));
    return away.indexOf(Math.min(...away));
  }
  slider.value = nearest(epoch);
  tell();

  return {
    element, paint, epoch: () => epochs[place()],
    moveTo: (wanted) => nearest(wanted) !== place() && (stop(), go(nearest(wanted))),
    leave: () => (stop(), still.removeEventListener("change", calm)),
  };
}

/** One snapshot as a field: bytes are probabilities of 0 to 255, rows from the lowest y. */
function picture({ extent: [left, right, bottom, top], size: [rows, columns], points }, packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const spread = (from, to, count) => Array.from({ length: count }, (_, i) => from + ((to - from) * i) / (count - 1));
  const z = Array.from({ length: rows }, (_, row) => [...bytes.slice(row * columns, (row + 1) * columns)].map((b) => b / 255));
  const of = (label) => points.x.map((_, i) => i).filter((i) => points.label[i] === label);
  const at = (indices) => [indices.map((i) => points.x[i]), indices.map((i) => points.y[i])];
  const labels = [...new Set(points.label)].sort();
  return {
    x: spread(left, right, columns), y: spread(bottom, top, rows), z,
    points: Object.fromEntries(labels.map((label) => [`class ${label}`, at(of(label))])),
  };
}
