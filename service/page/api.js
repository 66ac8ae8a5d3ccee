// What the page asks of the service. An answer other than 200 is thrown with the API's own message and `param`, the field
// it is about.

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (cause) {
    if (options?.signal?.aborted) throw cause;
    throw new Error("The service does not answer; is it still running?", { cause });
  }
  const body = await response.json().catch(() => null);
  if (!response.ok || body === null) {
    const message = body?.error?.message ?? `${path} answered ${response.status} ${response.statusText}`;
    throw Object.assign(new Error(message), { param: body?.error?.param });
  }
  return body;
}

/** A function that asks once and remembers; a failure is asked again. */
function once(path) {
  let answer = null;
  return () => (answer ??= ask(path).catch((error) => ((answer = null), Promise.reject(error))));
}

export const models = once("/v1/models");
export const activations = once("/v1/activations");

const post = (path, asked, signal) => ask(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked), signal,
});

export const nextToken = (asked, signal) => post("/v1/next-token", asked, signal);

// Text and tokens of a variant's tokenizer, in vLLM's shape.
export const tokenize = (asked) => post("/v1/tokenize", asked);
export const detokenize = (asked) => post("/v1/detokenize", asked);

const STUDIES = "/v1/studies";
export const studies = () => ask(STUDIES);
export const study = (name) => ask(`${STUDIES}/${encodeURIComponent(name)}`);

const COMPARISONS = "/v1/comparisons";
export const comparisons = () => ask(COMPARISONS);
export const comparison = (id) => ask(`${COMPARISONS}/${encodeURIComponent(id)}`);
export const startComparison = (asked) => post(COMPARISONS, asked);
export const stopComparison = (id) => ask(`${COMPARISONS}/${encodeURIComponent(id)}`, { method: "DELETE" });
export const reportOf = (id) => `${COMPARISONS}/${encodeURIComponent(id)}/report`;
