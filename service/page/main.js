// The page: shows the view that the address names. Each view is a section of index.html and a module with show(fields).

import * as activations from "./activations.js";
import * as address from "./address.js";
import * as compare from "./compare.js";
import * as nextToken from "./next-token.js";
import * as studies from "./studies.js";

const VIEWS = { "next-token": nextToken, activations, studies, compare };

function show() {
  const { view, fields } = address.read();
  for (const link of document.querySelectorAll("nav [data-view]")) {
    const current = link.dataset.view === view;
    document.getElementById(`view-${link.dataset.view}`).hidden = !current;
    if (current) {
      link.setAttribute("aria-current", "page");
      document.title = `${link.textContent} · Actuary`;
    } else link.removeAttribute("aria-current");
  }
  VIEWS[view].show(fields);
}

addEventListener("hashchange", show);
show();
