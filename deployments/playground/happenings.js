// What happened, in words: the differences between one picture and the next.

import { el } from "./dom.js";

const KEPT = 80;

export class Happenings {
  constructor(list) {
    this.list = list;
    this.clear();
  }

  clear() {
    this.rows = new Map();
    this.preempted = new Set();
    this.stats = null;
    this.list.replaceChildren();
  }

  take({ rows, waiting, stats }) {
    const now = new Map(rows.map((request) => [request.id, request]));
    const preempted = new Set(waiting.filter((request) => request.preempted).map(({ id }) => id));
    for (const [id, { row, num_prompt, num_cached }] of now) {
      if (this.rows.has(id)) continue;
      if (this.preempted.has(id)) this.say(`Request ${id} is back, in row ${row}`);
      else if (num_cached) this.say(`Request ${id} enters row ${row}; ${num_cached} of its ${num_prompt} prompt tokens were cached`, "hit");
      else this.say(`Request ${id} enters row ${row} with ${num_prompt} prompt tokens`);
    }
    const fresh = [...preempted].filter((id) => !this.preempted.has(id));
    for (const id of fresh) this.say(`Request ${id} is preempted: no block was free for its next token, or another’s`, "preempted");
    // Some are back before the next picture: only the engine's count tells of them.
    const unseen = this.stats ? stats.preemptions - this.stats.preemptions - fresh.length : 0;
    if (unseen > 0) this.say(`${unseen === 1 ? "A request was" : `${unseen} requests were`} preempted for a moment`, "preempted");
    for (const [id, { num_tokens }] of this.rows) {
      if (!now.has(id) && !preempted.has(id)) this.say(`Request ${id} has left after about ${num_tokens} tokens`);
    }
    if (this.stats && stats.steps < this.stats.steps) this.say("The engine was restarted", "preempted");
    Object.assign(this, { rows: now, preempted, stats });
  }

  say(text, kind) {
    const time = new Date().toLocaleTimeString([], { hour12: false });
    this.list.prepend(el(kind ? `li.${kind}` : "li", {}, el("time", {}, time), text));
    while (this.list.childElementCount > KEPT) this.list.lastChild.remove();
  }
}
