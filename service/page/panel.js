// One variant's answer as a panel: who answered, the table of tokens with their bars, and what computing it took. Each
// token is a button, which puts it behind the prompt.

import { h } from "./dom.js";
import { milliseconds, probability, significant, visible } from "./text.js";

/** One entry of `results` in the answer of POST /v1/next-token. */
export function panel(result) {
  const title = `answer-${result.model}`;
  const provider = result.provider.replace("ExecutionProvider", "");
  const facts = [result.precision, provider, `${result.prompt_tokens} ${result.prompt_tokens === 1 ? "token" : "tokens"} in`];
  if (result.activation !== result.model) facts.unshift(result.activation);
  return h("article", { class: "panel", "data-model": result.model, "aria-labelledby": title },
    h("header", {},
      h("h3", { id: title }, result.model),
      h("p", { class: "facts" }, h("span", { class: `key ${result.head}` }, `${result.head} head`), ` · ${facts.join(" · ")}`),
    ),
    table(result, title),
    inference(result.timing_ms.infer),
  );
}

function table({ softmax, sigmoid, top, chosen }, title) {
  return h("table", { class: "tokens", "aria-labelledby": title },
    h("thead", {}, h("tr", {},
      h("th", { scope: "col", class: "rank" }, h("span", { class: "aside" }, "Rank")),
      h("th", { scope: "col", class: "token" }, "Token"),
      h("th", { scope: "col" }, h("span", { class: "key softmax" }, "softmax")),
      h("th", { scope: "col" }, h("span", { class: "key sigmoid" }, "sigmoid")),
    )),
    h("tbody", { class: "sums" },
      sum("Mass", "mass", significant(softmax.mass), significant(sigmoid.mass)),
      sum("Entropy, bits", "entropy", softmax.entropy_bits.toFixed(2), sigmoid.entropy_bits.toFixed(2)),
    ),
    h("tbody", { class: "top" }, top.map(token)),
    chosen.length > 0 && h("tbody", { class: "chosen" },
      h("tr", {}, h("th", { scope: "rowgroup", colspan: 4 }, "Asked for")), chosen.map(token)),
  );
}

function sum(label, name, softmax, sigmoid) {
  return h("tr", { "data-sum": name },
    h("th", { scope: "row", colspan: 2 }, label), h("td", {}, softmax), h("td", {}, sigmoid));
}

function token(entry) {
  const text = JSON.stringify(entry.text);
  const whole = `${text}, id ${entry.id}, logit ${entry.logit.toFixed(3)}; put it behind the prompt`;
  const step = h("button", { type: "button", class: "step", value: entry.id, title: whole, "aria-label": text },
    h("code", {}, visible(entry)));
  return h("tr", { "data-id": entry.id },
    h("td", { class: "rank" }, entry.rank),
    h("th", { scope: "row", class: "token" }, step),
    bar("softmax", entry.softmax),
    bar("sigmoid", entry.sigmoid),
  );
}

// The number is what is read out; the bar, from 0 to 1 as well, says the same to the eye only.
function bar(name, value) {
  return h("td", { class: `bar ${name}` },
    h("span", { class: "track", style: `--value: ${value}`, "aria-hidden": "true" }),
    h("data", { class: "number", value }, probability(value)));
}

// Alone: the request's variants are computed one after the other, so the queue and the total of a later one hold the
// time of those before it, and would say that it is the slower.
function inference(ms) {
  return h("p", { class: "timing" }, "inference ", h("data", { value: ms }, milliseconds(ms)), h("abbr", { title: "milliseconds" }, " ms"));
}

/** All panels as one chart of study-charts.js: the tokens that any of them lists, in the first one's order. */
export function chartOf(results) {
  const seen = new Map(results.flatMap(({ top, chosen }) => [...top, ...chosen]).map((entry) => [entry.id, entry]));
  const name = (id) => visible(seen.get(id)).map((piece) => piece.textContent ?? piece).join("");
  const lines = results.flatMap(({ model, top, chosen }) => {
    const entries = [...new Map([...top, ...chosen].map((entry) => [entry.id, entry])).values()];
    return ["softmax", "sigmoid"].map((kind) => ({
      name: results.length > 1 ? `${model}, ${kind}` : kind,
      x: entries.map(({ id }) => name(id)), y: entries.map((entry) => entry[kind]),
    }));
  });
  return {
    type: "chart", name: "answer", title: "The next token, side by side", x_label: "token", y_label: "probability", lines,
    kind: "points", log_x: false, log_y: true, note: "",
  };
}

/** All panels as one table, for who wants the figures. */
export function tableOf(results) {
  const columns = ["variant", "head", "asked for", "rank", "id", "text", "logit", "softmax", "sigmoid"];
  const rows = results.flatMap(({ model, head, top, chosen }) =>
    [[top, ""], [chosen, "yes"]].flatMap(([entries, why]) =>
      entries.map(({ rank, id, text, logit, softmax, sigmoid }) =>
        [model, head, why, rank, id, JSON.stringify(text), logit, softmax, sigmoid])));
  return { columns, rows };
}
