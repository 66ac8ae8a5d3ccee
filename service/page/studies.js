// The studies view: all that were run with their verdicts, and the one that the address names.

import * as address from "./address.js";
import * as api from "./api.js";
import { resized } from "./charts.js";
import { byId, complain, h } from "./dom.js";
import * as study from "./study.js";

let open = null; // name of the one shown
let asked = 0; // counts what was asked for: an answer to an older question is dropped

export async function show(fields) {
  const mine = ++asked;
  const name = fields.get("study"), epoch = fields.get("epoch");
  try {
    const { data, damaged } = await api.studies();
    const found = name && (open === name ? null : await api.study(name));
    if (mine !== asked) return;
    list(data, damaged, name);
    complain(byId("studies-error"));
    if (!name) close();
    else if (found) await draw(found, epoch);
    else study.moveTo(epoch);
    write();
    resized(byId("study"));
  } catch (error) {
    if (mine !== asked) return;
    close();
    complain(byId("studies-error"), error.message);
  }
}

const write = () => address.write("studies", open ? { study: open, ...study.state() } : {});

function close() {
  open = null;
  study.leave();
  byId("study").hidden = true;
  byId("studies").classList.remove("open");
}

/** `found` of GET /v1/studies/NAME; the focus goes to its title where a link in the list was followed. */
async function draw(found, epoch) {
  const followed = byId("studies-list").contains(document.activeElement);
  open = found.claim.name;
  byId("study").hidden = false;
  byId("studies").classList.add("open");
  const drawn = study.draw(found, { epoch, changed: write });
  if (followed) byId("study-title").focus();
  if (followed || matchMedia("(max-width: 64rem)").matches) byId("study").scrollIntoView();
  await drawn;
}

function list(studies, damaged, name) {
  const none = !studies.length;
  byId("studies-none").hidden = !none && !damaged.length;
  byId("studies-none").replaceChildren(
    ...(none ? ["No study has been run here. ", h("code", {}, "actuary study all"), " measures all the claims, and with ",
      h("code", {}, "--quick"), " in some minutes; the page then shows what they find."] : []),
    ...damaged.map(({ name, reason }) => h("p", {}, `The study ${name} cannot be shown: ${reason}.`)));
  const focused = document.activeElement?.closest("#studies-list a")?.dataset.study;
  byId("studies-list").replaceChildren(...studies.map((each) => entry(each, name)));
  if (focused) byId("studies-list").querySelector(`a[data-study="${focused}"]`)?.focus();
}

function entry({ claim, verdict, sentence, quick }, name) {
  const current = claim.name === name;
  return h("li", {},
    h("a", { href: `#studies?study=${claim.name}`, "data-study": claim.name,
      "aria-current": current && "true" },
      `${claim.number}. ${claim.title}`),
    h("p", {}, study.badge(verdict), quick && h("span", { class: "state" }, "quick")),
    h("p", { class: "facts" }, sentence));
}
