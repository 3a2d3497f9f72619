// The conversation: what was said, what is being said.

import { answer as answerEvents, ApiError } from "./api.js";
import { $, el } from "./dom.js";
import { refuse, requestFields, systemPrompt } from "./settings.js";
import { AssistantTurn, speeds, toolTurn, userTurn } from "./turn.js";

const STORE = "manta-chat";
const SUGGESTIONS = [
  ["Copy", "Repeat these words: apple river stone cloud"],
  ["Compute", "What is 17 + 25?"],
  ["Sort", "Sort these numbers in ascending order: 42 7 19 3"],
  ["Extract", "Extract the name, age and city as JSON: Maria is 31 years old and lives in Paris."],
];

let messages = []; // OpenAI messages; the assistant's also carry what was measured
let running = null; // AbortController of the answer that streams
let model = () => undefined;

export function start(currentModel) {
  model = currentModel;
  for (const [label, text] of SUGGESTIONS) {
    const button = el("button", { type: "button" }, el("b", {}, label), el("span", {}, text));
    button.addEventListener("click", () => ask(text));
    $("suggestions").append(el("li", {}, button));
  }
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask($("input").value.trim());
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask($("input").value.trim());
    }
  });
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  $("new-chat").addEventListener("click", () => {
    stop();
    messages = [];
    draw();
    $("input").focus();
  });
  try {
    messages = JSON.parse(localStorage.getItem(STORE) ?? "[]");
  } catch { /* written by another version */ }
  draw();
}

const stop = () => running?.abort();

function ask(text) {
  if (!text || running) return;
  $("input").value = "";
  append({ role: "user", content: text });
  answer();
}

function answerCalls(message, results) {
  if (running) return;
  message.unanswered = false;
  message.turn.draw();
  message.tool_calls.forEach((call, i) => append({ role: "tool", tool_call_id: call.id, content: results[i] }));
  answer();
}

function retry(message) {
  if (running) return;
  messages = messages.slice(0, messages.indexOf(message));
  draw();
  answer();
}

/** Asks for the next message and shows it as it comes. */
async function answer() {
  const message = { role: "assistant", content: "", streaming: true };
  const history = messages.map(forServer);
  append(message);
  running = new AbortController();
  busy(true);
  try {
    const system = systemPrompt();
    if (system) history.unshift({ role: "system", content: system });
    await stream(message, history);
  } catch (error) {
    if (error.name === "AbortError") message.finish_reason = "stopped";
    else message.error = explain(error);
  }
  message.streaming = false;
  message.unanswered = Boolean(message.tool_calls?.length);
  running = null;
  busy(false);
  message.turn.draw();
  follow();
  save();
  $("announce").textContent = message.error ?? `${(message.content ?? "").slice(0, 500)}. ${speeds(message).join(", ")}`;
}

async function stream(message, history) {
  for (;;) {
    message.body = {
      model: model(), messages: history, stream: true, stream_options: { include_usage: true }, ...requestFields(),
    };
    message.times = { sent: performance.now() };
    try {
      const sent = { body: message.body, signal: running.signal };
      for await (const chunk of answerEvents("v1/chat/completions", sent)) take(message, chunk);
      return;
    } catch (error) {
      // A feature this server lacks is switched off, and the question asked again without it.
      const name = error instanceof ApiError && error.status === 400 && error.param?.split(".")[0];
      if (!name || !refuse(name, error.message)) throw error;
    }
  }
}

/** Adds a chunk of the stream to the message. */
function take(message, { choices, usage }) {
  if (usage) message.usage = usage;
  const [choice] = choices;
  if (!choice) return;
  const { delta } = choice;
  const grew = delta.content || delta.reasoning_content || delta.tool_calls?.length;
  if (grew) {
    message.times.last = performance.now();
    message.times.first ??= message.times.last;
  }
  message.raw = (message.raw ?? "") + (delta.content ?? "");
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
  for (const part of delta.tool_calls ?? []) addCall(message, part);
  if (choice.logprobs?.content) (message.tokens ??= []).push(...choice.logprobs.content);
  if (choice.finish_reason) message.finish_reason = choice.finish_reason;
  unthink(message);
  message.turn.update();
  follow();
}

function addCall(message, part) {
  const calls = (message.tool_calls ??= []);
  const call = (calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } });
  call.function.name += part.function?.name ?? "";
  call.function.arguments += part.function?.arguments ?? "";
}

/** Reasoning that a server leaves in the text is folded all the same. */
function unthink(message) {
  const found = /^\s*<think>([\s\S]*?)(?:<\/think>\s*([\s\S]*))?$/.exec(message.raw);
  if (found) [message.reasoning_content, message.content] = [found[1], found[2] ?? ""];
  else message.content = message.raw;
}

/** A message as the API takes it. */
function forServer({ role, content, tool_calls, tool_call_id }) {
  const message = { role, content };
  if (tool_calls?.length) Object.assign(message, { tool_calls, content: content || null });
  if (tool_call_id) message.tool_call_id = tool_call_id;
  return message;
}

function explain(error) {
  if (error.status === 401 || error.status === 403) return `${error.message}. Give the key under Settings.`;
  if (error instanceof TypeError) return "The server cannot be reached.";
  return error.message;
}

function append(message) {
  messages.push(message);
  $("welcome").hidden = true;
  $("log").append(nodeOf(message));
  $("log").scrollTop = $("log").scrollHeight;
  save();
}

function nodeOf(message) {
  if (message.role === "user") return userTurn(message);
  if (message.role === "tool") return toolTurn(message);
  message.turn = new AssistantTurn(message, { retry, answerCalls });
  return message.turn.node;
}

function draw() {
  $("welcome").hidden = messages.length > 0;
  $("log").replaceChildren($("welcome"), ...messages.map(nodeOf));
  $("log").scrollTop = $("log").scrollHeight;
  save();
}

/** Keeps the end in sight, unless the reader has scrolled up. */
function follow() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) {
    requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
  }
}

function busy(is) {
  $("stop").hidden = !is;
  $("send").disabled = is;
  $("log").setAttribute("aria-busy", is);
}

function save() {
  const kept = messages.filter((m) => !m.streaming).map(({ turn, streaming, raw, ...message }) => message);
  try {
    localStorage.setItem(STORE, JSON.stringify(kept));
  } catch { /* too long to keep */ }
}
