// A line over the last seconds, as a wash at the foot of a tile.

import { colour, context } from "./dom.js";

export class Chart {
  constructor(canvas, seconds) {
    Object.assign(this, { canvas, seconds, points: [] });
  }

  clear() {
    this.points = [];
    this.draw();
  }

  /** `value` null: nothing was going on. */
  add(time, value) {
    this.points.push([time, value]);
    while (this.points[0][0] < time - this.seconds) this.points.shift();
  }

  draw() {
    const { width, height } = this.canvas.getBoundingClientRect();
    if (!width) return;
    const g = context(this.canvas, width, height);
    const last = this.points.at(-1)?.[0] ?? 0;
    // Scaled so that a single outlier does not flatten the rest.
    const values = this.points.map(([, v]) => v ?? 0).sort((a, b) => a - b);
    const top = Math.max((values[Math.floor(values.length * 0.98)] ?? 1) * 1.15, 1e-9);
    const x = (time) => width * (1 - (last - time) / this.seconds);
    const y = (value) => height - 1 - Math.min(value / top, 1) * (height - 6);
    g.strokeStyle = g.fillStyle = colour("--accent");
    g.lineWidth = 1.5;
    for (const run of runs(this.points)) {
      g.beginPath();
      for (const [time, value] of run) g.lineTo(x(time), y(value));
      g.stroke();
      g.lineTo(x(run.at(-1)[0]), height);
      g.lineTo(x(run[0][0]), height);
      g.globalAlpha = 0.12;
      g.fill();
      g.globalAlpha = 1;
    }
  }
}

/** The stretches of points that have values. */
function runs(points) {
  const all = [[]];
  for (const point of points) {
    if (point[1] === null) all.push([]);
    else all.at(-1).push(point);
  }
  return all.filter((run) => run.length > 1);
}
