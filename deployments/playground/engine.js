// The live view of the engines: takes in pictures, hands them to what draws them.

import { events, request } from "./api.js";
import { Chart } from "./chart.js";
import { $, el } from "./dom.js";
import { Happenings } from "./happenings.js";
import { Lanes } from "./lanes.js";
import { Pool } from "./pool.js";

const RETRY_MS = 2000;
const CHART_S = 30;

let visible = false;
let connection = null; // AbortController of the stream
let replicas = [];
let chosen = ""; // name of the replica that is shown
let shown = {}; // the last picture drawn
let before = null; // the picture that speeds are measured from
let lanes, pool, happenings, tiles, charts;

export function start() {
  lanes = new Lanes($("lanes"), (id) => pool.light(id));
  pool = new Pool($("pool"), (ids) => lanes.light(ids));
  happenings = new Happenings($("events"));
  buildTiles();
  document.addEventListener("manta:theme", redraw);
  new ResizeObserver(redraw).observe($("engine-body"));
}

function buildTiles() {
  const tile = (label, wide) => {
    const value = el("dd", {}, "–");
    const chart = wide && el("canvas", { "aria-hidden": "true" });
    $("tiles").append(el(wide ? "div.tile.wide" : "div.tile", {}, el("dt", {}, label), value, chart || null));
    return [value, chart];
  };
  const speed = tile("Output tokens/s", true), step = tile("Step time, a token for each row", true);
  charts = { speed: new Chart(speed[1], CHART_S), step: new Chart(step[1], CHART_S) };
  tiles = { speed: speed[0], step: step[0] };
  for (const [name, label] of [["running", "Running"], ["waiting", "Waiting"], ["blocks", "Blocks owned"],
    ["hits", "Prefix hits"], ["preemptions", "Preemptions"], ["steps", "Steps"]]) [tiles[name]] = tile(label);
}

/** Connected only while somebody can see it: engines draw for nobody else. */
export function setVisible(is) {
  is = is && !document.hidden;
  if (is === visible) return;
  visible = is;
  if (visible) connect();
  else connection?.abort();
}

export function reconnect() {
  connection?.abort();
  if (visible) connect();
}

async function connect() {
  const mine = (connection = new AbortController());
  const current = () => connection === mine && !mine.signal.aborted;
  while (current()) {
    try {
      const response = await request("engine/events", { signal: mine.signal });
      for await (const news of events(response)) if (current()) take(news.replicas);
    } catch (error) {
      if (!current()) return;
      note(explain(error));
      if ([401, 403, 404].includes(error.status)) return;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

function explain(error) {
  if (error.status === 401 || error.status === 403) return "The engine’s view needs the API key: give it under Settings.";
  if (error.status === 404) return "This server does not show its engine.";
  return `No view of the engine: ${error instanceof TypeError ? "the server cannot be reached" : error.message}`;
}

function note(text) {
  $("engine-note").textContent = text;
  $("engine-note").hidden = !text;
}

function take(news) {
  replicas = news;
  if (!news.some((replica) => replica.replica === chosen)) choose(news[0]?.replica ?? "");
  drawReplicas();
  const replica = news.find((one) => one.replica === chosen);
  if (!replica?.connected) return note("The engine is being restarted; live requests will go on.");
  if (!replica.view) return note("Waiting for the first picture…");
  note("");
  $("engine-body").hidden = false;
  const { view } = replica;
  if (view.time === shown.time) return;
  shown = view;
  measure(view);
  drawTiles(view, replica);
  lanes.take(view);
  pool.take(view);
  happenings.take(view);
  drawQueue(view);
}

function choose(name) {
  chosen = name;
  before = null;
  shown = {};
  for (const part of [lanes, pool, happenings, charts.speed, charts.step]) part.clear();
}

function drawReplicas() {
  const box = $("replicas");
  box.hidden = replicas.length < 2;
  const names = replicas.map((replica) => replica.replica).join();
  if (box.dataset.names !== names) {
    box.dataset.names = names;
    box.replaceChildren(...replicas.map((replica, i) => {
      const button = el("button", { type: "button", title: replica.replica, "data-name": replica.replica }, `Replica ${i + 1}`);
      button.addEventListener("click", () => { choose(replica.replica); drawReplicas(); });
      return button;
    }));
  }
  for (const button of box.children) button.setAttribute("aria-pressed", button.dataset.name === chosen);
}

/** Speeds between two pictures that lie a while apart. */
function measure(view) {
  if (before && (view.time < before.time || view.stats.steps < before.stats.steps)) before = null; // restarted
  if (!before) return void (before = view);
  const seconds = view.time - before.time, steps = view.stats.steps - before.stats.steps;
  if (seconds < 0.2) return;
  const busy = steps > 0 && view.rows.length > 0 && before.rows.length > 0;
  const speed = (view.stats.output_tokens - before.stats.output_tokens) / seconds;
  charts.speed.add(view.time, speed);
  charts.step.add(view.time, busy ? (seconds / steps) * 1000 : null);
  tiles.speed.textContent = Math.round(speed).toLocaleString();
  if (busy) tiles.step.replaceChildren(((seconds / steps) * 1000).toFixed(1), el("small", {}, "ms"));
  before = view;
}

function drawTiles({ stats, ...view }) {
  const owned = stats.num_blocks - stats.free_blocks;
  const hits = stats.prompt_tokens ? stats.cached_tokens / stats.prompt_tokens : 0;
  tiles.running.textContent = stats.running;
  tiles.waiting.textContent = stats.waiting;
  tiles.blocks.replaceChildren(owned.toLocaleString(), el("small", {}, `of ${stats.num_blocks.toLocaleString()}`));
  tiles.hits.replaceChildren((hits * 100).toFixed(0), el("small", {}, "%"));
  tiles.preemptions.textContent = stats.preemptions.toLocaleString();
  tiles.steps.textContent = stats.steps.toLocaleString();
  charts.speed.draw();
  charts.step.draw();
  const shards = Array.from({ length: view.tensor_parallel_size }, (_, rank) => `rank ${rank} · ${view.device.replace(/:\d+$/, "")} · ${view.ops}`);
  if ($("shards").childElementCount !== shards.length) $("shards").replaceChildren(...shards.map((text) => el("li", {}, text)));
}

function drawQueue({ waiting, stats }) {
  const chips = waiting.slice(0, 24).map(({ id, num_tokens, preempted }) =>
    el(preempted ? "li.preempted" : "li", { title: preempted ? "preempted, will be computed again" : "waiting" },
      `${id} · ${num_tokens}${preempted ? " ↺" : ""}`));
  const more = stats.waiting - chips.length;
  if (more > 0) chips.push(el("li", {}, `and ${more} more`));
  $("queue").replaceChildren(...(chips.length ? chips : [el("li", {}, "empty")]));
}

function redraw() {
  if (!shown.time) return;
  lanes.draw();
  pool.draw();
  charts.speed.draw();
  charts.step.draw();
}
