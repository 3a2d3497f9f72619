// One turn of the conversation on the page.

import { key } from "./api.js";
import { copy, el, prose } from "./dom.js";
import { curl, python } from "./snippets.js";
import { tokenSpans } from "./tokens.js";

export function userTurn(message) {
  return el("article.turn.user", { "aria-label": "You" }, el("div.text", {}, message.content));
}

export function toolTurn(message) {
  return el("article.turn.tool", { "aria-label": "Tool result" }, el("div.text", {}, message.content));
}

/** An assistant's turn, redrawn as its message grows: at most once a frame. */
export class AssistantTurn {
  constructor(message, { retry, answerCalls }) {
    this.message = message;
    this.node = el("article.turn.assistant", { "aria-label": "Assistant" });
    this.actions = { retry, answerCalls };
    this.showTokens = true;
    this.open = null; // whether the reasoning is unfolded, once the reader has chosen
    this.pending = false;
    this.draw();
  }

  update() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  draw() {
    const { message } = this;
    this.node.classList.toggle("streaming", Boolean(message.streaming));
    this.node.replaceChildren(
      ...[this.reasoning(), this.text(), ...this.calls(), this.error(), this.meta()].filter(Boolean));
  }

  reasoning() {
    const { reasoning_content: text, content, tool_calls, streaming } = this.message;
    if (!text) return null;
    const thinking = streaming && !content && !tool_calls?.length;
    const summary = el("summary", {}, thinking ? "Thinking…" : "Reasoning");
    const details = el("details.reasoning", { open: (this.open ?? false) ? "" : null }, summary, el("div", {}, text.trim()));
    summary.addEventListener("click", () => (this.open = !details.open));
    return details;
  }

  text() {
    const { content, tokens, streaming } = this.message;
    if (tokens?.length && this.showTokens) return tokenSpans(tokens);
    if (!content && !streaming) return null;
    const box = el("div.text");
    box.append(prose(pretty(this.message) ?? content ?? ""));
    return box;
  }

  calls() {
    const { tool_calls: calls = [], streaming } = this.message;
    const cards = calls.map((call) => el("section.call", { "aria-label": "Tool call" },
      el("header", {}, el("span", {}, "calls"), call.function.name),
      el("pre", { tabindex: 0 }, indented(call.function.arguments))));
    if (calls.length && !streaming && this.message.unanswered) cards.push(this.resultForm(calls));
    return cards;
  }

  resultForm(calls) {
    const inputs = calls.map((call) => el("textarea.mono", { rows: 1, placeholder: '{"temperature": 18, "condition": "sunny"}', "aria-label": `Result of ${call.function.name}` }));
    const form = el("form.answer-call", {},
      ...calls.map((call, i) => el("label", {}, `Result of ${call.function.name}`, inputs[i])),
      el("button.secondary", { type: "submit" }, calls.length > 1 ? "Send results" : "Send result"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.answerCalls(this.message, inputs.map((input) => input.value));
    });
    return form;
  }

  error() {
    return this.message.error ? el("p.error", { role: "alert" }, this.message.error) : null;
  }

  meta() {
    const { message } = this;
    if (message.streaming || !message.body) return null;
    const facts = speeds(message).map((fact) => el("span", {}, fact));
    if (message.body.response_format && !message.error) {
      const valid = parses(message.content);
      facts.push(el(valid ? "span.badge.ok" : "span.badge.no", {}, valid ? "valid JSON" : "not JSON"));
    }
    const button = (label, action) => {
      const node = el("button", { type: "button" }, label);
      node.addEventListener("click", () => action(node));
      return node;
    };
    const actions = el("span.actions", {},
      message.tokens?.length ? button(this.showTokens ? "Text" : "Tokens", () => {
        this.showTokens = !this.showTokens;
        this.draw();
      }) : null,
      button("Copy", (node) => copy(node, message.content ?? "")),
      button("curl", (node) => copy(node, curl(message.body, Boolean(key.get())))),
      button("Python", (node) => copy(node, python(message.body, Boolean(key.get())))),
      button("Retry", () => this.actions.retry(message)));
    return el("footer.meta", {}, ...facts, actions);
  }
}

/** What was measured, in words: speed, time to the first token, counts, why it ended. */
export function speeds({ times, usage, finish_reason }) {
  const facts = [];
  const count = usage?.completion_tokens;
  if (times?.first) {
    // An answer that came in one piece has no speed but that of the whole request.
    const decoding = times.last - times.first;
    const speed = decoding > 50 ? (count - 1) / decoding : count / (times.last - times.sent);
    if (count) facts.push(`${Math.round(speed * 1000).toLocaleString()} tok/s`);
    facts.push(`TTFT ${Math.round(times.first - times.sent)} ms`);
  }
  if (count) facts.push(`${count} tokens`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) facts.push(`prompt ${usage.prompt_tokens}${cached ? `, ${cached} cached` : ""}`);
  if (finish_reason && finish_reason !== "stop") facts.push(finish_reason);
  return facts;
}

function parses(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** A finished structured answer, indented in a code block. */
function pretty({ body, content, streaming }) {
  if (!body?.response_format || streaming || !parses(content)) return null;
  return "```json\n" + JSON.stringify(JSON.parse(content), null, 2) + "\n```";
}

const indented = (text) => (parses(text) ? JSON.stringify(JSON.parse(text), null, 2) : text);
