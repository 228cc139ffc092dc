
"use strict";
// One chart: what it shows comes from `look`, which all charts share: runs, the axis below, which part of it is in view, and
// the place pointed at.

const EDGE = { left: 58, right: 12, top: 8, bottom: 22 };
// What curves may lie along, and of each its units: size and sign, the largest first.
const AXES = {
  step: [[1, ""]],
  tokens: [[1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]],
  seconds: [[3600, " h"], [60, " min"], [1, " s"]],
};
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

/** The unit for numbers of about this size. */
function unitOf(axis, size) {
  return AXES[axis].find(([unit]) => size >= 1.5 * unit) || AXES[axis].at(-1);
}

/** The last place in an ascending list whose number is not above x; 0 if there is none. */
function before(list, x) {
  let low = 0, high = list.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= x) low = middle; else high = middle;
  }
  return low;
}

/** The place in an ascending list whose number is nearest to x. */
function nearest(list, x) {
  const i = before(list, x);
  return list[i + 1] - x < x - list[i] ? i + 1 : i;
}

/** Where a step lies on an axis, as the clock of its run has it: exactly at some steps, on a straight line between two. */
function along(clock, axis, step) {
  if (axis === "step") return step;
  const i = before(clock.step, step), steps = clock.step, shows = clock[axis];
  if (i + 1 >= steps.length || step <= steps[i]) return shows[i];
  return shows[i] + ((shows[i + 1] - shows[i]) * (step - steps[i])) / (steps[i + 1] - steps[i]);
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
    const under = (event) => this.place(event.clientX - canvas.getBoundingClientRect().left);
    canvas.onpointerdown = (event) => {
      if (event.button === 0 && this.x) look.drag = { chart: this, from: under(event) };
    };
    canvas.onpointermove = (event) => {
      if (!this.x) return;
      look.at = under(event);
      look.over = this;
      if (look.drag) look.drag.to = look.at;
      changed();
    };
    canvas.onpointerup = () => {
      const { from, to } = look.drag || {};
      look.drag = null;
      if (to !== undefined && Math.abs(this.pixel(to) - this.pixel(from)) > 8) {
        const [first, last] = [Math.min(from, to), Math.max(from, to)];
        look.zoom(look.axis === "step" ? [Math.max(0, Math.floor(first)), Math.ceil(last)] : [first, last]);
      }
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

  pixel(place) { return EDGE.left + ((place - this.x[0]) / (this.x[1] - this.x[0])) * this.width; }
  pixelOf(run, step) { return this.pixel(along(run.picture.clock, this.look.axis, step)); }
  place(pixel) { return this.x[0] + clamp((pixel - EDGE.left) / this.width, 0, 1) * (this.x[1] - this.x[0]); }
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
    const { axis, view } = this.look;
    let [first, last] = view || [Infinity, -Infinity];
    if (!view)
      for (const run of this.look.runs())
        for (const { [axis]: places } of Object.values(run.picture.curves)) {
          first = Math.min(first, places[0]);
          last = Math.max(last, places[places.length - 1]);
        }
    this.x = first <= last ? [first, last > first ? last : first + 1] : null;
    const values = [];
    for (const { line, also } of lines)
      for (const curve of [line, also])
        if (curve)
          curve[axis].forEach((x, i) => {
            if (x >= first && x <= last) values.push((curve.least || curve.mean)[i], (curve.largest || curve.mean)[i]);
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
    ink.rect(EDGE.left - 5, 0, this.width + 10, EDGE.top + this.height); // with room for a circle at the first and last place
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
    for (const [text, middle] of this.below(ink)) ink.fillText(text, middle, EDGE.top + this.height + 6);
  }

  /** What is written below, and the middle of each: its place, unless the canvas would end before the text does. */
  below(ink) {
    const { axis } = this.look, [unit, sign] = unitOf(axis, this.x[1] - this.x[0]);
    return ticks(...this.x.map((x) => x / unit), this.width / 90)
      .filter((tick) => axis !== "step" || Number.isInteger(tick))
      .map((tick) => {
        const text = tick.toLocaleString("en", { maximumFractionDigits: 9 }) + (tick ? sign : "");
        const most = EDGE.left + this.width + EDGE.right - ink.measureText(text).width / 2;
        return [text, Math.min(this.pixel(tick * unit), most)];
      });
  }

  path(ink, line, values) {
    ink.beginPath();
    line[this.look.axis].forEach((x, i) => ink.lineTo(this.pixel(x), this.level(values[i])));
    ink.stroke();
  }

  curve(ink, run, line) {
    ink.strokeStyle = ink.fillStyle = css(run.colour);
    ink.lineJoin = "round";
    if (line.least) {
      ink.globalAlpha = 0.2;
      ink.beginPath();
      const places = line[this.look.axis];
      places.forEach((x, i) => ink.lineTo(this.pixel(x), this.level(line.largest[i])));
      for (let i = places.length - 1; i >= 0; i--) ink.lineTo(this.pixel(places[i]), this.level(line.least[i]));
      ink.fill();
    }
    ink.globalAlpha = line.smooth ? 0.35 : 1;
    ink.lineWidth = line.smooth ? 1 : 1.8;
    this.path(ink, line, line.mean);
    ink.globalAlpha = 1;
    ink.lineWidth = 2;
    if (line.smooth) this.path(ink, line, line.smooth);
    if (line.step.length < 40) this.dots(ink, line, 2);
  }

  dots(ink, line, radius) {
    line[this.look.axis].forEach((x, i) => {
      ink.beginPath();
      ink.arc(this.pixel(x), this.level(line.mean[i]), radius, 0, 7);
      ink.fill();
    });
  }

  circles(ink, line, colour) {
    ink.strokeStyle = colour;
    ink.lineWidth = 1.6;
    ink.setLineDash([5, 4]);
    this.path(ink, line, line.mean);
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
      for (const [step, norm] of run.picture.outliers) triangle(this.pixelOf(run, step), Math.max(this.level(norm), EDGE.top + 4), 4);
    if (this.about.marks) for (const [step] of run.picture.marks) triangle(this.pixelOf(run, step), bottom - 5, 4.5);
  }

  /** What is there at the place that is pointed at: a line in every chart, the numbers in the one under the pointer. */
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
    const close = (run, step) => Math.abs(along(run.picture.clock, look.axis, step) - look.at) < near;
    for (const { run, line, also } of lines) {
      const words = [], places = (line || also)[look.axis];
      if (look.at > places[places.length - 1] + near || look.at < places[0] - near) continue; // the run was not there
      if (line) {
        const i = nearest(places, look.at), at = (list) => shown(list[i] * scale);
        words.push(`step ${Math.round(line.step[i]).toLocaleString("en")}: ${at(line.mean)}`);
        if (line.least) words.push(`(${at(line.least)} … ${at(line.largest)})`);
        if (line.smooth) words.push(`smoothed ${at(line.smooth)}`);
        ink.fillStyle = css(run.colour);
        ink.beginPath();
        ink.arc(this.pixel(places[i]), this.level((line.smooth || line.mean)[i]), 4, 0, 7);
        ink.fill();
      }
      if (also) {
        const i = nearest(also[look.axis], look.at);
        words.push(`validation ${shown(also.mean[i] * scale)} at step ${Math.round(also.step[i]).toLocaleString("en")}`);
      }
      if (look.axis !== "step") {
        const x = places[nearest(places, look.at)], [unit, sign] = unitOf(look.axis, x);
        words.push(shown(x / unit) + sign + (look.axis === "tokens" ? " tokens" : ""));
      }
      say(words.join(" · "), run.colour);
      for (const [step, text] of about.marks ? run.picture.marks : [])
        if (close(run, step)) say(`step ${step.toLocaleString("en")}: ${text}`);
      for (const [step, norm, z] of about.outliers ? run.picture.outliers : [])
        if (close(run, step))
          say(`step ${step.toLocaleString("en")}: outlier, ${shown(norm)}, ${shown(z)} deviations above the mean`);
    }
    hover.hidden = false;
    const left = x < EDGE.left + this.width / 2;
    hover.style.left = left ? `${x + 22}px` : "auto";
    hover.style.right = left ? "auto" : `${this.figure.clientWidth - x}px`;
  }
}
