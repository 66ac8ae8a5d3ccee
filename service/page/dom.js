// Elements in one expression: h("td", { class: "number" }, "1.0"). Attributes that are null or false are left out.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Say `message` in a line made for errors, or clear it with nothing. */
export function complain(line, message = "") {
  if (line.textContent !== message) line.textContent = message;
  line.hidden = !message;
}
