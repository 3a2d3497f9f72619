// The running batch: a lane for each row of the device's tables, a column for each step.

import { context, el, requestColour } from "./dom.js";

const STEP_PX = 5;
const MAX_STEPS = 400;

export class Lanes {
  /** `onLight(id or null)` is told which request the reader points at. */
  constructor(box, onLight) {
    Object.assign(this, { box, onLight });
    this.clear();
  }

  clear() {
    this.steps = []; // {step, rows: Map(row -> [id, tokens, drafts of them that failed])}
    this.lanes = [];
    this.view = null;
    this.box.replaceChildren(el("p.empty", {}, "Nothing is running. Send a message, or start a sample load."));
  }

  take(view) {
    this.view = view;
    for (const { step, chunks } of view.steps) {
      this.steps.push({ step, rows: new Map(chunks.map(([id, row, ...counts]) => [row, [id, ...counts]])) });
    }
    this.steps.splice(0, this.steps.length - MAX_STEPS);
    const rows = Math.max(-1, ...view.rows.map((r) => r.row), ...view.steps.flatMap((s) => s.chunks.map(([, row]) => row)));
    if (rows >= this.lanes.length && !this.lanes.length) this.box.replaceChildren();
    while (this.lanes.length <= rows) this.lanes.push(this.newLane());
    this.draw();
  }

  newLane() {
    const name = el("span"), swatch = el("i"), canvas = el("canvas", { "aria-hidden": "true" });
    const computed = el("span"), cached = el("span");
    const button = el("button", { type: "button" }, swatch, name);
    const node = el("div.lane", {}, button, el("div.fill", { "aria-hidden": "true" }, computed, cached), canvas);
    const lane = { node, button, name, canvas, computed, cached, id: null };
    for (const type of ["mouseenter", "focusin"]) node.addEventListener(type, () => this.onLight(lane.id));
    for (const type of ["mouseleave", "focusout"]) node.addEventListener(type, () => this.onLight(null));
    this.box.append(node);
    return lane;
  }

  light(ids) {
    for (const lane of this.lanes) lane.node.classList.toggle("lit", ids.includes(lane.id));
  }

  draw() {
    if (!this.lanes.length) return;
    const width = this.lanes[0].canvas.clientWidth;
    const shown = this.steps.slice(-Math.max(1, Math.floor(width / STEP_PX)));
    const requests = new Map(this.view.rows.map((request) => [request.row, request]));
    this.lanes.forEach((lane, row) => {
      this.drawState(lane, requests.get(row));
      if (width) drawSteps(lane.canvas, width, shown, row);
    });
  }

  drawState(lane, request) {
    lane.node.classList.toggle("gone", !request);
    if (!request) return void (lane.id = null, lane.name.textContent = "–", lane.computed.style.width = lane.cached.style.width = "0");
    const { id, num_tokens, num_computed, num_cached, num_prompt, num_drafted, num_accepted } = request;
    const share = (tokens) => `${((100 * tokens) / Math.max(num_tokens, 1)).toFixed(1)}%`;
    lane.id = id;
    lane.name.textContent = id;
    lane.node.style.setProperty("--hue", requestColour(id));
    lane.computed.style.width = share(num_computed);
    lane.cached.style.width = share(num_cached);
    lane.button.title = lane.button.ariaLabel = `Request ${id}: ${num_computed} of ${num_tokens} tokens computed, `
      + `prompt ${num_prompt}, of which ${num_cached} from the cache`
      + (num_drafted ? `, ${num_accepted} of ${num_drafted} drafts accepted` : "");
  }
}

function drawSteps(canvas, width, steps, row) {
  const height = 16;
  const g = context(canvas, width, height);
  const left = width - steps.length * STEP_PX;
  steps.forEach(({ rows }, index) => {
    const [id, tokens, failed] = rows.get(row) ?? [];
    if (id === undefined) return;
    g.fillStyle = requestColour(id);
    // A token is a tick; a chunk's bar grows with its logarithm and fills the column.
    const tall = tokens === 1 ? 4 : Math.min(height, 6 + Math.log2(tokens));
    const wide = tokens === 1 ? 2 : STEP_PX - 0.5;
    const x = left + index * STEP_PX, bottom = (height + tall) / 2;
    g.globalAlpha = 0.3; // drafts that failed are the pale end of the bar
    g.fillRect(x, bottom - tall, wide, tall);
    g.globalAlpha = 1;
    const kept = tall * (1 - failed / tokens);
    g.fillRect(x, bottom - kept, wide, kept);
  });
}
