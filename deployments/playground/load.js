// A load of real requests, so that there is something to see. Several prompts go into each request,
// for a browser opens few connections to one server.

import { request } from "./api.js";
import { $ } from "./dom.js";

const CONNECTIONS = 4;
const STORY = "the river runs to the stone and the cloud sees the apple under the tree near the house ";
const WORDS = STORY.trim().split(" ");

let stopping = null;

export function start(currentModel) {
  $("load").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (stopping) return stopping.abort();
    stopping = new AbortController();
    $("load-start").textContent = "Stop";
    const began = performance.now();
    try {
      const count = await run(currentModel());
      $("load-status").textContent = `${count} answered in ${((performance.now() - began) / 1000).toFixed(1)} s`;
    } catch (error) {
      stopping.abort();
      $("load-status").textContent = error.name === "AbortError" ? "Stopped" : error.message;
    }
    stopping = null;
    $("load-start").textContent = "Start";
  });
}

async function run(model) {
  const count = Number($("load-count").value), tokens = Number($("load-tokens").value);
  const window = Math.min(model?.max_model_len ?? 2048, 4096);
  const prompts = Array.from({ length: count }, (_, i) => prompt($("load-kind").value, i, window, tokens));
  const size = Math.max(1, Math.ceil(count / (CONNECTIONS * 3)));
  let done = 0;
  const worker = async (index) => {
    while (prompts.length) {
      const some = prompts.splice(0, Math.max(1, Math.min(size + index - 1, prompts.length)));
      await complete(some, Math.max(1, Math.round(tokens * (0.6 + 0.8 * Math.random()))));
      done += some.length;
      $("load-status").textContent = `${done} of ${count} answered`;
    }
  };
  $("load-status").textContent = `0 of ${count} answered`;
  await Promise.all(Array.from({ length: CONNECTIONS }, (_, index) => worker(index)));
  return done;
}

async function complete(prompt, max_tokens) {
  const body = { prompt, max_tokens, temperature: 1, ignore_eos: true, stream: true };
  const response = await request("v1/completions", { body, signal: stopping.signal });
  // Only the end matters: to read thousands of events a second would keep the page from drawing.
  const [, error] = (await response.text()).match(/^data: {"error":(.*)}$/m) ?? [];
  if (error) throw new Error(JSON.parse(error).message);
}

/** About so many tokens; words of the story are one or two tokens each. */
function words(count, seed) {
  return Array.from({ length: count }, (_, i) => WORDS[(i * 7 + seed * 5 + ((i * seed) % 11)) % WORDS.length]).join(" ");
}

function prompt(kind, index, window, tokens) {
  const room = Math.max(8, Math.floor((window - 2 * tokens) / 2.5));
  if (kind === "shared") return `${STORY.repeat(Math.max(1, Math.min(18, Math.floor(room / 18))))}\nQuestion ${index}: ${words(6, index)}`;
  if (kind === "long" && index % 3 === 0) return `${index} ${words(Math.min(room, 900), index + 1)}`;
  return `${index} ${words(12, index + 1)}`;
}
