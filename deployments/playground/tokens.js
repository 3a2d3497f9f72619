// The tokens of an answer, each with its probability and what else it might have been.

import { el, hidePopover, popover } from "./dom.js";

const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return share >= 99.95 ? "100 %" : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};
const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** Spans for the items of logprobs.content; arrow keys walk through them. */
export function tokenSpans(items) {
  const decoder = new TextDecoder();
  const box = el("div.text.tokens", { role: "group", "aria-label": "Tokens; arrow keys move" });
  for (const item of items) {
    // A character may be spread over several tokens: it is shown where it is complete.
    const text = item.bytes ? decoder.decode(new Uint8Array(item.bytes), { stream: true }) : item.token;
    const special = /^<[|/].*>$/.test(item.token); // the end, and other marks that are no text
    const span = el(special ? "span.tok.special" : "span.tok", {
      tabindex: box.childElementCount ? -1 : 0,
      role: "note",
      "aria-label": `${visible(item.token)} ${percent(item.logprob)}`,
    }, text);
    span.style.setProperty("--doubt", Math.min(1, Math.max(0, 1 - Math.exp(item.logprob))).toFixed(3));
    span.item = item;
    box.append(span);
  }
  const show = (event) => event.target.item && popover(alternatives(event.target.item), event.target.getBoundingClientRect());
  box.addEventListener("mouseover", show);
  box.addEventListener("mouseout", hidePopover);
  box.addEventListener("focusin", show);
  box.addEventListener("focusout", hidePopover);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = step && event.target[step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return box;
}

function alternatives(item) {
  const list = item.top_logprobs?.length ? [...item.top_logprobs] : [];
  if (!list.some((other) => other.token === item.token)) list.push(item);
  const grid = el("div.alternatives");
  for (const { token, logprob } of list.sort((a, b) => b.logprob - a.logprob)) {
    const bar = el("i");
    bar.style.width = `${Math.exp(logprob) * 100}%`;
    grid.append(el(token === item.token ? "b" : "span", {}, visible(token) || "∅"), bar, percent(logprob));
  }
  return grid;
}
