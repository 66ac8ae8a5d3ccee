// The address bar holds what is shown: #next-token?prompt=...&models=gelu,swiglu&top_k=10. Names cannot hold a comma.

const link = (view) => document.querySelector(`nav [data-view="${view}"]`);

// Places of before, and where they lead now.
const MOVED = { quality: ["activations", "at=served"] };

/** The view that the address names, and its fields. */
export function read() {
  const [named, asked = ""] = location.hash.slice(1).split("?", 2);
  const [view, query] = MOVED[named] ?? [named, asked];
  return { view: link(view) ? view : "next-token", fields: new URLSearchParams(query) };
}

/** Note what `view` shows: in the navigation, which leads back to it, and in the address while it is the one shown. With
    `push` the browser's Back leads to what was shown before. */
export function write(view, fields, push = false) {
  const hash = `#${view}?${new URLSearchParams(fields)}`;
  link(view).setAttribute("href", hash);
  if (read().view === view && location.hash !== hash) history[push ? "pushState" : "replaceState"](null, "", hash);
}

/** A field's comma-separated names: those that are in `known`, and the others. */
export function names(fields, field, known) {
  const all = (fields.get(field) ?? "").split(",").filter(Boolean);
  return { named: all.filter((name) => known.includes(name)), unknown: all.filter((name) => !known.includes(name)) };
}
