"use strict";

// ---- elements: all text goes through text nodes, never through HTML

const NS = "http://www.w3.org/2000/svg";
const one = (id) => document.getElementById(id);

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}
const h = (tag, attributes, ...children) => made(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => made(document.createElementNS(NS, tag), attributes, children);

// ---- numbers as text

const LOCALE = "en-US";
const fixed = (v, digits) => v.toLocaleString(LOCALE, { minimumFractionDigits: digits, maximumFractionDigits: digits });
const brief = (v, digits = 3) =>
  v.toLocaleString(LOCALE, { maximumSignificantDigits: Math.max(digits, 1), useGrouping: Math.abs(v) >= 1e4 });
const exact = (v) => v.toLocaleString(LOCALE);
const percent = (v) => `${fixed(100 * v, v < 0.0995 ? 1 : 0)} %`;

function scaled(v, unit) {
  // with a prefix, as 1.23 GB
  if (v === 0) return `0 ${unit}`;
  const prefixes = { 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n" };
  const scale =
    Object.keys(prefixes)
      .map(Number)
      .sort((a, b) => b - a)
      .find((x) => Math.abs(v) >= x * 0.9995) || 1e-9;
  return `${brief(v / scale)} ${prefixes[scale]}${unit}`;
}
const measured = (m, v = m.median) =>
  m.unit === "images/s" ? `${brief(v, 4)} images/s` : scaled(v, m.unit.replace("bytes", "B"));
const plural = (n, word) => `${exact(n)} ${word}${n === 1 ? "" : "s"}`;

// ---- data: a run is what was measured of a model under one set of conditions

const DATA = JSON.parse(one("data").textContent);
DATA.runs.forEach((run) => {
  run.is = DATA.models[run.model];
  for (const name of ["measurements", "ops", "notes", "doubts"]) run[name] = run[name] || [];
  run.measurements = run.measurements.map(
    ([kind, unit, batch, median, low, high, processes, samples, parts, quality]) => ({
      kind,
      unit,
      batch,
      median,
      ci95: [low, high],
      processes,
      samples,
      parts,
      quality,
    }),
  );
  run.environment = { ...DATA.machines[DATA.sets[run.set].machine], ...run.environment };
});

// what may be drawn and stands in the table; `better` is the direction in which a model is the better one
const FIGURES = [
  {
    key: "top1",
    head: "top-1 %",
    title: "published ImageNet-1k top-1, %",
    better: 1,
    digits: 1,
    of: (run) => run.is.top1 && [run.is.top1[0]],
  },
  { key: "speed", head: "images/s", title: "images per second", kind: "throughput", scale: 1, better: 1, digits: 1 },
  { key: "macs", head: "GMACs", title: "GMACs of one image", count: "macs", scale: 1e9, better: -1, digits: 2 },
  {
    key: "params",
    head: "params M",
    title: "parameters, millions",
    count: "params",
    scale: 1e6,
    better: -1,
    digits: 1,
  },
  {
    key: "acts",
    head: "acts M",
    title: "elements written by contractions, millions",
    count: "acts",
    scale: 1e6,
    better: -1,
    digits: 1,
  },
  { key: "ms", head: "ms", title: "latency, milliseconds", kind: "latency", scale: 1e-3, better: -1, digits: 1 },
  { key: "mb", head: "MB", title: "peak memory, MB", kind: "memory", scale: 1e6, better: -1, digits: 0 },
  { key: "joules", head: "J", title: "energy of one image, joules", kind: "energy", scale: 1, better: -1, digits: 2 },
  {
    key: "train",
    head: "train ms",
    title: "training step, milliseconds",
    kind: "train",
    scale: 1e-3,
    better: -1,
    digits: 0,
  },
  {
    key: "trainmb",
    head: "train MB",
    title: "peak memory of a training step, MB",
    kind: "train_memory",
    scale: 1e6,
    better: -1,
    digits: 0,
  },
];
const AXES = ["speed", "macs", "params", "ms", "mb", "joules"];

/** Value of a figure with its interval and batch, in the figure's unit; null where the run lacks it. */
function figure(run, f) {
  if (f.of) return f.of(run) && { v: f.of(run)[0] };
  if (f.count) {
    const counts = run.is.counts;
    return counts && { v: counts[f.count] / f.scale, partial: counts.statuses[f.count] === "partial" };
  }
  const found = run.measurements.filter((m) => m.kind === f.kind);
  const m = found.find((x) => x.batch === DATA.sets[run.set].batch) || found[found.length - 1];
  return m ? { v: m.median / f.scale, low: m.ci95[0] / f.scale, high: m.ci95[1] / f.scale, batch: m.batch } : null;
}

/** The batch that most runs have of a figure: others are not drawn beside them. */
function commonBatch(runs, f) {
  const times = new Map();
  for (const run of runs) {
    const found = f.kind && figure(run, f);
    if (found) times.set(found.batch, (times.get(found.batch) || 0) + 1);
  }
  return [...times].sort((a, b) => b[1] - a[1]).map(([batch]) => batch)[0];
}

/** Points that no other one beats: none is at least as good in both and better in one.  Returns indices, by x. */
function pareto(points, xBetter, yBetter = 1) {
  const order = points
    .map((_, i) => i)
    .sort((a, b) => xBetter * (points[b].x - points[a].x) || yBetter * (points[b].y - points[a].y));
  const front = [];
  let best = -Infinity,
    bestX = NaN;
  for (const i of order) {
    const y = yBetter * points[i].y;
    if (y > best || (y === best && points[i].x === bestX)) front.push(i);
    if (y > best) [best, bestX] = [y, points[i].x];
  }
  return front.sort((a, b) => points[a].x - points[b].x);
}

// ---- state of the page

const state = { set: 0, axis: null, sort: null, descending: true, words: "", family: "", hidden: new Set() };

const runsHere = () => DATA.runs.filter((run) => run.set === state.set);
const present = (runs) => FIGURES.filter((f) => runs.some((run) => figure(run, f)));
const isShown = (run) =>
  !state.hidden.has(group(run)) &&
  (!state.family || run.is.family === state.family) &&
  state.words
    .toLowerCase()
    .split(/\s+/)
    .every((word) => run.is.label.toLowerCase().includes(word));

// families by their number of models; the last colour is of all that are too few
const SHAPES = [
  "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
  "M-4.4-4.4H4.4V4.4H-4.4Z",
  "M0-5.6L5.4 4.2H-5.4Z",
  "M0-6L6 0 0 6-6 0Z",
  "M0 5.6L5.4-4.2H-5.4Z",
  "M-1.8-5.4H1.8V-1.8H5.4V1.8H1.8V5.4H-1.8V1.8H-5.4V-1.8H-1.8Z",
  "M-5.8 0L-2.9-5H2.9L5.8 0 2.9 5H-2.9Z",
  "M0-6L1.6-1.9 5.7-1.9 2.6.9 3.6 5 0 2.6-3.6 5-2.6.9-5.7-1.9-1.6-1.9Z",
  "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z",
];
const GROUPS = (() => {
  const size = new Map();
  for (const model of DATA.models) size.set(model.family, (size.get(model.family) || 0) + (model.top1 ? 1.01 : 0.01));
  const order = [...size].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).map(([name]) => name);
  return order.length > SHAPES.length ? order.slice(0, SHAPES.length - 1) : order;
})();
const REST = "others";
const group = (run) => (GROUPS.includes(run.is.family) ? run.is.family : REST);
const look = (name) => (name === REST ? SHAPES.length - 1 : GROUPS.indexOf(name));
const colour = (i) => `var(--c${i})`;

// ---- the sentence, the badge and the conditions

const DEVICE = (set) => DATA.machines[set.machine].machine || "unknown machine";
const twins = (set) =>
  DATA.machines.some(
    (m, i) => i !== set.machine && m.machine === DEVICE(set) && m.torch === DATA.machines[set.machine].torch,
  );
const CONDITIONS = {
  // how each is said in the sentence, in its order; null where there is nothing to say
  machine: (c) => DEVICE(c) + (twins(c) ? ` (${DATA.machines[c.machine].fingerprint})` : ""),
  device: (c) => (c.device === "cpu" ? null : c.device),
  threads: (c) => c.threads && plural(c.threads, "thread"),
  dtype: (c) => c.dtype + (c.amp ? " autocast" : ""),
  batch: (c) => c.batch && `batch ${c.batch}`,
  compile: (c) => c.compile && `compiled (${c.compile})`,
  graph: (c) => c.graph && "CUDA graphs",
  channels_last: (c) => c.channels_last && "channels last",
  fused: (c) => !c.fused && "plain PyTorch",
  reparam: (c) => c.reparam && "branches merged",
  features: (c) => c.features && "features only",
};
const SELECTED = [
  "machine",
  "device",
  "threads",
  "dtype",
  "amp",
  "batch",
  "compile",
  "graph",
  "channels_last",
  "fused",
  "reparam",
  "features",
];

function dates(runs) {
  const days = runs.map((run) => String(run.environment.date).slice(0, 10)).sort();
  return days[0] === days[days.length - 1] ? days[0] : `${days[0]} to ${days[days.length - 1]}`;
}

function drawHead() {
  const runs = runsHere(),
    set = DATA.sets[state.set],
    machine = DATA.machines[set.machine];
  const timed = runs.some((run) => run.measurements.length);
  const counted = ["fused", "reparam", "features"]; // all that counts depend on
  const said = Object.entries(CONDITIONS)
    .filter(([name]) => timed || counted.includes(name))
    .map(([, say]) => say(set))
    .filter(Boolean);
  const [where, ...how] = timed ? said : ["", ...said];
  const models = plural(new Set(runs.map((run) => run.is.series)).size, "model");
  const start = `${models} ${timed ? `on ${where}` : "counted"}`;
  one("sentence").textContent = [start, ...how, `torch ${machine.torch.split("+")[0]}`, dates(runs)].join(", ");
  document.title = `vizoo report: ${models}`;
  one("made").textContent = `vizoo report ${DATA.vizoo}`;
  drawDoubts(runs);
  one("conditions").replaceChildren(...SELECTED.map(select).filter(Boolean));
}

function select(name) {
  const values = [...new Set(DATA.sets.map((set) => set[name]))];
  if (values.length < 2) return null;
  values.sort((a, b) => (a > b) - (a < b));
  const text = (value) =>
    name === "machine"
      ? CONDITIONS.machine({ machine: value }) + `, torch ${DATA.machines[value].torch}`
      : value === true
        ? "yes"
        : value === false
          ? "no"
          : value === null
            ? "none"
            : String(value);
  const change = (event) => {
    const wanted = values[event.target.selectedIndex];
    const alike = (set) => SELECTED.filter((other) => set[other] === DATA.sets[state.set][other]).length;
    const sets = DATA.sets.map((set, i) => [i, set]).filter(([, set]) => set[name] === wanted);
    state.set = sets.sort((a, b) => alike(b[1]) - alike(a[1]))[0][0];
    drawAll();
    one(`select-${name}`).focus();
  };
  const options = values.map((value) => h("option", { selected: value === DATA.sets[state.set][name] }, text(value)));
  return h(
    "label",
    { class: "field" },
    name.replace("_", " "),
    h("select", { id: `select-${name}`, onchange: change }, options),
  );
}

const badge = (word, text = word, title = null) =>
  h("span", { class: `badge ${word === "failed" ? "failed" : "warn"}`, title }, text);

function drawDoubts(runs) {
  const said = runs.flatMap(wordsOf);
  if (!said.length) {
    one("doubts").replaceChildren(
      h(
        "p",
        { style: { margin: "12px 0 0" } },
        h("span", { class: "badge clean" }, "clean"),
        h("span", { class: "small soft" }, "  nothing noisy, partial, throttled, busy or failed"),
      ),
    );
    return;
  }
  const order = ["failed", "throttled", "busy", "noisy", "doubtful", "partial"];
  const words = order.filter((word) => said.includes(word));
  const list = words.map((word) => [
    h("dt", null, word),
    runs.filter((run) => wordsOf(run).includes(word)).map((run) => h("dd", null, link(run), ` ${reasons(run, word)}`)),
  ]);
  const summary = words.map((word) => badge(word, `${said.filter((w) => w === word).length} ${word}`));
  one("doubts").replaceChildren(
    h("details", { class: "doubts" }, h("summary", { title: "which models" }, summary), h("dl", null, list)),
  );
}

const wordsOf = (run) => [...new Set(run.doubts.map(([word]) => word))];
const reasons = (run, word) =>
  run.doubts
    .filter(([w]) => w === word)
    .map(([, text]) => text)
    .join("; ");
const address = (run) => `#model=${encodeURIComponent(run.is.label)}`;
const link = (run) => h("a", { href: address(run) }, run.is.label);

// ---- axes of plots

function logTicks(low, high, most) {
  for (const steps of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)) - 1; p <= Math.ceil(Math.log10(high)); p++) {
      for (const step of steps)
        if (step * 10 ** p >= low && step * 10 ** p <= high) ticks.push(Number((step * 10 ** p).toPrecision(3)));
    }
    if (ticks.length <= most || steps.length === 1)
      return ticks.length > most ? ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0) : ticks;
  }
}

function linearTicks(low, high, most) {
  const raw = (high - low) / most,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw);
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step)
    ticks.push(Number(v.toPrecision(12)));
  return ticks;
}

/** Maps values to pixels; the range is widened by `room` on both sides, but begins at `zero`. */
function scale({ values, log, room = 0.05, zero }, from, to) {
  const t = log ? Math.log : (v) => v,
    back = log ? Math.exp : (v) => v;
  let low = Math.min(...values.map(t)),
    high = Math.max(...values.map(t));
  const pad = (high - low) * room || (log ? 0.5 : Math.abs(high) * 0.1 || 1);
  low -= zero ? 0 : pad;
  high += pad;
  const at = (v) => from + ((t(v) - low) / (high - low)) * (to - from);
  at.ticks = (most) => (log ? logTicks : linearTicks)(back(low), back(high), most);
  return at;
}

/** Frame of a plot: grid, ticks, titles.  Returns the svg and both scales. */
function plot(width, height, x, y, label) {
  const left = 46,
    right = 10,
    top = 22,
    bottom = 42;
  const atX = scale(x, left, width - right),
    atY = scale(y, height - bottom, top);
  const format = (v) => (Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? scaled(v, "").trim() : brief(v, 4));
  const svg = s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label },
    atY
      .ticks(Math.max(3, height / 60))
      .map((v) => [
        s("line", { class: "grid", x1: left, x2: width - right, y1: atY(v), y2: atY(v) }),
        s("text", { x: left - 8, y: atY(v) + 4, "text-anchor": "end" }, format(v)),
      ]),
    (x.ticks || atX.ticks(width / 64)).map((v) => [
      s("line", { class: "grid", x1: atX(v), x2: atX(v), y1: top, y2: height - bottom }),
      s("text", { x: atX(v), y: height - bottom + 18, "text-anchor": "middle" }, format(v)),
    ]),
    s("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    s("text", { x: width - right, y: height - 4, "text-anchor": "end" }, x.title),
    s("text", { x: 0, y: 10 }, y.title),
  );
  return { svg, atX, atY, left, right: width - right, top, bottom: height - bottom };
}

const widthOf = (() => {
  const context = document.createElement("canvas").getContext("2d");
  context.font = '11.5px system-ui, "Liberation Sans", Arial, sans-serif';
  return (text) => context.measureText(text).width;
})();

/** Obstacles on a line from one place to another. */
function along([ax, ay], [bx, by]) {
  const n = Math.ceil(Math.hypot(bx - ax, by - ay) / 8);
  return Array.from({ length: n }, (_, i) => [ax + (i / n) * (bx - ax), ay + (i / n) * (by - ay), 1]);
}

/** Places names at points where they overlap neither a point nor each other; those without room are left out. */
function placed(points, obstacles, frame) {
  const taken = obstacles.map(([x, y, r = 5]) => [x - r, y - r, x + r, y + r]);
  const free = (box) =>
    box[0] >= frame.left &&
    box[2] <= frame.right &&
    box[1] >= frame.top - 12 &&
    box[3] <= frame.bottom &&
    !taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]);
  return points.flatMap(({ x, y, text }) => {
    const w = widthOf(text),
      high = 12;
    for (const [dx, dy] of [
      [9, -high / 2],
      [-w - 9, -high / 2],
      [-w / 2, -high - 7],
      [-w / 2, 7],
      [7, -high - 3],
      [-w - 7, -high - 3],
      [7, 3],
      [-w - 7, 3],
    ]) {
      const box = [x + dx, y + dy, x + dx + w, y + dy + high];
      if (!free(box)) continue;
      taken.push(box);
      return [s("text", { class: "name", x: box[0], y: box[3] - 2, "aria-hidden": "true" }, text)];
    }
    return [];
  });
}

/** A tip that follows what is pointed at or focused in a figure. */
function tip(holder) {
  const box = h("div", { class: "tip", hidden: true });
  holder.append(box);
  const show = (x, y, title, lines) => {
    box.replaceChildren(h("b", null, title), ...lines.map((line) => h("div", null, line)));
    box.hidden = false;
    const room = holder.clientWidth - box.offsetWidth;
    box.style.left = `${Math.max(0, Math.min(room, x + 14))}px`;
    box.style.top = `${y > box.offsetHeight + 14 ? y - box.offsetHeight - 10 : y + 14}px`;
  };
  return {
    show,
    hide: () => {
      box.hidden = true;
    },
  };
}

/** One stop of the tab key for many elements; arrows move among them. */
function roving(elements) {
  elements.forEach((element, i) => {
    element.setAttribute("tabindex", i ? -1 : 0);
    element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const to = step && elements[i + step];
      if (step) event.preventDefault();
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
      }
      if (!to) return;
      element.setAttribute("tabindex", -1);
      to.setAttribute("tabindex", 0);
      to.focus();
    });
  });
}

// ---- the scatter

function axes(runs) {
  const has = present(runs);
  const drawable = has.filter((f) => AXES.includes(f.key));
  const known = runs.filter((run) => run.is.top1 && drawable.some((f) => figure(run, f))).length;
  const y =
    known > 1
      ? FIGURES[0]
      : ["speed", "ms", "mb", "params"].map((key) => drawable.find((f) => f.key === key)).find(Boolean);
  const x = drawable.filter((f) => f !== y);
  const preferred = y === FIGURES[0] ? x[0] : x.find((f) => f.key === "macs") || x[0];
  return { x, y, now: x.find((f) => f.key === state.axis) || preferred };
}

/** What a run is in the plot; null with a reason where it is not. */
function pointOf(run, x, y, batches) {
  const a = figure(run, x),
    b = figure(run, y);
  if (!a || !b || a.v <= 0) return null;
  const odd = [
    [a, x],
    [b, y],
  ].some(([value, f]) => f.kind && value.batch !== batches.get(f));
  return { run, x: a.v, y: b.v, a, b, odd };
}

function describe(run) {
  return present([run]).map((f) => {
    const { v, low, high, partial } = figure(run, f);
    const spread = high > low ? ` (${brief(low, 4)} to ${brief(high, 4)})` : "";
    return `${f.head}: ${brief(v, 4)}${partial ? "*" : ""}${spread}`;
  });
}

function drawScatter() {
  const runs = runsHere(),
    { x: choices, y, now: x } = axes(runs),
    holder = one("scatter");
  one("chart").hidden = !x || !y;
  if (!x || !y) return;
  one("axis").replaceChildren(
    ...choices.map((f) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(f === x),
          onclick: () => {
            state.axis = f.key;
            drawScatter();
            one("axis").children[choices.indexOf(f)].focus();
          },
        },
        f.head.replace("params M", "params"),
      ),
    ),
  );
  const batches = new Map([x, y].map((f) => [f, commonBatch(runs, f)]));
  const all = runs.map((run) => pointOf(run, x, y, batches)).filter(Boolean);
  const points = all.filter((p) => !p.odd && isShown(p.run));
  const front = y.key === "top1" ? pareto(points, x.better, y.better) : [];
  const batch = batches.get(x) ? `, batch ${batches.get(x)}` : "";
  const titleY = y.title + (batches.get(y) ? `, batch ${batches.get(y)}` : "");
  one("chart-title").textContent =
    y.key === "top1"
      ? `Published accuracy over ${x.title.split(",")[0]}`
      : `${y.title.split(",")[0]} over ${x.title.split(",")[0]}`.replace(/^./, (c) => c.toUpperCase());
  const width = Math.max(300, holder.clientWidth),
    height = Math.round(Math.min(560, Math.max(340, width * 0.5)));
  const base = all.filter((p) => !p.odd);
  const drawn = base.length ? base : [{ x: 1, y: 1, a: {} }];
  const room = width < 600 ? 0.06 : 0.04;
  const frame = plot(
    width,
    height,
    {
      values: drawn.flatMap((p) => [p.x, p.a.low, p.a.high].filter((v) => v > 0)),
      log: true,
      title: `${x.title}${batch} (log)`,
      room,
    },
    { values: drawn.map((p) => p.y), log: y.key !== "top1", title: titleY, room: 0.06 },
    `${titleY} over ${x.title}`,
  );
  holder.replaceChildren(frame.svg);
  const pop = tip(holder),
    at = (p) => [frame.atX(p.x), frame.atY(p.y)];
  if (front.length > 1) {
    const path = front.map((i, k) => {
      const [px, py] = at(points[i]);
      if (!k) return `M${px} ${py}`; // then steps: a model below them is beaten by one of both
      return x.better > 0 ? `V${py}H${px}` : `H${px}V${py}`;
    });
    frame.svg.append(s("path", { class: "front", d: path.join("") }));
  }
  const elements = [...points]
    .sort((a, b) => a.x - b.x)
    .map((p) => {
      const [px, py] = at(p),
        i = look(group(p.run));
      const bar =
        p.a.low > 0 && frame.atX(p.a.high) - frame.atX(p.a.low) > 3
          ? s("line", { x1: frame.atX(p.a.low) - px, x2: frame.atX(p.a.high) - px, y1: 0, y2: 0, stroke: colour(i) })
          : null;
      const element = s(
        "g",
        {
          class: "point",
          transform: `translate(${px} ${py})`,
          role: "button",
          "aria-label": [p.run.is.label, ...describe(p.run)].join(", "),
        },
        bar,
        s("path", { d: SHAPES[i], fill: colour(i) }),
      );
      element.mark = (on) => {
        element.classList.toggle("on", on);
        if (on)
          pop.show(px * (holder.clientWidth / width), py * (holder.clientWidth / width), p.run.is.label, [
            p.run.is.family,
            ...describe(p.run),
          ]);
        else pop.hide();
      };
      element.addEventListener("focus", () => element.mark(true));
      element.addEventListener("blur", () => element.mark(false));
      element.addEventListener("click", () => open(p.run));
      element.at = [px, py];
      return element;
    });
  frame.svg.append(...elements);
  roving(elements);
  const labelled = (front.length ? front.map((i) => points[i]) : points).map((p) => ({
    x: at(p)[0],
    y: at(p)[1],
    text: p.run.is.label.replace(/(_patch\d+)?(_window\d+)?(_224)?(\.\w+)?$/, ""),
  }));
  const line = front.slice(1).flatMap((i, k) => {
    const [from, to] = [at(points[front[k]]), at(points[i])],
      corner = x.better > 0 ? [from[0], to[1]] : [to[0], from[1]];
    return [...along(from, corner), ...along(corner, to)];
  });
  frame.svg.append(...placed(labelled.reverse(), [...points.map(at), ...line], frame));
  pointing(frame.svg, elements, width);
  drawLegend(all);
  const rest = runs.length - all.length;
  const odd = all.filter((p) => p.odd).length;
  const lacking = y.key === "top1" ? "a published accuracy at the measured size, or the other figure," : "both figures";
  one("beside").textContent = [
    rest && `${plural(rest, "model")} without ${lacking} ${rest === 1 ? "is" : "are"} in the table only.`,
    odd && `${plural(odd, "model")} measured at another batch ${odd === 1 ? "is" : "are"} in the table only.`,
    front.length > 1 && "Line: models that no other one beats in both.",
    points.some((p) => p.a.high > p.a.low) &&
      "Bars: 95 % confidence interval of the median, where it is wider than the point.",
  ]
    .filter(Boolean)
    .join("  ");
}

/** The nearest point answers to the pointer. */
function pointing(svg, elements, width) {
  let last = null;
  const nearest = (event) => {
    const box = svg.getBoundingClientRect(),
      k = width / box.width;
    const [x, y] = [(event.clientX - box.left) * k, (event.clientY - box.top) * k];
    const far = (e) => Math.hypot(e.at[0] - x, e.at[1] - y);
    const found = elements.reduce((best, e) => (!best || far(e) < far(best) ? e : best), null);
    return found && far(found) < 26 ? found : null;
  };
  const mark = (element) => {
    if (element === last) return;
    if (last) last.mark(false);
    if (element) element.mark(true);
    svg.style.cursor = element ? "pointer" : "";
    last = element;
  };
  svg.addEventListener("pointermove", (event) => mark(nearest(event)));
  svg.addEventListener("pointerleave", () => mark(null));
  svg.addEventListener("click", (event) => {
    const element = event.target.closest(".point") ? null : nearest(event);
    if (element) element.dispatchEvent(new MouseEvent("click"));
  });
}

function drawLegend(points) {
  const names = [...GROUPS, REST].filter((name) => points.some((p) => group(p.run) === name));
  one("legend").replaceChildren(
    ...names.map((name, k) =>
      h(
        "button",
        {
          type: "button",
          class: "plain",
          "aria-pressed": String(!state.hidden.has(name)),
          title: "show or hide",
          onclick: () => {
            if (!state.hidden.delete(name)) state.hidden.add(name);
            drawScatter();
            drawTable();
            one("legend").children[k].focus();
          },
        },
        s(
          "svg",
          { viewBox: "-7 -7 14 14", "aria-hidden": "true" },
          s("path", { d: SHAPES[look(name)], fill: colour(look(name)) }),
        ),
        name,
      ),
    ),
  );
}

// ---- the table

function columns(runs) {
  const text = (head, of) => ({ key: head, head, of, text: of, name: head });
  return [
    text("model", (run) => run.is.label),
    text("family", (run) => run.is.family),
    {
      key: "size",
      head: "size",
      number: true,
      of: (run) => run.is.size && run.is.size[0] * run.is.size[1],
      text: (run) =>
        run.is.size ? (run.is.size[0] === run.is.size[1] ? String(run.is.size[0]) : run.is.size.join("x")) : "",
    },
    ...present(runs).map((f) => {
      const common = commonBatch(runs, f),
        values = runs
          .map((run) => figure(run, f))
          .filter((x) => x && x.v > 0)
          .map((x) => x.v);
      const least = Math.min(...values, 100);  // of which two digits are to be seen
      const digits = Math.max(f.digits, Math.min(4, 1 - Math.floor(Math.log10(least))));
      return {
        key: f.key,
        head: f.head,
        number: true,
        title: f.title + (common ? `, batch ${common}` : ""),
        f,
        batch: common,
        of: (run) => {
          const found = figure(run, f);
          return found && found.v;
        },
        cell: (run) => {
          const found = figure(run, f);
          if (!found) return [];
          const odd = f.kind && found.batch !== common;
          const title = [
            found.high > found.low && `95 %: ${brief(found.low, 5)} to ${brief(found.high, 5)}`,
            odd && `batch ${found.batch}`,
          ]
            .filter(Boolean)
            .join(", ");
          return [
            h("span", { title: title || null }, fixed(found.v, found.v < 1000 ? digits : 0)),
            (found.partial || odd) && h("span", { class: "star" }, found.partial ? "*" : "†"),
          ];
        },
      };
    }),
    {
      key: "note",
      head: "note",
      of: (run) => run.doubts.map(([word]) => word).join(" "),
      cell: (run) => wordsOf(run).map((word) => [badge(word, word, reasons(run, word)), " "]),
    },
  ].filter((column) => column.key !== "note" || runs.some((run) => run.doubts.length));
}

/** Orders runs by a column; what lacks the figure comes last in either direction. */
function sorted(runs, column, descending) {
  const lacks = (v) => v == null || v === "";
  return [...runs].sort((a, b) => {
    const x = column.of(a),
      y = column.of(b);
    if (lacks(x) || lacks(y)) return lacks(x) - lacks(y);
    const order = column.number ? x - y : x.localeCompare(y, "en", { numeric: true });
    return descending ? -order : order;
  });
}

function drawTable() {
  const runs = runsHere(),
    all = columns(runs);
  const by =
    all.find((column) => column.key === state.sort) ||
    all.find((column) => ["speed", "top1", "macs"].includes(column.key) && column.number) ||
    all[0];
  const shown = sorted(runs.filter(isShown), by, state.descending);
  const head = all.map((column) =>
    h(
      "th",
      {
        scope: "col",
        class: column.number ? "num" : column.name,
        title: column.title || null,
        "aria-sort": column === by ? (state.descending ? "descending" : "ascending") : "none",
      },
      h("button", { type: "button", class: "plain", onclick: () => sortBy(column, by) }, column.head),
    ),
  );
  const body = shown.map((run) => {
    const failed = run.doubts.find(([word]) => word === "failed");
    let cells = all.map((column, i) =>
      h(
        "td",
        { class: column.number ? "num" : column.name },
        i === 0 ? link(run) : column.cell ? column.cell(run) : column.text(run),
      ),
    );
    if (failed) {
      // the reason takes the place of the figures that are missing
      const full = cells.slice(0, -1).reduce((last, cell, i) => (cell.textContent ? i : last), 0) + 1;
      cells = [...cells.slice(0, full), h("td", { class: "reason", colspan: all.length - full }, failed[1])];
    }
    return h(
      "tr",
      {
        onclick: (event) => {
          if (!event.target.closest("a")) open(run);
        },
      },
      cells,
    );
  });
  one("models").replaceChildren(h("thead", null, h("tr", null, head)), h("tbody", null, body));
  one("shown").textContent = `${exact(shown.length)} of ${exact(runs.length)}`;
  const batches = all.filter((column) => column.batch).map((column) => `${column.head}: batch ${column.batch}`);
  one("legend-of-table").textContent = [
    "GMACs: multiply-accumulates of one image in 1e9, which papers print as FLOPs.",
    batches.length && `${batches.join(", ")}.`,
    one("models").textContent.includes("*") && "* partial count.",
    one("models").textContent.includes("†") && "† another batch.",
  ]
    .filter(Boolean)
    .join("  ");
}

function sortBy(column, before) {
  state.descending = column === before ? !state.descending : Boolean(column.number);
  state.sort = column.key;
  drawTable();
  [...one("models").querySelectorAll("th")].find((th) => th.getAttribute("aria-sort") !== "none").firstChild.focus();
}

// ---- one model

const find = (label) => {
  const all = DATA.runs.filter((run) => run.is.label === label);
  return all.find((run) => run.set === state.set) || all[0];
};
function open(run) {
  location.hash = address(run);
}

function drawModel() {
  const dialog = one("model"),
    wanted = /^#model=(.*)$/.exec(location.hash);
  let label = null;
  try {
    label = wanted && decodeURIComponent(wanted[1]);
  } catch {
    label = null;
  } // a fragment cut off by hand
  const run = label === null ? null : find(label);
  if (!run) {
    if (dialog.open) dialog.close();
    return;
  }
  if (run.set !== state.set) {
    state.set = run.set;
    drawAll();
  }
  const close = h("button", { type: "button", class: "push", onclick: () => dialog.close() }, "Close");
  const size = run.is.size ? `${run.is.size.join("x")} pixels` : "";
  const parts = [
    drawFailure,
    drawCounts,
    drawMeasurements,
    drawIcicle,
    drawRoofline,
    drawCurves,
    drawSplits,
    drawCommand,
    drawConditions,
  ];
  const body = h("div", { class: "body" });
  dialog.replaceChildren(
    h(
      "header",
      null,
      h(
        "div",
        { class: "row between", style: { flexWrap: "nowrap", alignItems: "start" } },
        h(
          "div",
          null,
          h("h2", { id: "model-title" }, run.is.label),
          h(
            "div",
            { class: "small soft" },
            [run.is.family, size].filter(Boolean).join(", "),
            " ",
            wordsOf(run).map((word) => badge(word)),
          ),
        ),
        close,
      ),
    ),
    body,
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  const width = Math.max(280, body.clientWidth - 2 * parseFloat(getComputedStyle(body).paddingLeft));
  for (const part of parts) body.append(...[part(run, width)].flat().filter(Boolean));
}

const part = (title, ...children) => h("section", null, h("h3", null, title), children);
const facts = (rows) =>
  h(
    "dl",
    { class: "facts" },
    rows
      .filter(([, value]) => value != null && value !== "")
      .map(([name, value]) => [h("dt", null, name), h("dd", null, value)]),
  );

function drawFailure(run) {
  return (
    run.failure &&
    part("Failed", h("p", { class: "failed", style: { margin: 0, overflowWrap: "anywhere" } }, run.failure))
  );
}

function drawCounts(run) {
  const c = run.is.counts;
  if (!c) return null;
  const star = (name) => (c.statuses[name] === "partial" ? "*" : "");
  const bytes = Object.entries(c.state_bytes)
    .map(([dtype, n]) => `${scaled(n, "B")} ${dtype}`)
    .join(", ");
  return part(
    "One image",
    facts([
      [
        "parameters",
        exact(c.params) + star("params") + (c.trainable === c.params ? "" : `, ${exact(c.trainable)} trainable`),
      ],
      ["weights", bytes],
      ["MACs", exact(c.macs) + star("macs")],
      ["other FLOPs", exact(c.flops_other) + star("flops_other")],
      ["activations", `${exact(c.acts)}${star("acts")} elements`],
      ["bytes moved", `at least ${exact(c.bytes)}${star("bytes")}`],
      ["kernels", exact(c.kernels)],
      ["fvcore's total", c.fvcore_total == null ? null : exact(c.fvcore_total)],
      ["published top-1", run.is.top1 && `${run.is.top1[0]} % (${run.is.top1[1]})`],
      ["* partial", c.reasons.join("; ")],
      [
        "uncounted",
        Object.entries(c.uncounted)
          .map(([op, n]) => `${op} (${plural(n, "call")})`)
          .join(", "),
      ],
    ]),
  );
}

const KINDS = {
  latency: "latency",
  throughput: "throughput",
  memory: "peak memory",
  train: "training step",
  train_memory: "peak memory of training",
  modules: "pass with timed modules",
  copy: "copy bandwidth",
  matmul: "matrix products",
  energy: "energy of one image",
};

function drawMeasurements(run) {
  if (!run.measurements.length) return null;
  const rows = run.measurements.map((m) =>
    h(
      "tr",
      null,
      h("td", null, KINDS[m.kind]),
      h("td", { class: "num" }, m.batch == null ? "" : m.batch),
      h("td", { class: "num" }, measured(m)),
      h("td", { class: "num" }, m.ci95[1] > m.ci95[0] ? `${measured(m, m.ci95[0])} to ${measured(m, m.ci95[1])}` : ""),
      h("td", { class: "num" }, exact(m.samples) + (m.processes > 1 ? ` in ${m.processes}` : "")),
    ),
  );
  const head = [
    ["measured", ""],
    ["batch", "num"],
    ["median", "num"],
    ["95 % interval", "num"],
    ["samples", "num"],
  ];
  return part(
    "Measured",
    h(
      "div",
      { class: "wide", style: { marginTop: 0 } },
      h(
        "table",
        null,
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            head.map(([text, name]) => h("th", { scope: "col", class: name }, text)),
          ),
        ),
        h("tbody", null, rows),
      ),
    ),
  );
}

/** The modules as nested nodes; of a module without a figure of its own it is the sum of those inside. */
function tree(run) {
  const counts = run.is.counts || { params: 0, macs: 0 },
    part = (share, whole) => (share * whole) / 1e5;
  const nodes = run.is.modules.map(([name, parent, params, macs], i) => ({
    name,
    parent,
    inside: [],
    path: "",
    params: part(params, counts.params),
    macs: part(macs, counts.macs),
    seconds: run.seconds ? part(run.seconds[i], run.whole) : null,
  }));
  nodes.forEach((node) => {
    if (node.parent < 0) return;
    const above = nodes[node.parent];
    above.inside.push(node);
    node.above = above;
    node.path = above.path ? `${above.path}.${node.name}` : node.name;
  });
  for (const node of nodes.slice().reverse()) {
    for (const key of ["macs", "params", "seconds"]) {
      const sum = node.inside.reduce((total, child) => total + (child[key] || 0), 0);
      node[key] = Math.max(node[key] || 0, sum);
    }
  }
  return nodes;
}

function drawIcicle(run, width) {
  const nodes = tree(run);
  if (nodes.length < 2) return null;
  const figures = [
    ["macs", "MACs", (v) => scaled(v, "MACs")],
    ["params", "parameters", (v) => scaled(v, "").trim()],
    ["seconds", "time", (v) => scaled(v, "s")],
  ].filter(([key]) => nodes[0][key] > 0);
  if (!figures.length) return null;
  let now = figures.find(([key]) => key === "seconds") || figures[0],
    top = nodes[0];
  const holder = h("figure", { style: { marginTop: "8px" } }),
    choice = h("div", { class: "choice", role: "group", "aria-label": "figure" });
  const crumbs = h("div", { class: "small soft" });
  const draw = (focus) => {
    const [key, , say] = now,
      line = 24,
      cells = [];
    let deepest = 0;
    const place = (node, x, w, depth) => {
      if (w < 0.7) return;
      deepest = Math.max(deepest, depth);
      cells.push([node, x, w, depth]);
      let left = x;
      for (const child of node.inside) {
        const cw = node[key] ? (w * child[key]) / node[key] : 0;
        place(child, left, cw, depth + 1);
        left += cw;
      }
    };
    place(top, 0, width, 0);
    const svg = s("svg", {
      viewBox: `0 0 ${width} ${(deepest + 1) * line}`,
      width,
      height: (deepest + 1) * line,
      role: "group",
      "aria-label": "modules",
    });
    holder.replaceChildren(svg);
    const pop = tip(holder);
    const elements = cells.map(([node, x, w, depth]) => {
      const name = node.path ? (node === top ? node.path : node.name) : run.is.name,
        share = node[key] / nodes[0][key];
      const lines = [
        `${say(node[key])}, ${percent(share)}`,
        ...figures.filter((f) => f !== now).map(([k, , tell]) => `${tell(node[k])}, ${percent(node[k] / nodes[0][k])}`),
      ];
      const keep = Math.floor((w - 10) / 6.3);
      const element = s(
        "g",
        { class: "cell", role: "button", "aria-label": [node.path || run.is.name, ...lines].join(", ") },
        s("rect", { x, y: depth * line, width: w, height: line, rx: 2, fill: shade(share, depth) }),
        keep > 2 &&
          s("text", { x: x + 6, y: depth * line + 16 }, name.length > keep ? `${name.slice(0, keep - 1)}…` : name),
      );
      const show = () => pop.show(x, depth * line + line, node.path || run.is.name, lines);
      for (const event of ["pointerenter", "focus"]) element.addEventListener(event, show);
      for (const event of ["pointerleave", "blur"]) element.addEventListener(event, pop.hide);
      element.addEventListener("click", () => {
        top = node === top && node.above ? node.above : node;
        draw(true);
      });
      return element;
    });
    svg.append(...elements);
    roving(elements);
    if (focus) elements[0].focus();
    crumbs.textContent = top.above ? `${top.path}: click its bar to go up` : "click a module to look into it";
    choice.replaceChildren(
      ...figures.map((f) =>
        h(
          "button",
          {
            type: "button",
            "aria-pressed": String(f === now),
            onclick: () => {
              now = f;
              draw();
              choice.children[figures.indexOf(f)].focus();
            },
          },
          f[1],
        ),
      ),
    );
  };
  draw();
  return h(
    "section",
    null,
    h("div", { class: "row between" }, h("h3", { style: { margin: 0 } }, "Modules"), choice),
    holder,
    crumbs,
  );
}
const shade = (share, depth) =>
  `color-mix(in oklab, var(--c0) ${Math.round(45 + 55 * Math.sqrt(share))}%, var(--soft) ${depth % 2 ? 10 : 0}%)`;

function drawRoofline(run, width) {
  if (!run.ops.length) return null;
  const timed =
    run.measurements.find((m) => m.kind === "modules") || run.measurements.find((m) => m.kind === "matmul" && m.batch);
  const batch = (timed && timed.batch) || DATA.sets[run.set].batch || 1;
  const rate = (kind) => {
    const m = run.measurements.find((x) => x.kind === kind);
    return m && m.median;
  };
  const [copy, matmul] = [rate("copy"), rate("matmul")];
  const whole = run.ops.reduce((sum, op) => sum + (op[5] || 0), 0);
  const rows = run.ops.map(([op, calls, macs, other, bytes, seconds, ceiling]) => ({
    op,
    calls,
    macs,
    flops: 2 * macs + other,
    bytes,
    seconds,
    ceiling,
    share: whole && seconds ? seconds / whole : 0,
  }));
  const dots = rows
    .filter((r) => r.flops > 0 && r.bytes > 0 && r.seconds > 0)
    .map((r) => ({ ...r, x: r.flops / r.bytes, y: (r.flops * batch) / r.seconds }));
  const children = [];
  if (dots.length > 1 || (dots.length && copy && matmul)) {
    const ridge = copy && matmul ? [matmul / copy] : [],
      xs = [...dots.map((d) => d.x), ...ridge, ...ridge.map((x) => 4 * x)];
    const frame = plot(
      width,
      Math.min(340, Math.max(260, width * 0.5)),
      { values: xs, log: true, title: "FLOP per byte moved (log)", room: 0.08 },
      { values: [...dots.map((d) => d.y), ...(matmul ? [matmul] : [])], log: true, title: "FLOP/s (log)", room: 0.08 },
      "roofline of operators",
    );
    const holder = h("figure", { style: { marginTop: 0 } }, frame.svg),
      pop = tip(holder);
    if (copy && matmul) {
      const edge = matmul / copy,
        low = Math.max(Math.min(...xs) * 0.6, (Math.min(...dots.map((d) => d.y)) * 0.6) / copy);
      if (low < edge)
        frame.svg.append(
          s("path", {
            class: "front",
            d: `M${frame.atX(low)} ${frame.atY(low * copy)}L${frame.atX(edge)} ${frame.atY(matmul)}H${frame.right}`,
          }),
        );
    }
    const elements = dots.map((d) => {
      const element = s(
        "g",
        {
          class: "point",
          role: "img",
          transform: `translate(${frame.atX(d.x)} ${frame.atY(d.y)})`,
          "aria-label": `${d.op}, ${percent(d.share)} of the time, ${scaled(d.y, "FLOP/s")}`,
        },
        s("circle", {
          r: 3 + 14 * Math.sqrt(d.share),
          fill: d.macs ? "var(--c0)" : "var(--c1)",
          "fill-opacity": 0.75,
          stroke: "var(--paper)",
        }),
      );
      const show = () =>
        pop.show(
          frame.atX(d.x),
          frame.atY(d.y),
          d.op,
          [
            `${percent(d.share)} of the time`,
            scaled(d.y, "FLOP/s"),
            `${brief(d.x)} FLOP per byte`,
            d.ceiling == null ? null : `${percent(d.ceiling)} of its ceiling`,
          ].filter(Boolean),
        );
      for (const event of ["pointerenter", "focus"]) element.addEventListener(event, show);
      for (const event of ["pointerleave", "blur"]) element.addEventListener(event, pop.hide);
      return element;
    });
    frame.svg.append(...elements);
    roving(elements);
    const large = [...dots]
      .sort((a, b) => b.share - a.share)
      .slice(0, 6)
      .map((d) => ({ x: frame.atX(d.x), y: frame.atY(d.y), text: shortOp(d.op) }));
    frame.svg.append(
      ...placed(
        large,
        dots.map((d) => [frame.atX(d.x), frame.atY(d.y)]),
        frame,
      ),
    );
    children.push(
      holder,
      h("p", { class: "small soft", style: { margin: "4px 0 12px" } }, [
        "Area: share of the time.  Blue: contractions, orange: the rest.",
        copy &&
          matmul &&
          `  Line: what this machine reaches, ${scaled(matmul, "FLOP/s")} in products and ${scaled(copy, "B/s")} in copies.`,
      ]),
    );
  }
  const by = whole ? (r) => r.seconds || 0 : (r) => r.macs,
    listed = [...rows].sort((a, b) => by(b) - by(a)).slice(0, 12);
  const cells = [
    ["operator", null, (r) => shortOp(r.op)],
    ["calls", "num", (r) => exact(r.calls)],
    ["GMACs", "num", (r) => (r.macs ? fixed(r.macs / 1e9, 3) : "")],
    ["MB", "num", (r) => (r.bytes ? fixed(r.bytes / 1e6, 1) : "")],
    ["ms", "num", (r) => (r.seconds == null ? "" : fixed(1e3 * r.seconds, 2))],
    ["time", "num", (r) => (r.share ? percent(r.share) : "")],
    ["of ceiling", "num", (r) => (r.ceiling == null ? "" : percent(r.ceiling))],
  ].filter(([head, , text]) => head === "operator" || listed.some(text));
  children.push(
    h(
      "div",
      { class: "wide", style: { marginTop: 0 } },
      h(
        "table",
        null,
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            cells.map(([head, name]) => h("th", { scope: "col", class: name }, head)),
          ),
        ),
        h(
          "tbody",
          null,
          listed.map((r) =>
            h(
              "tr",
              null,
              cells.map(([, name, text]) => h("td", { class: name, title: name ? null : r.op }, text(r))),
            ),
          ),
        ),
      ),
    ),
  );
  const fewer = rows.length - listed.length + (run.fewer || 0);
  if (fewer)
    children.push(
      h("p", { class: "small soft", style: { margin: "4px 0 0" } }, `and ${plural(fewer, "operator")} with less`),
    );
  return part(dots.length ? "Roofline of operators" : "Operators", children);
}
const shortOp = (op) =>
  op
    .replace(/^aten[.:]+/, "")
    .replace(/\.default$/, "")
    .replace(/_scaled_dot_product_(\w+?)_attention.*/, "attention ($1)");

/** Speed over batch, and over image size, where the same was run so. */
function drawCurves(run, width) {
  const set = DATA.sets[run.set];
  const alike = (a, b, but) => Object.keys(a).every((name) => name === but || a[name] === b[name]);
  const speed = FIGURES.find((f) => f.key === "speed"),
    ms = FIGURES.find((f) => f.key === "ms");
  const curve = (title, axis, runs, of) =>
    [speed, ms]
      .map((f) => {
        const points = runs
          .map((r) => ({ r, x: of(r), value: figure(r, f) }))
          .filter((p) => p.value && p.x)
          .sort((a, b) => a.x - b.x);
        const same = axis === "batch" || new Set(points.map((p) => p.value.batch)).size === 1;
        return points.length > 1 && same ? [title, axis, f, points] : null;
      })
      .find(Boolean);
  const curves = [
    curve(
      "Batch",
      "batch",
      DATA.runs.filter((r) => r.model === run.model && alike(DATA.sets[r.set], set, "batch")),
      (r) => DATA.sets[r.set].batch,
    ),
    curve(
      "Image size",
      "size",
      DATA.runs.filter((r) => r.set === run.set && r.is.series === run.is.series),
      (r) => r.is.size && Math.sqrt(r.is.size[0] * r.is.size[1]),
    ),
  ].filter(Boolean);
  return curves.map(([title, axis, f, points]) => {
    const frame = plot(
      width,
      240,
      {
        values: points.map((p) => p.x),
        ticks: points.map((p) => p.x),
        log: true,
        title: axis === "batch" ? "images at once" : "side of the image, pixels",
        room: 0.06,
      },
      {
        values: [0, ...points.flatMap((p) => [p.value.v, p.value.low, p.value.high])],
        title: f.title,
        room: 0.06,
        zero: true,
      },
      title,
    );
    frame.svg.append(
      s("path", {
        fill: "none",
        stroke: "var(--c0)",
        "stroke-width": 1.5,
        d: points.map((p, i) => `${i ? "L" : "M"}${frame.atX(p.x)} ${frame.atY(p.value.v)}`).join(""),
      }),
      ...points.map((p) =>
        s(
          "g",
          null,
          s(
            "title",
            null,
            `${brief(p.x)}: ${brief(p.value.v, 4)} (${brief(p.value.low, 4)} to ${brief(p.value.high, 4)})`,
          ),
          s("line", {
            stroke: "var(--c0)",
            x1: frame.atX(p.x),
            x2: frame.atX(p.x),
            y1: frame.atY(p.value.low),
            y2: frame.atY(p.value.high),
          }),
          s("circle", {
            cx: frame.atX(p.x),
            cy: frame.atY(p.value.v),
            r: p.r === run ? 5 : 3.5,
            fill: "var(--c0)",
            stroke: "var(--paper)",
          }),
        ),
      ),
    );
    return part(title, h("figure", { style: { marginTop: 0 } }, frame.svg));
  });
}

/** What memory and the training step consist of. */
function drawSplits(run) {
  return run.measurements
    .filter((m) => Object.keys(m.parts).length)
    .map((m) => {
      const parts = Object.entries(m.parts),
        whole = parts.reduce((sum, [, v]) => sum + v, 0),
        of = { ...m, median: whole };
      return part(
        `${KINDS[m.kind].replace(/^./, (c) => c.toUpperCase())}: ${measured(of)}${m.batch ? `, batch ${m.batch}` : ""}`,
        h(
          "div",
          { class: "bar", role: "img", "aria-label": parts.map(([name, v]) => `${name} ${measured(m, v)}`).join(", ") },
          parts.map(([name, v], i) =>
            h("span", {
              style: { flexGrow: v, flexBasis: 0, background: colour(i % 9) },
              title: `${name}: ${measured(m, v)}`,
            }),
          ),
        ),
        h(
          "div",
          { class: "legend", style: { marginTop: 0 } },
          parts.map(([name, v], i) =>
            h(
              "span",
              { class: "row", style: { gap: "6px" } },
              h("span", { class: "swatch", style: { background: colour(i % 9) } }),
              `${name} ${measured(m, v)} (${percent(whole ? v / whole : 0)})`,
            ),
          ),
        ),
      );
    });
}

function drawCommand(run) {
  const button = h(
    "button",
    {
      type: "button",
      class: "push",
      onclick: async () => {
        try {
          await navigator.clipboard.writeText(run.command);
          button.textContent = "Copied";
        } catch {
          // not allowed here: select it
          getSelection().selectAllChildren(text);
          button.textContent = "Selected: press Ctrl-C";
        }
        setTimeout(() => {
          button.textContent = "Copy";
        }, 2000);
      },
    },
    "Copy",
  );
  const text = h("pre", null, run.command || "");
  return run.command ? part("The same again", text, button) : null;
}

function drawConditions(run) {
  const set = DATA.sets[run.set],
    value = (v) => (v === true ? "yes" : v === false ? "no" : typeof v === "object" ? JSON.stringify(v) : String(v));
  const told = (entries) =>
    facts(entries.filter(([, v]) => v != null && v !== "").map(([name, v]) => [name.replaceAll("_", " "), value(v)]));
  const target = [
    ["target", run.is.spec],
    ["kind", run.is.kind],
    ["weights", run.is.weights],
    ...Object.entries(run.is.kwargs),
  ];
  const notes = [...new Set([...run.measurements.flatMap((m) => m.quality), ...run.notes])];
  return [
    notes.length &&
      part(
        "Notes",
        h(
          "ul",
          { class: "notes" },
          notes.map((note) => h("li", null, note)),
        ),
      ),
    part(
      "Conditions",
      told([...target, ...Object.entries(set).filter(([name]) => name !== "machine" && name !== "fingerprint")]),
    ),
    part("Environment", told(Object.entries(run.environment))),
  ];
}

// ---- beginning

function drawAll() {
  drawHead();
  const families = [...new Set(runsHere().map((run) => run.is.family))].sort((a, b) => a.localeCompare(b, "en"));
  if (!families.includes(state.family)) state.family = "";
  one("family").replaceChildren(
    h("option", { value: "" }, "all"),
    ...families.map((name) => h("option", { value: name, selected: name === state.family }, name)),
  );
  drawScatter();
  drawTable();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  one("theme").textContent = name === "dark" ? "Light" : "Dark";
  one("theme").setAttribute("aria-label", `${name === "dark" ? "light" : "dark"} colours`);
}

const dark = matchMedia("(prefers-color-scheme: dark)");
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
one("theme").addEventListener("click", () =>
  theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"),
);
one("words").addEventListener("input", (event) => {
  state.words = event.target.value;
  drawScatter();
  drawTable();
});
one("family").addEventListener("change", (event) => {
  state.family = event.target.value;
  drawScatter();
  drawTable();
});
one("model").addEventListener("close", () => {
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
});
one("model").addEventListener("click", (event) => {
  if (event.target === one("model")) one("model").close();
});
addEventListener("hashchange", drawModel);
let before = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== before) {
    before = innerWidth;
    drawScatter();
    if (one("model").open) drawModel();
  }
});

const times = DATA.sets.map((_, i) => DATA.runs.filter((run) => run.set === i).length);
state.set = times.indexOf(Math.max(...times));
drawAll();
drawModel();
