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

export function nextToken(asked, signal) {
  const headers = { "content-type": "application/json" };
  return ask("/v1/next-token", { method: "POST", headers, body: JSON.stringify(asked), signal });
}
