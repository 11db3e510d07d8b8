"use strict";
// The charts: drawn as SVG from the block of JSON, anew whenever a choice or the width changes.
// Text goes in as textContent only, so nothing in it is markup.

const data = JSON.parse(document.getElementById("data").textContent);
const AXES = { tokens: "tokens seen", time: "training time", step: "step" };
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const BLANK = 1 / 25; // of the height, above and below the curves
const state = {
  axis: "tokens",
  smoothing: 0,
  hiddenRuns: new Set(),
  hiddenKinds: new Set(data.runs.flatMap((run) => run.marks.filter((m) => !m.shown).map((m) => m.kind))),
  range: null, // [from, to] on the axis, where part of it was chosen
};

// --- numbers -------------------------------------------------------------------------------------

const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
const si = (v, units, base = "") => {
  const unit = units.find(([size]) => Math.abs(v) >= size);
  return unit ? trim((v / unit[0]).toPrecision(4)) + unit[1] : trim(v.toPrecision(4)) + base;
};
const LETTERS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
const BYTES = [[1e12, " TB"], [1e9, " GB"], [1e6, " MB"], [1e3, " kB"]];
const duration = (s) => {
  if (s < 10) return s >= 1 || s === 0 ? trim(s.toFixed(1)) + "s" : trim((s * 1e3).toPrecision(3)) + "ms";
  const [d, h, m, rest] = [s / 86400, (s / 3600) % 24, (s / 60) % 60, s % 60].map(Math.floor);
  const two = (n) => String(n).padStart(2, "0");
  if (d) return h ? `${d}d${two(h)}h` : `${d}d`;
  if (h) return m ? `${h}h${two(m)}m` : `${h}h`;
  return m ? (rest ? `${m}m${two(rest)}s` : `${m}m`) : `${rest}s`;
};
const SHOW = {
  number: (v) => (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : trim(v.toFixed(4))),
  amount: (v) => si(v, LETTERS),
  bytes: (v) => si(v, BYTES, " B"),
  share: (v) => trim((v * 100).toFixed(2)) + "%",
  seconds: duration,
  tiny: (v) => (v ? v.toExponential(2).replace("e+0", "").replace(/\.?0+e/, "e") : "0"),
};
const showPlace = (axis, v) =>
  axis === "time" ? duration(v) : axis === "step" ? Math.round(v).toLocaleString("en-US") : si(v, LETTERS);

// --- ticks ---------------------------------------------------------------------------------------

const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

/** Round values between two others, about `count` of them. */
function ticks(low, high, count, unit) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  let step = 10 ** Math.floor(Math.log10(rough));
  step *= [1, 2, 5, 10].find((m) => m * step >= rough * 0.999) || 10;
  if (unit === "time" && rough > 0.5) step = TIMES.find((t) => t >= rough) || 86400 * Math.ceil(rough / 86400);
  if (unit === "step" || unit === "tokens") step = Math.max(step, 1);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 1.2) return ticks(low, high, count).filter((v) => v > 0);
  const found = [];
  const every = Math.ceil(decades / count);
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    for (const m of decades < 2.5 ? [1, 2, 5] : [1]) {
      const v = m * 10 ** e;
      if (e % every === 0 && v >= low * 0.999 && v <= high * 1.001) found.push(v);
    }
  }
  return found;
}

// --- curves --------------------------------------------------------------------------------------

/** An exponential mean that doesn't lean on its beginning; gaps stay gaps. */
function smooth(values, weight) {
  let sum = 0, total = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = sum * weight + v * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

/** The points of a curve on the axis chosen. */
function points(curve) {
  const table = data.runs[curve.run][curve.table];
  const raw = table.values[curve.field];
  const smoothed = curve.table === "steps" && state.smoothing > 0 && curve.field !== "learning_rate";
  return {
    curve, raw, x: table.axes[state.axis], low: table.low[curve.field], high: table.high[curve.field],
    y: smoothed ? smooth(raw, state.smoothing) : raw, smoothed, together: table.rowsTogether,
  };
}

function extent(lists, keep) {
  let low = Infinity, high = -Infinity;
  for (const [x, y] of lists) {
    for (let i = 0; i < x.length; i++) {
      const v = y[i];
      if (v === null || x[i] === null || !keep(x[i], v)) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
  }
  return low <= high ? [low, high] : null;
}

/** All of the axis that the runs shown have, the same for every chart. */
function wholeRange() {
  const runs = data.runs.filter((_, n) => !state.hiddenRuns.has(n));
  const axes = runs.flatMap((run) => [run.steps, run.evaluations]).map((table) => table.axes[state.axis]);
  const found = extent(axes.map((x) => [x, x]), () => true);
  return found && [found[0] < 0.2 * found[1] ? 0 : found[0], found[1]];
}

/** A path through the points; broken at gaps, and where a run was rolled back. */
function path(x, y, toX, toY) {
  let d = "", pen = false, last = -Infinity;
  for (let i = 0; i < x.length; i++) {
    const px = x[i] === null ? null : toX(x[i]), py = y[i] === null ? null : toY(y[i]);
    if (px === null || py === null) { pen = false; continue; }
    const at = `${px.toFixed(1)} ${py.toFixed(1)}`;
    d += pen && x[i] >= last ? `L${at}` : `M${at}h0`; // h0: a point between two gaps is a dot
    pen = true;
    last = x[i];
  }
  return d;
}

function band(x, low, high, toX, toY) {
  const there = [...x.keys()].filter((i) => x[i] !== null && low[i] !== null && toY(low[i]) !== null);
  const edge = (values, order) => order.map((i) => `${toX(x[i]).toFixed(1)} ${toY(values[i]).toFixed(1)}`);
  return there.length ? "M" + [...edge(high, there), ...edge(low, [...there].reverse())].join("L") + "Z" : "";
}

// --- elements ------------------------------------------------------------------------------------

function make(parent, name, attributes = {}, content = "") {
  const svg = parent.namespaceURI === "http://www.w3.org/2000/svg" || name === "svg";
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (content) element.textContent = content;
  parent.append(element);
  return element;
}

function key(parent, curve) {
  const color = data.runs.length > 1 ? "any" : `c${curve.color % 8}`;
  const swatch = make(parent, "svg", { viewBox: "0 0 22 10", class: color, "aria-hidden": "true" });
  make(swatch, "line", { x1: 0, x2: 22, y1: 5, y2: 5, class: "curve", "stroke-dasharray": DASHES[curve.dash % 4] });
  if (curve.table === "evaluations") make(swatch, "circle", { cx: 11, cy: 5, r: 3.5, class: "held" });
}

// --- a chart -------------------------------------------------------------------------------------

class Chart {
  constructor(spec, parent) {
    this.spec = spec;
    this.hidden = new Set();
    this.log = false;
    this.box = make(parent, "article", { class: spec.main ? "chart main" : "chart" });
    const head = make(this.box, "div", { class: "chart-head" });
    make(head, "h3", {}, spec.title);
    const which = new Map(spec.curves.filter((curve) => curve.what).map((curve) => [curve.what, curve]));
    for (const curve of which.values()) this.addLegend(head, curve);
    if (spec.curves.length) {
      const log = make(head, "button", { class: "log", type: "button", "aria-pressed": "false" }, "log");
      log.title = "Logarithmic values";
      log.onclick = () => { this.log = press(log); this.draw(); };
    }
    make(this.box, "p", { class: "about" }, spec.about);
    if (spec.missing) make(this.box, "p", { class: "missing" }, spec.missing);
    if (!spec.curves.length) return;
    this.svg = make(this.box, "svg", { class: "plot", role: "img", tabindex: 0 });
    this.readout = make(this.box, "div", { class: "readout", role: "status" });
    this.readout.hidden = true;
    this.listen();
    const fit = () => { if (this.width !== this.svg.clientWidth) this.draw(); };
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(this.svg);
  }

  /** Of the curves of each run, this one; what colour a run has is said above the charts. */
  addLegend(head, curve) {
    const button = make(head, "button", { class: "legend", type: "button", "aria-pressed": "true" });
    key(button, curve);
    button.append(curve.what);
    button.onclick = () => { press(button) ? this.hidden.delete(curve.what) : this.hidden.add(curve.what); this.draw(); };
  }

  draw() {
    if (!this.svg) return;
    const width = (this.width = this.svg.clientWidth || 600), height = this.spec.main ? 380 : 210;
    const frame = (this.frame = { left: 58, right: width - 12, top: 14, bottom: height - 38 });
    const svg = this.svg;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const shown = this.spec.curves.filter((curve) => !this.hidden.has(curve.what) && !state.hiddenRuns.has(curve.run));
    this.lines = shown.map(points);
    const range = state.range || wholeRange();
    const inside = (x, v) => x >= range[0] && x <= range[1] && (!this.log || v > 0);
    const spans = this.lines.flatMap((l) => [[l.x, l.raw], ...(l.low ? [[l.x, l.low], [l.x, l.high]] : [])]);
    const values = range && extent(spans, inside);
    this.toX = null;
    if (!values) {
      const why = !shown.length ? "Nothing chosen" : range ? "No values here" : `No ${AXES[state.axis]} in metrics.jsonl`;
      make(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, why);
      return;
    }
    this.scale(range, values);
    this.drawAxes(height);
    const clip = `clip-${charts.indexOf(this)}`;
    const rect = { x: frame.left, y: 0, width: frame.right - frame.left, height: frame.bottom + 6 };
    make(make(svg, "clipPath", { id: clip }), "rect", rect);
    const plot = make(svg, "g", { "clip-path": `url(#${clip})` });
    this.drawMarks(plot, range);
    for (const line of this.lines) this.drawLine(plot, line);
    this.over = make(svg, "g", {});
    svg.setAttribute("aria-label", this.describe(values));
  }

  scale([x0, x1], [low, high]) {
    const { left, right, top, bottom } = this.frame;
    const wide = x1 - x0 || 1, of = this.log ? Math.log : (v) => v;
    const rounding = 1e-9 * Math.max(Math.abs(low), Math.abs(high)); // means of equal numbers differ by less
    if (high - low <= rounding) [low, high] = this.log ? [low / 2, high * 2] : [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)];
    let [a, b] = [of(low), of(high)];
    const blank = (b - a) * BLANK;
    const fromZero = !this.log && low >= 0 && (low - 0) / (high - low) < 0.35;
    [a, b] = [fromZero ? 0 : a - blank, b + blank];
    this.values = this.log ? [Math.exp(a), Math.exp(b)] : [a, b];
    this.range = [x0, x1];
    this.toX = (v) => left + ((v - x0) / wide) * (right - left);
    this.fromX = (px) => x0 + ((px - left) / (right - left)) * wide;
    this.toY = (v) => (this.log && v <= 0 ? null : bottom - ((of(v) - a) / (b - a)) * (bottom - top));
  }

  drawAxes(height) {
    const { left, right, top, bottom } = this.frame, svg = this.svg, show = SHOW[this.spec.unit];
    const count = Math.round((bottom - top) / 40);
    for (const v of this.log ? logTicks(...this.values, count) : ticks(...this.values, count)) {
      const y = this.toY(v);
      make(svg, "line", { x1: left, x2: right, y1: y, y2: y, class: "grid" });
      make(svg, "text", { x: left - 7, y: y + 4, "text-anchor": "end" }, show(v));
    }
    for (const v of ticks(...this.range, Math.max(2, Math.round((right - left) / 110)), state.axis)) {
      const x = this.toX(v);
      make(svg, "line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: "axis" });
      const anchor = x > right - 24 ? "end" : x < left + 12 ? "start" : "middle";
      make(svg, "text", { x, y: bottom + 17, "text-anchor": anchor }, showPlace(state.axis, v));
    }
    make(svg, "line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" });
    make(svg, "text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, AXES[state.axis]);
  }

  drawMarks(plot, [x0, x1]) {
    const { top, bottom } = this.frame;
    this.marks = data.runs.flatMap((run, n) => (state.hiddenRuns.has(n) ? [] : run.marks.map((mark) => ({ run, mark }))))
      .filter(({ mark }) => !state.hiddenKinds.has(mark.kind) && mark[state.axis] !== null)
      .filter(({ mark }) => mark[state.axis] >= x0 && mark[state.axis] <= x1);
    for (const { run, mark } of this.marks) {
      const x = this.toX(mark[state.axis]), grave = mark.grave ? " grave" : "";
      make(plot, "line", { x1: x, x2: x, y1: top, y2: bottom, class: "mark" + grave });
      make(plot, "path", { d: `M${x - 4.5} ${top - 9}h9l-4.5 8z`, class: data.runs.length > 1 ? `flag c${run.color}` : "flag" + grave });
    }
  }

  drawLine(plot, line) {
    const group = make(plot, "g", { class: `c${line.curve.color % 8}` });
    const curve = (y, kind, dash) =>
      make(group, "path", { d: path(line.x, y, this.toX, this.toY), class: kind, "stroke-dasharray": dash });
    if (line.low) make(group, "path", { d: band(line.x, line.low, line.high, this.toX, this.toY), class: "band" });
    if (line.smoothed) curve(line.raw, "curve raw", "");
    const heldOut = line.curve.table === "evaluations";
    if (heldOut) curve(line.y, "halo", "");
    curve(line.y, heldOut ? "curve over" : "curve", DASHES[line.curve.dash % 4]);
    const there = [...line.x.keys()].filter((i) => line.x[i] !== null && line.y[i] !== null && this.toY(line.y[i]) !== null);
    const room = (this.frame.right - this.frame.left) / 14;
    const dots = heldOut ? there.length <= room : there.length === 1;
    for (const i of dots ? there : []) make(group, "circle", { cx: this.toX(line.x[i]), cy: this.toY(line.y[i]), r: 3.8, class: "held" });
  }

  name(curve) {
    const run = data.runs.length > 1 ? data.runs[curve.run].name : "";
    return [run, curve.what].filter(Boolean).join(" · ") || this.spec.title.toLowerCase();
  }

  describe([low, high]) {
    const show = SHOW[this.spec.unit];
    const last = this.lines.map((l) => [this.name(l.curve), l.raw.findLast((v) => v !== null)]).filter(([, v]) => v !== undefined);
    return `${this.spec.title} over ${AXES[state.axis]}, from ${show(low)} to ${show(high)}. ` +
      last.map(([name, v]) => `${name} ends at ${show(v)}`).join("; ");
  }

  // --- pointing, choosing a range, keys ---

  listen() {
    let from = null;
    const at = (event) => this.fromX(Math.min(Math.max(event.offsetX * (this.width / this.svg.clientWidth), this.frame.left), this.frame.right));
    this.svg.onpointerdown = (event) => { if (this.toX && event.button === 0) { from = at(event); this.svg.setPointerCapture(event.pointerId); } };
    this.svg.onpointermove = (event) => { if (this.toX) this.point(at(event), from); };
    this.svg.onpointerup = (event) => {
      const to = this.toX && at(event);
      if (from !== null && this.toX && Math.abs(this.toX(to) - this.toX(from)) > 8) choose([Math.min(from, to), Math.max(from, to)]);
      from = null;
    };
    this.svg.onpointercancel = this.svg.onpointerleave = () => { from = null; pointAll(null); };
    this.svg.ondblclick = () => choose(null);
    this.svg.onblur = () => pointAll(null);
    this.svg.onkeydown = (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") { choose(null); pointAll(null); }
      if (!way || !this.toX || !this.lines.length) return;
      event.preventDefault();
      const x = this.lines[0].x;
      const next = this.index === undefined ? (way > 0 ? 0 : x.length - 1) : this.index + way;
      this.index = Math.min(Math.max(next, 0), x.length - 1);
      if (x[this.index] !== null) this.point(x[this.index], null);
    };
  }

  /** The cursor in every chart, the readout in this one. */
  point(x, from) {
    pointAll(x);
    if (from !== null) {
      const [a, b] = [this.toX(from), this.toX(x)];
      make(this.over, "rect", { x: Math.min(a, b), y: this.frame.top, width: Math.abs(b - a), height: this.frame.bottom - this.frame.top, class: "chosen" });
    }
    const show = SHOW[this.spec.unit], box = this.readout;
    box.replaceChildren();
    make(box, "p", { class: "at" }, `${AXES[state.axis]} ${showPlace(state.axis, x)}`);
    for (const line of this.lines) this.read(line, x, show);
    for (const { run, mark } of this.marks.filter(({ mark }) => Math.abs(this.toX(mark[state.axis]) - this.toX(x)) < 5).slice(0, 4)) {
      const who = data.runs.length > 1 ? `${run.name}: ` : "";
      make(box, "p", { class: mark.grave ? "grave" : "at" }, `${who}${mark.kind} at step ${showPlace("step", mark.step)}${mark.text ? ` (${mark.text})` : ""}`);
    }
    box.hidden = false;
    const place = (this.toX(x) / this.width) * this.svg.clientWidth + 14, room = this.box.clientWidth;
    box.style.left = box.style.right = "";
    if (place < room * 0.55) box.style.left = `${place + 14}px`;
    else box.style.right = `${room - place + 14}px`;
    box.style.top = `${this.svg.getBoundingClientRect().top - this.box.getBoundingClientRect().top + 20}px`;
  }

  /** The point of a curve that is nearest to the cursor. */
  read(line, x, show) {
    let best = -1;
    for (let i = 0; i < line.x.length; i++) {
      if (line.x[i] === null || line.y[i] === null) continue;
      if (best < 0 || Math.abs(line.x[i] - x) < Math.abs(line.x[best] - x)) best = i;
    }
    if (best < 0 || this.toY(line.y[best]) === null) return;
    const step = data.runs[line.curve.run][line.curve.table].axes.step[best];
    let said = `${this.name(line.curve)} ${show(line.raw[best])}`;
    if (line.low) said += ` (mean of ${line.together} lines, ${show(line.low[best])} to ${show(line.high[best])})`;
    if (line.smoothed) said += `, smoothed ${show(line.y[best])}`;
    const row = make(this.readout, "p", { class: `c${line.curve.color % 8}` });
    make(row, "span", { class: "swatch" });
    row.append(`${said}, step ${showPlace("step", step)}`);
    if (line.x[best] >= this.range[0] && line.x[best] <= this.range[1]) {
      const dot = { cx: this.toX(line.x[best]), cy: this.toY(line.y[best]), r: 4.2, class: "dot" };
      make(make(this.over, "g", { class: `c${line.curve.color % 8}` }), "circle", dot);
    }
  }

  cursor(x) {
    if (!this.svg) return;
    this.readout.hidden = true;
    if (!this.toX) return;
    this.over.replaceChildren();
    if (x === null) { this.index = undefined; return; }
    const px = this.toX(x), { left, right, top, bottom } = this.frame;
    if (px >= left && px <= right) make(this.over, "line", { x1: px, x2: px, y1: top, y2: bottom, class: "cursor" });
  }
}

// --- the page ------------------------------------------------------------------------------------

const charts = [];
const drawAll = () => charts.forEach((chart) => chart.draw());
const pointAll = (x) => charts.forEach((chart) => chart.cursor(x));

/** Turn a button over; whether it is on now. */
function press(button) {
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  return on;
}

function choose(range) {
  state.range = range;
  document.getElementById("whole").hidden = range === null;
  drawAll();
}

function group(controls, title) {
  const box = make(controls, "div", { class: "group", role: "group", "aria-label": title });
  make(box, "span", {}, title);
  return box;
}

function addControls() {
  const controls = document.getElementById("controls");
  const axes = group(controls, "Over");
  for (const axis of Object.keys(AXES)) {
    const button = make(axes, "button", { type: "button", "aria-pressed": axis === state.axis }, axis === "step" ? "steps" : axis);
    button.onclick = () => {
      state.axis = axis;
      for (const other of axes.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      choose(null);
    };
  }
  const smoothing = group(controls, "Smoothing");
  const slider = make(smoothing, "input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "aria-label": "Smoothing" });
  const said = make(smoothing, "output", {}, "none");
  slider.oninput = () => { state.smoothing = +slider.value; said.textContent = +slider.value ? slider.value : "none"; drawAll(); };
  if (data.runs.length > 1) {
    const runs = group(controls, "Runs");
    data.runs.forEach((run, n) => addToggle(runs, run.name, state.hiddenRuns, n, run.color));
  }
  const kinds = new Map();
  for (const mark of data.runs.flatMap((run) => run.marks)) kinds.set(mark.kind, (kinds.get(mark.kind) || 0) + 1);
  const marks = kinds.size ? group(controls, "Marks") : null;
  for (const kind of kinds.keys()) addToggle(marks, kind, state.hiddenKinds, kind);
  const whole = make(controls, "button", { type: "button", id: "whole" }, "Whole range");
  whole.hidden = true;
  whole.onclick = () => choose(null);
}

function addToggle(parent, label, hidden, name, color) {
  const button = make(parent, "button", { type: "button", "aria-pressed": !hidden.has(name) });
  if (color !== undefined) make(button, "span", { class: `swatch c${color}` });
  button.append(label);
  button.onclick = () => { press(button) ? hidden.delete(name) : hidden.add(name); drawAll(); };
}

function sayWhatIsThinned() {
  const thinned = data.runs.filter((run) => run.steps.rowsTogether > 1 || run.evaluations.rowsTogether > 1);
  const said = thinned.map((run) => `${run.name}: ${run.steps.rows.toLocaleString("en-US")} lines of steps drawn as ` +
    `${run.steps.axes.step.length.toLocaleString("en-US")} points, each the mean of about ${run.steps.rowsTogether} lines, ` +
    "in a band from their lowest to their highest.");
  document.getElementById("thinned").textContent = ["Drag across a chart to look closer, double-click to see all.", ...said].join(" ");
}

addControls();
for (const spec of data.charts) charts.push(new Chart(spec, document.getElementById("charts")));
drawAll();
sayWhatIsThinned();
