// The page: shows the view that the address names. Each view is a section of index.html and a module with show(fields),
// fetched when it is first looked at: the first view then waits for nothing but its own.

import * as address from "./address.js";
import { complain } from "./dom.js";

const VIEWS = {
  "next-token": () => import("./next-token.js"),
  activations: () => import("./activations.js"),
  studies: () => import("./studies.js"),
  compare: () => import("./compare.js"),
};

async function show() {
  const { view } = address.read();
  for (const link of document.querySelectorAll("nav [data-view]")) {
    const current = link.dataset.view === view;
    document.getElementById(`view-${link.dataset.view}`).hidden = !current;
    if (current) {
      link.setAttribute("aria-current", "page");
      document.title = `${link.textContent} · Actuary`;
    } else link.removeAttribute("aria-current");
  }
  try {
    const module = await VIEWS[view]();
    const now = address.read(); // another may have been named meanwhile, which then shows itself
    if (now.view === view) module.show(now.fields);
  } catch (error) {
    complain(document.querySelector(`#view-${view} .error`), `This place cannot be shown: ${error.message}`);
  }
}

addEventListener("hashchange", show);
show();
