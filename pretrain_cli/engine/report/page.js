"use strict";
// Draws the charts with uPlot from the page's JSON block, and again after each change by the reader.
// Text is set as textContent only, so markup in it has no effect.

const data = JSON.parse(document.getElementById("data").textContent);
const AXES = { tokens: "tokens seen", time: "training time", step: "step" };
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000];
const BLANK = 1 / 25; // share of the height left blank above and below the curves
const state = {
  axis: "tokens",
  smoothing: 0,
  hiddenRuns: new Set(),
  hiddenKinds: new Set(data.runs.flatMap((run) => run.marks.filter((m) => !m.shown).map((m) => m.kind))),
  range: null, // zoomed range [from, to] on the axis; null: the whole axis
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
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// --- curves --------------------------------------------------------------------------------------

/** Exponential moving average with bias correction; nulls (gaps) stay null. */
function smooth(values, weight) {
  let sum = 0, total = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = sum * weight + v * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

/** A curve on the chosen axis: x, y as drawn, raw values, and low and high bounds if it is thinned. */
function read(curve) {
  const table = data.runs[curve.run][curve.table], raw = table.values[curve.field];
  const smoothed = curve.table === "steps" && state.smoothing > 0 && curve.field !== "learning_rate";
  return {
    curve, raw, x: table.axes[state.axis], low: table.low[curve.field], high: table.high[curve.field],
    y: smoothed ? smooth(raw, state.smoothing) : raw, smoothed, together: table.rowsTogether,
  };
}

/** Row ranges [from, to) in which x increases. A rolled-back run repeats steps, so it has several. */
function stretches(x) {
  const found = [];
  let from = 0, last = -Infinity;
  for (let i = 0; i <= x.length; i++) {
    if (i < x.length && x[i] !== null && x[i] > last) { last = x[i]; continue; }
    if (i > from) found.push([from, i]);
    from = i < x.length && x[i] === null ? i + 1 : i;
    last = i < x.length && x[i] !== null ? x[i] : -Infinity;
  }
  return found;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
  return low <= high ? [low, high] : null;
}

/** The axis range of all visible runs, the same for every chart. */
function wholeRange() {
  const runs = data.runs.filter((_, n) => !state.hiddenRuns.has(n));
  const found = extent(runs.flatMap((run) => [...run.steps.axes[state.axis], ...run.evaluations.axes[state.axis]]));
  return found && [found[0] < 0.2 * found[1] ? 0 : found[0], found[1]];
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
  const shade = data.runs.length > 1 ? "any" : `c${curve.color % 8}`;
  const swatch = make(parent, "svg", { viewBox: "0 0 22 10", class: shade, "aria-hidden": "true" });
  make(swatch, "line", { x1: 0, x2: 22, y1: 5, y2: 5, class: "curve", "stroke-dasharray": DASHES[curve.dash % 4].join(" ") });
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
    this.place = make(this.box, "div", { class: "plot", role: "img", tabindex: 0 });
    this.readout = make(this.box, "div", { class: "readout", role: "status" });
    this.readout.hidden = true;
    this.listen();
    const fit = () => { if (this.width !== this.place.clientWidth) this.draw(); };
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(this.place);
  }

  /** Add a button that hides this curve in every run. The run buttons explain the colours. */
  addLegend(head, curve) {
    const button = make(head, "button", { class: "legend", type: "button", "aria-pressed": "true" });
    key(button, curve);
    button.append(curve.what);
    button.onclick = () => { press(button) ? this.hidden.delete(curve.what) : this.hidden.add(curve.what); this.draw(); };
  }

  draw() {
    if (!this.place) return;
    this.u?.destroy();
    this.u = null;
    this.readout.hidden = true;
    this.place.replaceChildren();
    this.width = this.place.clientWidth || 600;
    const shown = this.spec.curves.filter((curve) => !this.hidden.has(curve.what) && !state.hiddenRuns.has(curve.run));
    this.lines = shown.map(read).filter((line) => line.x.some((x, i) => x !== null && line.raw[i] !== null));
    this.range = state.range || wholeRange();
    if (!this.lines.length || !this.range) {
      make(this.place, "p", { class: "about" }, shown.length ? `No ${AXES[state.axis]} in metrics.jsonl` : "Nothing chosen");
      return;
    }
    if (this.range[0] === this.range[1]) this.range = [this.range[0] - 1, this.range[1] + 1];
    const { tables, series, bands } = this.series();
    this.u = new uPlot(this.options(series, bands), uPlot.join(tables), this.place);
    this.place.setAttribute("aria-label", this.describe());
  }

  /** uPlot's data tables, series and bands; separate series for each range of `stretches`. */
  series() {
    const tables = [], series = [{}], bands = [];
    for (const line of this.lines) {
      const { curve } = line, heldOut = curve.table === "evaluations";
      const stroke = color(`--k${curve.color % 8}`), dash = DASHES[curve.dash % 4];
      for (const [from, to] of stretches(line.x)) {
        const columns = [line.x.slice(from, to)];
        const add = (values, options) => { columns.push(values.slice(from, to)); series.push(options); return series.length - 1; };
        if (line.low) {
          const edge = { stroke: stroke + "66", width: 0.6, points: { show: false } };
          bands.push({ series: [add(line.high, edge), add(line.low, { ...edge })], fill: stroke + "29" });
        }
        if (line.smoothed) add(line.raw, { stroke: stroke + "52", width: 1, points: { show: false } });
        if (heldOut) add(line.y, { stroke: color("--card") + "bf", width: 5, points: { show: false } });
        const few = to - from <= this.width / 14;
        const points = { show: heldOut ? few : to - from === 1, size: 8, fill: stroke, stroke: color("--card"), width: 1.5 };
        line.drawnBy = add(line.y, { stroke, dash, width: heldOut ? 2.2 : 1.7, points });
        tables.push(columns);
      }
    }
    return { tables, series, bands };
  }

  options(series, bands) {
    const show = SHOW[this.spec.unit], soft = color("--soft");
    const grid = { stroke: color("--grid"), width: 1 }, font = "11.5px system-ui, sans-serif";
    return {
      width: this.width, height: this.spec.main ? 380 : 210, series, bands,
      legend: { show: false },
      padding: [14, 12, 0, 0],
      scales: {
        x: { time: false, range: () => this.range },
        y: { distr: this.log ? 3 : 1, range: (u, low, high) => this.values(low, high) },
      },
      axes: [
        {
          stroke: soft, font, grid: { show: false }, ticks: { stroke: color("--line"), size: 4 }, space: 90, size: 26,
          label: AXES[state.axis], labelFont: font, labelSize: 20,
          incrs: state.axis === "time" ? [0.001, 0.01, 0.1, ...TIMES] : undefined,
          values: (u, splits) => splits.map((v) => showPlace(state.axis, v)),
        },
        { stroke: soft, font, grid, ticks: { show: false }, size: 58, space: 34, values: (u, splits) => splits.map((v) => (v === null ? "" : show(v))) },
      ],
      cursor: {
        y: false, points: { show: false }, sync: { key: "report", scales: ["x", null] },
        drag: { x: true, y: false, setScale: false, dist: 8 },
        bind: { dblclick: () => () => { choose(null); return null; } },
      },
      hooks: {
        drawClear: [(u) => this.drawMarks(u)],
        setCursor: [(u) => this.point(u)],
        setSelect: [(u) => {
          const { left, width } = u.select;
          if (width > 8) choose([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
        }],
      },
    };
  }

  /** The y range, with blank space above and below; starts at zero if zero is near. */
  values(low, high) {
    if (low === null || high === null) return this.log ? [0.1, 1] : [0, 1];
    const rounding = 1e-9 * Math.max(Math.abs(low), Math.abs(high)); // smaller differences are rounding errors of means
    if (this.log) {
      low = Math.max(low, 1e-300);
      const room = high - low <= rounding ? 2 : (high / low) ** BLANK;
      return [low / room, high * room];
    }
    if (high - low <= rounding) [low, high] = [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)];
    const fromZero = low >= 0 && low / (high - low) < 0.35;
    return [fromZero ? 0 : low - (high - low) * BLANK, high + (high - low) * BLANK];
  }

  drawMarks(u) {
    const { ctx, bbox } = u, one = devicePixelRatio;
    this.marks = data.runs.flatMap((run, n) => (state.hiddenRuns.has(n) ? [] : run.marks.map((mark) => ({ run, mark }))))
      .filter(({ mark }) => !state.hiddenKinds.has(mark.kind) && mark[state.axis] !== null)
      .filter(({ mark }) => mark[state.axis] >= this.range[0] && mark[state.axis] <= this.range[1]);
    ctx.save();
    for (const { run, mark } of this.marks) {
      const x = u.valToPos(mark[state.axis], "x", true), shade = color(mark.grave ? "--grave" : "--calm");
      ctx.strokeStyle = shade;
      ctx.lineWidth = 1.2 * one;
      ctx.setLineDash(mark.grave ? [] : [4 * one, 3 * one]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillStyle = data.runs.length > 1 ? color(`--k${run.color % 8}`) : shade;
      ctx.beginPath();
      ctx.moveTo(x - 4.5 * one, bbox.top - 9 * one);
      ctx.lineTo(x + 4.5 * one, bbox.top - 9 * one);
      ctx.lineTo(x, bbox.top - one);
      ctx.fill();
    }
    ctx.restore();
  }

  name(curve) {
    const run = data.runs.length > 1 ? data.runs[curve.run].name : "";
    return [run, curve.what].filter(Boolean).join(" · ") || this.spec.title.toLowerCase();
  }

  describe() {
    const show = SHOW[this.spec.unit];
    const last = this.lines.map((line) => `${this.name(line.curve)} ends at ${show(line.raw.findLast((v) => v !== null))}`);
    return `${this.spec.title} over ${AXES[state.axis]}. ${last.join("; ")}`;
  }

  // --- pointer and keyboard ---

  listen() {
    this.place.onpointerenter = () => { this.pointed = true; };
    this.place.onpointerleave = this.place.onblur = () => { this.pointed = false; this.readout.hidden = true; this.index = undefined; };
    this.place.onkeydown = (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") choose(null);
      if (!way || !this.u) return;
      event.preventDefault();
      const x = this.u.data[0], next = this.index === undefined ? (way > 0 ? 0 : x.length - 1) : this.index + way;
      this.index = Math.min(Math.max(next, 0), x.length - 1);
      this.pointed = true;
      this.u.setCursor({ left: this.u.valToPos(x[this.index], "x"), top: 10 });
    };
  }

  /** Show the points nearest to the cursor, one per curve, only in the chart under the pointer. */
  point(u) {
    const { left } = u.cursor;
    if (!this.pointed || left === null || left < 0) { this.readout.hidden = true; return; }
    const x = u.posToVal(left, "x"), show = SHOW[this.spec.unit], box = this.readout;
    box.replaceChildren();
    make(box, "p", { class: "at" }, `${AXES[state.axis]} ${showPlace(state.axis, x)}`);
    for (const line of this.lines) this.tell(line, x, show);
    for (const { run, mark } of this.marks.filter(({ mark }) => Math.abs(u.valToPos(mark[state.axis], "x") - left) < 5).slice(0, 4)) {
      const who = data.runs.length > 1 ? `${run.name}: ` : "";
      make(box, "p", { class: mark.grave ? "grave" : "at" }, `${who}${mark.kind} at step ${showPlace("step", mark.step)}${mark.text ? ` (${mark.text})` : ""}`);
    }
    box.hidden = false;
    const at = left + u.over.offsetLeft + 14, room = this.box.clientWidth;
    box.style.left = box.style.right = "";
    if (at < room * 0.55) box.style.left = `${at + 14}px`;
    else box.style.right = `${room - at + 14}px`;
    box.style.top = `${this.place.offsetTop + 20}px`;
  }

  tell(line, x, show) {
    let best = -1;
    for (let i = 0; i < line.x.length; i++) {
      if (line.x[i] === null || line.y[i] === null) continue;
      if (best < 0 || Math.abs(line.x[i] - x) < Math.abs(line.x[best] - x)) best = i;
    }
    if (best < 0) return;
    const step = data.runs[line.curve.run][line.curve.table].axes.step[best];
    let said = `${this.name(line.curve)} ${show(line.raw[best])}`;
    if (line.low) said += ` (mean of ${line.together} lines, ${show(line.low[best])} to ${show(line.high[best])})`;
    if (line.smoothed) said += `, smoothed ${show(line.y[best])}`;
    const row = make(this.readout, "p", { class: `c${line.curve.color % 8}` });
    make(row, "span", { class: "swatch" });
    row.append(`${said}, step ${showPlace("step", step)}`);
  }
}

// --- the page ------------------------------------------------------------------------------------

const charts = [];
const drawAll = () => charts.forEach((chart) => chart.draw());

/** Toggle a button, and return its new state. */
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
  const shown = make(smoothing, "output", {}, "none");
  slider.oninput = () => { state.smoothing = +slider.value; shown.textContent = +slider.value ? slider.value : "none"; drawAll(); };
  if (data.runs.length > 1) {
    const runs = group(controls, "Runs");
    data.runs.forEach((run, n) => addToggle(runs, run.name, state.hiddenRuns, n, run.color));
  }
  const kinds = new Set(data.runs.flatMap((run) => run.marks.map((mark) => mark.kind)));
  const marks = kinds.size ? group(controls, "Marks") : null;
  for (const kind of kinds) addToggle(marks, kind, state.hiddenKinds, kind);
  const whole = make(controls, "button", { type: "button", id: "whole" }, "Whole range");
  whole.hidden = true;
  whole.onclick = () => choose(null);
}

function addToggle(parent, label, hidden, name, shade) {
  const button = make(parent, "button", { type: "button", "aria-pressed": !hidden.has(name) });
  if (shade !== undefined) make(button, "span", { class: `swatch c${shade}` });
  button.append(label);
  button.onclick = () => { press(button) ? hidden.delete(name) : hidden.add(name); drawAll(); };
}

function explainThinning() {
  const thinned = data.runs.filter((run) => run.steps.rowsTogether > 1 || run.evaluations.rowsTogether > 1);
  const notes = thinned.map((run) => `${run.name}: ${run.steps.rows.toLocaleString("en-US")} lines of steps drawn as ` +
    `${run.steps.axes.step.length.toLocaleString("en-US")} points, each the mean of about ${run.steps.rowsTogether} lines, ` +
    "in a band from their lowest to their highest.");
  document.getElementById("thinned").textContent = ["Drag across a chart to zoom, double-click to see all.", ...notes].join(" ");
}

addControls();
for (const spec of data.charts) charts.push(new Chart(spec, document.getElementById("charts")));
drawAll();
explainThinning();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
