// The server's API, as any client sees it.

const KEY = "manta-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** An answer other than 200, in OpenAI's shape. */
export class ApiError extends Error {
  constructor(status, { message, param, code } = {}) {
    super(message ?? `the server answered ${status}`);
    Object.assign(this, { status, param, code });
  }
}

function headers(body) {
  const all = {};
  if (body) all["content-type"] = "application/json";
  if (key.get()) all.authorization = `Bearer ${key.get()}`;
  return all;
}

/** The response to GET, or to POST of `body`; throws ApiError unless it is a success. */
export async function request(path, { body, signal } = {}) {
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: headers(body),
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
        const data = item.startsWith("data: ") ? item.slice(6) : "";
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.code ?? 500, event.error);
        yield event;
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
