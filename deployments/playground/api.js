// The server's API, as any client sees it.

const KEY = "manta-key";
// How long an answer that broke is asked for, and how often.
const GIVE_UP_MS = 60_000;
const PAUSE_MS = 500;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** An answer other than 200, in OpenAI's shape; without `error`, a proxy's that reached no server. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    const { param, code } = error ?? {};
    Object.assign(this, { status, param, code, isProxys: !error });
  }
}

function headers(body, lastId) {
  const all = {};
  if (lastId) all["last-event-id"] = lastId;
  if (body) all["content-type"] = "application/json";
  if (key.get()) all.authorization = `Bearer ${key.get()}`;
  return all;
}

/** The response to GET, or to POST of `body`; throws ApiError unless it is a success. */
export async function request(path, { body, signal, lastId } = {}) {
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: headers(body, lastId),
    body: body && JSON.stringify(body),
    signal,
  });
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new ApiError(response.status, answer.error);
  }
  return response;
}

export const getJson = async (path) => (await request(path)).json();

/** Server-sent events as objects, until the stream ends; throws the error that a stream may carry. */
export async function* events(response) {
  for await (const [, event] of withIds(response)) if (event) yield event;
}

/** The events of an answer. One that breaks goes on where it was, from whichever server then answers. */
export async function* answer(path, { body, signal }) {
  let lastId = "";
  let held = []; // what has come since the last id comes again
  const askedAt = performance.now();
  let cameAt = -Infinity; // when there was a server last
  for (;;) {
    try {
      const response = await request(path, { body, signal, lastId });
      for await (const [id, event] of withIds(response)) {
        cameAt = performance.now();
        if (event) held.push(event);
        if (event && lastId && !id) continue;
        lastId = id || lastId;
        yield* held;
        held = [];
        if (!event) return;
      }
      throw new TypeError("the answer has no end"); // as fetch throws for what breaks in the midst
    } catch (error) {
      if (error.isProxys && error.status >= 500) cameAt = Math.max(cameAt, askedAt);
      const mayPass = error instanceof TypeError || error.isProxys || error.status === 503;
      if (!mayPass || performance.now() - cameAt > GIVE_UP_MS) throw error;
      held = [];
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
}

/** [id, event] of each, and [ , null] for the end that answers have. */
async function* withIds(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const complete = buffer.split("\n\n");
      buffer = complete.pop();
      for (const item of complete) {
        const fields = Object.fromEntries(item.split("\n").map((line) => line.split(/: (.*)/s, 2)));
        if (!fields.data) continue;
        if (fields.data === "[DONE]") {
          yield ["", null];
          return;
        }
        const event = JSON.parse(fields.data);
        // What a replica that had to stop cannot go on with, another may.
        const status = event.error?.code === "engine_unavailable" ? 503 : 500;
        if (event.error) throw new ApiError(status, event.error);
        yield [fields.id ?? "", event];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Names of the fields that chat requests may have here, or null when the server does not say. */
export async function chatFields() {
  try {
    const schemas = (await getJson("openapi.json")).components.schemas;
    return new Set(Object.keys(schemas.ChatCompletionRequest.properties));
  } catch {
    return null;
  }
}
