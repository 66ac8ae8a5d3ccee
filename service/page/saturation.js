// Where an activation passes hardly anything back: the slope stays small over a stretch of x, not where it only crosses 0.

export const SHARE = 0.05; // of its largest slope within the curve
export const STRETCH = 0.5; // of x, at least; gelu's slope crosses 0 in less

/** The stretches [from, to] of x in which |slope| stays under SHARE of its largest. */
export function saturated({ x, slope }) {
  const sizes = slope.map((value) => (value == null ? Infinity : Math.abs(value)));
  const bound = SHARE * Math.max(...sizes.filter(Number.isFinite));
  const found = [];
  let start = null;
  for (const [at, size] of [...sizes, Infinity].entries()) {
    if (size <= bound) start ??= at;
    else if (start !== null) {
      if (x[at - 1] - x[start] >= STRETCH) found.push([x[start], x[at - 1]]);
      start = null;
    }
  }
  return found;
}
