// The block pool as a grid: free, cached, owned by a request, shared by several.

import { $, colour, context, hidePopover, popover, requestColour } from "./dom.js";

const TALL = 220; // px that the grid may take before its cells become smaller
const GLOW_MS = 900;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Pool {
  /** `onLight(ids)` is told whose block the reader points at. */
  constructor(canvas, onLight) {
    Object.assign(this, { canvas, onLight });
    this.clear();
    canvas.addEventListener("mousemove", (event) => this.point(event));
    canvas.addEventListener("mouseleave", () => {
      hidePopover();
      this.onLight([]);
      this.light(null);
    });
  }

  clear() {
    this.view = null;
    this.owners = new Map(); // cell -> ids of its requests
    this.known = new Set(); // requests whose cached prefix has been shown
    this.glow = new Map(); // cell -> when its light goes out
    this.lit = null; // id of the request to bring out
  }

  take(view) {
    this.view = view;
    this.owners = new Map();
    for (const { id, cells } of view.rows) {
      for (const cell of cells) this.owners.has(cell) ? this.owners.get(cell).push(id) : this.owners.set(cell, [id]);
    }
    this.noteHits(view);
    const per = view.blocks_per_cell > 1 ? `, ${view.blocks_per_cell} to a cell` : "";
    $("pool-note").textContent = `${view.num_blocks.toLocaleString()} blocks of ${view.block_size} tokens${per}. `
      + "Point at a block for its owner, at a row for its blocks.";
    const count = (state) => view.pool.split(state).length - 1;
    this.canvas.setAttribute("aria-label",
      `Block pool: ${count(".")} free, ${count("c")} free and cached, ${count("o")} owned, ${count("s")} shared`);
    this.draw();
  }

  /** A request that enters with a cached prefix makes its blocks glow. */
  noteHits({ rows, block_size, blocks_per_cell }) {
    const until = performance.now() + GLOW_MS;
    for (const { id, num_cached, cells } of rows) {
      if (this.known.has(id)) continue;
      const hits = Math.ceil(num_cached / block_size / blocks_per_cell);
      for (const cell of cells.slice(0, hits)) this.glow.set(cell, until);
    }
    this.known = new Set(rows.map(({ id }) => id));
    if (this.glow.size && !still.matches) this.animate();
  }

  animate() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
      if (this.glow.size) this.animate();
    });
  }

  light(id) {
    this.lit = id;
    this.draw();
  }

  layout(width) {
    const { length } = this.view.pool;
    const size = Math.max(5, Math.min(18, Math.floor(Math.sqrt((width * TALL) / length))));
    const columns = Math.max(1, Math.floor(width / size));
    return { size, columns, height: Math.ceil(length / columns) * size };
  }

  draw() {
    const width = this.canvas.parentElement.clientWidth - 28;
    if (!this.view || width < 40) return;
    const { size, columns, height } = this.layout(width);
    this.canvas.style.height = `${height}px`;
    const g = context(this.canvas, width, height);
    const now = performance.now(), gap = size > 8 ? 1.5 : 1, side = size - gap;
    const [accent, gold, ink, line] = ["--accent", "--gold", "--ink", "--line-strong"].map(colour);
    g.lineWidth = 1;
    [...this.view.pool].forEach((state, cell) => {
      const x = (cell % columns) * size, y = Math.floor(cell / columns) * size;
      const owners = this.owners.get(cell) ?? [];
      g.globalAlpha = this.lit && !owners.includes(this.lit) ? 0.18 : 1;
      if (state === ".") {
        g.globalAlpha *= 0.35;
        g.strokeStyle = line;
        g.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
        return;
      }
      if (state === "c") g.globalAlpha *= 0.34;
      g.fillStyle = { c: accent, s: gold }[state] ?? (owners[0] ? requestColour(owners[0]) : ink);
      g.fillRect(x, y, side, side);
      const left = (this.glow.get(cell) ?? 0) - now;
      if (left > 0 && !still.matches) {
        g.globalAlpha = left / GLOW_MS;
        g.strokeStyle = gold;
        g.lineWidth = 2;
        g.strokeRect(x - 1, y - 1, side + 2, side + 2);
        g.lineWidth = 1;
      }
    });
    g.globalAlpha = 1;
    for (const [cell, until] of this.glow) if (until < now) this.glow.delete(cell);
  }

  point(event) {
    if (!this.view) return;
    const box = this.canvas.getBoundingClientRect();
    const { size, columns } = this.layout(box.width);
    const column = Math.floor((event.clientX - box.left) / size);
    const cell = Math.floor((event.clientY - box.top) / size) * columns + column;
    const state = column < columns ? this.view.pool[cell] : undefined;
    const owners = this.owners.get(cell) ?? [];
    this.onLight(owners);
    if (!state) return hidePopover();
    const per = this.view.blocks_per_cell;
    const name = per === 1 ? `Block ${cell}` : `Blocks ${cell * per} to ${(cell + 1) * per - 1}`;
    const text = {
      ".": "free", c: "free; its content is cached until the space is needed",
      o: `owned by request ${owners[0] ?? "of another row"}`, s: `shared by requests ${owners.join(", ")}`,
    }[state];
    popover(`${name}: ${text}`, { left: event.clientX + 12, top: event.clientY, bottom: event.clientY });
  }
}
