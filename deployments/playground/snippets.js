// The same request from a shell or from Python.

const OPENAI = new Set(["model", "messages", "stream", "stream_options", "temperature", "top_p", "max_completion_tokens",
  "max_tokens", "stop", "seed", "n", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
  "frequency_penalty", "presence_penalty", "user"]);

const base = () => new URL("v1", document.baseURI).href;

/** `body` without what only streaming needs. */
function plain({ stream, stream_options, ...body }) {
  return body;
}

export function curl(body, hasKey) {
  const json = JSON.stringify(plain(body), null, 2).replaceAll("'", "'\\''");
  const auth = hasKey ? `  -H "Authorization: Bearer $MANTA_API_KEY" \\\n` : "";
  return `curl ${base()}/chat/completions \\\n  -H 'Content-Type: application/json' \\\n${auth}  -d '${json}'\n`;
}

export function python(body, hasKey) {
  const known = [], extra = {};
  for (const [name, value] of Object.entries(plain(body))) {
    if (OPENAI.has(name)) known.push(`    ${name}=${literal(value, 4)},`);
    else extra[name] = value;
  }
  if (Object.keys(extra).length) known.push(`    extra_body=${literal(extra, 4)},`);
  const imports = hasKey ? "import os\n\nfrom openai import OpenAI" : "from openai import OpenAI";
  const key = hasKey ? 'os.environ["MANTA_API_KEY"]' : '"none"';
  return `${imports}\n\nclient = OpenAI(base_url="${base()}", api_key=${key})\n`
    + `answer = client.chat.completions.create(\n${known.join("\n")}\n)\nprint(answer.choices[0].message.content)\n`;
}

/** A JSON value in Python's syntax. */
function literal(value, indent) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = " ".repeat(indent + 4);
  const items = Array.isArray(value)
    ? value.map((item) => pad + literal(item, indent + 4))
    : Object.entries(value).map(([name, item]) => `${pad}${JSON.stringify(name)}: ${literal(item, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return items.length ? `${open}\n${items.join(",\n")},\n${" ".repeat(indent)}${close}` : open + close;
}
