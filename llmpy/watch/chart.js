
"use strict";
// One chart: what it shows comes from `look`, which all charts share: runs, the steps in view, the step pointed at.

const EDGE = { left: 58, right: 12, top: 8, bottom: 22 };
/** A colour of the style sheet as the canvas takes it: `light-dark` is only resolved where it is used. */
function css(name) {
  document.body.style.caretColor = `var(${name})`;
  return getComputedStyle(document.body).caretColor;
}
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

/** 1, 2 or 5 times a power of ten: the least that is not below x. */
function roundUp(x) {
  const unit = 10 ** Math.floor(Math.log10(x));
  return [1, 2, 5, 10].map((m) => m * unit).find((m) => m >= x * 0.999);
}

/** About `count` round numbers between low and high. */
function ticks(low, high, count) {
  const step = roundUp((high - low) / count);
  const from = Math.ceil(low / step - 1e-9), to = Math.floor(high / step + 1e-9);
  return Array.from({ length: clamp(to - from + 1, 0, 50) }, (_, i) => (from + i) * step);
}

/** Round numbers on a logarithmic axis: 1, 2, 5 of every decade, or whole decades if they are many. */
function logTicks(low, high) {
  const from = Math.floor(low), to = Math.ceil(high), every = Math.ceil((to - from) / 8);
  const found = [];
  for (let decade = from; decade <= to; decade += every)
    for (const m of every > 1 || to - from > 3 ? [1] : [1, 2, 3, 5]) found.push(Math.log10(m) + decade);
  return found.filter((t) => t >= low && t <= high);
}

function shown(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

/** The place in an ascending list whose number is nearest to x. */
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= x) low = middle; else high = middle;
  }
  return low === high || x - list[low] <= list[high] - x ? low : high;
}

class Chart {
  /** `about`: key, title, and what of it is special; `look`: what all charts share; `changed`: call when that changes. */
  constructor(about, look, changed) {
    Object.assign(this, { about, look, changed });
    this.figure = document.createElement("figure");
    this.figure.className = about.wide ? "wide" : "";
    this.figure.id = about.key;
    const title = document.createElement("h2"), note = document.createElement("span");
    title.append(about.title, note);
    note.textContent = about.note ? ` ${about.note}` : "";
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.hover = document.createElement("div");
    this.hover.className = "hover";
    this.hover.hidden = true;
    this.figure.append(title, this.canvas, this.hover);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  listen() {
    const { canvas, look, changed } = this;
    const stepAt = (event) => this.step(event.clientX - canvas.getBoundingClientRect().left);
    canvas.onpointerdown = (event) => {
      if (event.button === 0 && this.x) look.drag = { chart: this, from: stepAt(event) };
    };
    canvas.onpointermove = (event) => {
      if (!this.x) return;
      look.at = stepAt(event);
      look.over = this;
      if (look.drag) look.drag.to = look.at;
      changed();
    };
    canvas.onpointerup = () => {
      const { from, to } = look.drag || {};
      look.drag = null;
      if (to !== undefined && Math.abs(this.pixel(to) - this.pixel(from)) > 8)
        look.zoom([Math.max(0, Math.floor(Math.min(from, to))), Math.ceil(Math.max(from, to))]);
      changed();
    };
    canvas.onpointerleave = () => { look.at = look.over = look.drag = null; changed(); };
    canvas.ondblclick = () => look.zoom(null);
    canvas.onblur = canvas.onpointerleave;
    canvas.onkeydown = (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") look.zoom(null);
      if (!way || !this.x) return;
      event.preventDefault();
      const [first, last] = this.x;
      look.at = clamp((look.at ?? (way > 0 ? first : last)) + (way * (last - first)) / 100, first, last);
      look.over = this;
      changed();
    };
  }

  pixel(step) { return EDGE.left + ((step - this.x[0]) / (this.x[1] - this.x[0])) * this.width; }
  step(pixel) { return this.x[0] + clamp((pixel - EDGE.left) / this.width, 0, 1) * (this.x[1] - this.x[0]); }
  level(value) {
    const v = this.look.log && this.about.log ? Math.log10(Math.max(value, 1e-30)) : value;
    return EDGE.top + (1 - clamp((v - this.y[0]) / (this.y[1] - this.y[0]), -9, 10)) * this.height;
  }

  /** The curves of every run that is shown: the run, the curve, and the one drawn with it as circles. */
  lines() {
    const { key, also } = this.about;
    return this.look.runs()
      .map((run) => ({ run, line: run.picture.curves[key], also: run.picture.curves[also] }))
      .filter(({ line, also }) => line || also);
  }

  /** Both axes from what there is; false if there is nothing. */
  measure(lines) {
    let [first, last] = this.look.view || [Infinity, -Infinity];
    if (!this.look.view)
      for (const run of this.look.runs())
        for (const { step } of Object.values(run.picture.curves)) {
          first = Math.min(first, step[0]);
          last = Math.max(last, step[step.length - 1]);
        }
    this.x = first <= last ? [first, last > first ? last : first + 1] : null;
    const values = [];
    for (const { line, also } of lines)
      for (const curve of [line, also])
        if (curve)
          curve.step.forEach((s, i) => {
            if (s >= first && s <= last) values.push((curve.least || curve.mean)[i], (curve.largest || curve.mean)[i]);
          });
    if (!this.x || !values.length) return false;
    const log = this.look.log && this.about.log;
    const found = Float64Array.from(log ? values.filter((v) => v > 0).map(Math.log10) : values).sort();
    if (!found.length) return false;
    let low = this.about.zero && !log ? Math.min(0, found[0]) : found[0], high = found[found.length - 1];
    // A few values far above all others do not press the rest to the floor: they are marked at the upper edge.
    const usual = found[Math.floor(0.98 * (found.length - 1))];
    if (this.about.clip && !log && usual > 0 && high > this.about.clip * usual) high = 1.3 * usual;
    const room = 0.06 * (high - low || Math.abs(high) || 1);
    this.y = [this.about.zero && !log ? low : low - room, high + room];
    return true;
  }

  draw() {
    const lines = this.lines(), { canvas, look, about } = this;
    this.figure.hidden = !lines.length;
    const wide = canvas.clientWidth, tall = canvas.clientHeight;
    if (!wide || !tall) return;
    this.width = wide - EDGE.left - EDGE.right;
    this.height = tall - EDGE.top - EDGE.bottom;
    const ratio = window.devicePixelRatio || 1, ink = canvas.getContext("2d");
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    ink.scale(ratio, ratio);
    this.hover.hidden = true;
    const told = lines.map(({ run, line, also }) => {
      const curve = line || also;
      return `${run.name} to step ${curve.step[curve.step.length - 1]}`;
    });
    canvas.setAttribute("aria-label", `${about.title}: ${told.join(", ") || "nothing yet"}`);
    if (!this.measure(lines)) return;
    this.axes(ink);
    ink.save();
    ink.beginPath();
    ink.rect(EDGE.left, 0, this.width, EDGE.top + this.height);
    ink.clip();
    for (const { run, line, also } of lines) {
      if (line) this.curve(ink, run, line);
      if (also) this.circles(ink, also, css(run.colour));
      this.marks(ink, run);
    }
    ink.restore();
    if (look.drag?.to !== undefined) {
      ink.fillStyle = css("--soft");
      ink.globalAlpha = 0.2;
      const [from, to] = [this.pixel(look.drag.from), this.pixel(look.drag.to)];
      ink.fillRect(from, EDGE.top, to - from, this.height);
      ink.globalAlpha = 1;
    }
    if (look.at !== null && look.at !== undefined) this.point(ink, lines);
  }

  axes(ink) {
    const log = this.look.log && this.about.log, scale = this.about.scale || 1;
    ink.font = "11.5px system-ui, sans-serif";
    ink.strokeStyle = css("--line");
    ink.fillStyle = css("--soft");
    ink.lineWidth = 1;
    ink.textAlign = "right";
    ink.textBaseline = "middle";
    const [low, high] = this.y.map((y) => y * (log ? 1 : scale));
    for (const tick of log ? logTicks(low, high) : ticks(low, high, this.height / 45)) {
      const value = log ? 10 ** tick : tick / scale, y = Math.round(this.level(value)) + 0.5;
      ink.beginPath();
      ink.moveTo(EDGE.left, y);
      ink.lineTo(EDGE.left + this.width, y);
      ink.stroke();
      ink.fillText(shown(log ? value : tick), EDGE.left - 7, y);
    }
    ink.textAlign = "center";
    ink.textBaseline = "top";
    for (const tick of ticks(...this.x, this.width / 90))
      if (Number.isInteger(tick)) ink.fillText(tick.toLocaleString("en"), this.pixel(tick), EDGE.top + this.height + 6);
  }

  path(ink, steps, values) {
    ink.beginPath();
    steps.forEach((s, i) => ink.lineTo(this.pixel(s), this.level(values[i])));
    ink.stroke();
  }

  curve(ink, run, line) {
    ink.strokeStyle = ink.fillStyle = css(run.colour);
    ink.lineJoin = "round";
    if (line.least) {
      ink.globalAlpha = 0.2;
      ink.beginPath();
      line.step.forEach((s, i) => ink.lineTo(this.pixel(s), this.level(line.largest[i])));
      for (let i = line.step.length - 1; i >= 0; i--) ink.lineTo(this.pixel(line.step[i]), this.level(line.least[i]));
      ink.fill();
    }
    ink.globalAlpha = line.smooth ? 0.35 : 1;
    ink.lineWidth = line.smooth ? 1 : 1.8;
    this.path(ink, line.step, line.mean);
    ink.globalAlpha = 1;
    ink.lineWidth = 2;
    if (line.smooth) this.path(ink, line.step, line.smooth);
    if (line.step.length < 40) this.dots(ink, line, 2);
  }

  dots(ink, line, radius) {
    line.step.forEach((s, i) => {
      ink.beginPath();
      ink.arc(this.pixel(s), this.level(line.mean[i]), radius, 0, 7);
      ink.fill();
    });
  }

  circles(ink, line, colour) {
    ink.strokeStyle = colour;
    ink.lineWidth = 1.6;
    ink.setLineDash([5, 4]);
    this.path(ink, line.step, line.mean);
    ink.setLineDash([]);
    if (line.step.length < 150) {
      ink.fillStyle = colour;
      this.dots(ink, line, 4);
      ink.fillStyle = css("--card");
      this.dots(ink, line, 2.3);
    }
  }

  /** Outliers, at the upper edge if they lie beyond it; steps that were skipped, at the lower one. */
  marks(ink, run) {
    const bottom = EDGE.top + this.height;
    ink.fillStyle = css("--mark");
    const triangle = (x, y, size) => {
      ink.beginPath();
      ink.moveTo(x, y - size);
      ink.lineTo(x - size, y + size);
      ink.lineTo(x + size, y + size);
      ink.fill();
    };
    if (this.about.outliers)
      for (const [step, norm] of run.picture.outliers) triangle(this.pixel(step), Math.max(this.level(norm), EDGE.top + 4), 4);
    if (this.about.marks) for (const [step] of run.picture.marks) triangle(this.pixel(step), bottom - 5, 4.5);
  }

  /** What is there at the step that is pointed at: a line in every chart, the numbers in the one under the pointer. */
  point(ink, lines) {
    const { look, about, hover } = this, scale = about.scale || 1;
    const x = Math.round(this.pixel(clamp(look.at, ...this.x))) + 0.5;
    ink.strokeStyle = css("--soft");
    ink.lineWidth = 1;
    ink.beginPath();
    ink.moveTo(x, EDGE.top);
    ink.lineTo(x, EDGE.top + this.height);
    ink.stroke();
    if (look.over !== this) return;
    hover.replaceChildren();
    const say = (text, colour) => {
      const row = document.createElement("p");
      if (colour) {
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = `var(${colour})`;
        row.append(swatch);
      }
      row.append(text);
      hover.append(row);
    };
    const near = 5 * (this.x[1] - this.x[0]) / this.width;
    for (const { run, line, also } of lines) {
      const words = [], steps = (line || also).step;
      if (look.at > steps[steps.length - 1] + near || look.at < steps[0] - near) continue; // the run was not there
      if (line) {
        const i = nearest(line.step, look.at), at = (list) => shown(list[i] * scale);
        words.push(`step ${Math.round(line.step[i]).toLocaleString("en")}: ${at(line.mean)}`);
        if (line.least) words.push(`(${at(line.least)} … ${at(line.largest)})`);
        if (line.smooth) words.push(`smoothed ${at(line.smooth)}`);
        ink.fillStyle = css(run.colour);
        ink.beginPath();
        ink.arc(this.pixel(line.step[i]), this.level((line.smooth || line.mean)[i]), 4, 0, 7);
        ink.fill();
      }
      if (also) {
        const i = nearest(also.step, look.at);
        words.push(`validation ${shown(also.mean[i] * scale)} at step ${Math.round(also.step[i]).toLocaleString("en")}`);
      }
      say(words.join(" · "), run.colour);
      for (const [step, text] of about.marks ? run.picture.marks : [])
        if (Math.abs(step - look.at) < near) say(`step ${step.toLocaleString("en")}: ${text}`);
      for (const [step, norm, z] of about.outliers ? run.picture.outliers : [])
        if (Math.abs(step - look.at) < near)
          say(`step ${step.toLocaleString("en")}: outlier, ${shown(norm)}, ${shown(z)} deviations above the mean`);
    }
    hover.hidden = false;
    const left = x < EDGE.left + this.width / 2;
    hover.style.left = left ? `${x + 22}px` : "auto";
    hover.style.right = left ? "auto" : `${this.figure.clientWidth - x}px`;
  }
}
