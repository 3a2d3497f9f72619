// The settings form: kept in the browser, turned into fields of a request.

import { chatFields, key } from "./api.js";
import { $, el } from "./dom.js";

const STORE = "manta-settings";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty"];

const EXAMPLES = {
  schema: {
    type: "object",
    properties: { name: { type: "string" }, age: { type: "integer" }, city: { type: "string" } },
    required: ["name", "age", "city"],
    additionalProperties: false,
  },
  tools: [{
    name: "get_weather",
    description: "Get the current weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", description: "The city name" } },
      required: ["city"],
    },
  }],
};

const form = $("settings-form");
let fields = null; // what the server takes; null: unknown

/** Whether requests may have this field, as far as we know. */
const supported = (name) => fields === null || fields.has(name);

export async function start() {
  restore();
  form.addEventListener("input", save);
  form.addEventListener("reset", () => setTimeout(() => { key.set(""); save(); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of form.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => {
      form.elements[button.dataset.example].value = JSON.stringify(EXAMPLES[button.dataset.example], null, 2);
      save();
    });
  }
  await learn();
}

/** Asks the server what it takes and greys out the rest. */
export async function learn() {
  fields = await chatFields();
  for (const node of form.querySelectorAll("[data-needs]")) {
    if (supported(node.dataset.needs)) enable(node);
    else disable(node, "This server does not offer it.");
  }
}

/**
 * A field that the server refused after all: off, with its reason. True when there is such a control.
 * A text that the user wrote stays, for the fault may be in it.
 */
export function refuse(param, message) {
  const name = { top_logprobs: "logprobs" }[param] ?? param;
  const node = form.querySelector(`[data-needs="${CSS.escape(name ?? "")}"]`);
  if (!node || node.querySelector("textarea") || node.classList.contains("missing")) return false;
  fields?.delete(name);
  disable(node, message);
  return true;
}

function disable(node, reason) {
  enable(node);
  node.classList.add("missing");
  node.append(el("span.why", {}, reason));
  for (const control of node.querySelectorAll("input, textarea, button")) control.disabled = true;
}

function enable(node) {
  node.classList.remove("missing");
  node.querySelector(".why")?.remove();
  for (const control of node.querySelectorAll("input, textarea, button")) control.disabled = false;
}

function restore() {
  const stored = JSON.parse(localStorage.getItem(STORE) ?? "{}");
  for (const control of form.elements) {
    if (!control.name || !(control.name in stored)) continue;
    if (control.type === "checkbox") control.checked = stored[control.name];
    else control.value = stored[control.name];
  }
  form.elements.key.value = key.get();
  check();
}

function save(event) {
  const stored = {};
  for (const control of form.elements) {
    if (!control.name || control.name === "key") continue;
    stored[control.name] = control.type === "checkbox" ? control.checked : control.value;
  }
  localStorage.setItem(STORE, JSON.stringify(stored));
  if (event?.target.name === "key") {
    key.set(event.target.value.trim());
    document.dispatchEvent(new Event("manta:key"));
  }
  check();
}

function parsed(name) {
  const control = form.elements[name];
  const text = control.disabled ? "" : control.value.trim();
  try {
    $(`${name}-error`).textContent = "";
    return text ? JSON.parse(text) : null;
  } catch (error) {
    $(`${name}-error`).textContent = `Not JSON: ${error.message}`;
    throw new Error(`The ${name} in the settings is not valid JSON.`);
  }
}

function check() {
  for (const name of ["schema", "tools"]) try { parsed(name); } catch { /* shown beside the field */ }
}

export const systemPrompt = () => form.elements.system.value.trim();

/** The fields that the form adds to a chat request. Throws where the form holds no valid JSON. */
export function requestFields() {
  const value = (name) => (form.elements[name].disabled ? "" : form.elements[name].value.trim());
  const result = {};
  for (const name of NUMBERS) if (value(name) !== "") result[name] = Number(value(name));
  if (value("max_tokens")) result.max_completion_tokens = Number(value("max_tokens"));
  const stop = value("stop").split("\n").filter(Boolean);
  if (stop.length) result.stop = stop;
  if (form.elements.thinking.checked) result.chat_template_kwargs = { enable_thinking: true };
  if (form.elements.logprobs.checked && !form.elements.logprobs.disabled) Object.assign(result, { logprobs: true, top_logprobs: 5 });
  const schema = parsed("schema");
  if (schema) result.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  const tools = parsed("tools");
  if (tools?.length) result.tools = tools.map((tool) => (tool.type === "function" ? tool : { type: "function", function: tool }));
  return result;
}
