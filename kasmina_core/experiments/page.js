// Draws the charts of a run from the data in the page. With a server behind it (kasmina watch), it follows the run.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["--slot0", "--slot1", "--slot2", "--slot3", "--slot4", "--slot5"];

function node(parent, tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1000 || (value !== 0 && Math.abs(value) < 0.001) ? value.toExponential(2) : value.toPrecision(4);
}

function ticks(low, high, wanted, whole) {
  const raw = (high - low) / Math.max(1, wanted) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  if (whole) step = Math.max(1, step);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

// One chart: its frame, its axes, and what the pointer reads. Returns functions from data to pixels.
function frame(box, data, options) {
  const width = Math.max(280, box.clientWidth), left = 52, right = 12, top = 6, bottom = options.axis ? 36 : 10;
  const height = top + options.height + bottom;
  const svg = node(null, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.title });
  const title = box.appendChild(document.createElement("div"));
  title.className = "title";
  title.textContent = options.title;
  const [x0, x1] = data.range, span = x1 - x0 || 1;
  const x = (value) => left + ((value - x0) / span) * (width - left - right);
  for (const at of ticks(x0, x1, (width - left) / 70, data.whole)) {
    node(svg, "line", { x1: x(at), x2: x(at), y1: top, y2: top + options.height, class: "grid" });
    if (options.axis) node(svg, "text", { x: x(at), y: top + options.height + 15, class: "tick", "text-anchor": "middle" }, shownTick(at));
  }
  if (options.axis) node(svg, "text", { x: width - right, y: height - 4, class: "tick", "text-anchor": "end" }, options.axis);
  return { svg, x, width, left, right, top, height: options.height };
}

function shownTick(value) {
  for (const [power, prefix] of [[12, "T"], [9, "G"], [6, "M"]]) if (Math.abs(value) >= 10 ** power) return value / 10 ** power + " " + prefix;
  return String(Number(value.toPrecision(4)));
}

function lineChart(box, data, lines, options) {
  const f = frame(box, data, options);
  const values = lines.flatMap((line) => line.y.filter((v) => v !== null && (!options.log || v > 0)));
  let low = options.low ?? Math.min(...values), high = options.high ?? Math.max(...values);
  if (!values.length && options.low === undefined) [low, high] = [0, 1];
  const log = options.log && low > 0 && high / low > 8;
  if (options.low === undefined) { const pad = log ? 0 : (high - low || Math.abs(high) || 1) * 0.06; low -= pad; high += pad; }
  const scale = log ? Math.log : (v) => v;
  const y = (v) => f.top + f.height - ((scale(v) - scale(low)) / (scale(high) - scale(low) || 1)) * f.height;
  let marks = ticks(low, high, 4);
  if (log) {
    marks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const m of [1, 2, 5]) if (m * 10 ** power >= low && m * 10 ** power <= high) marks.push(m * 10 ** power);
  }
  for (const at of marks) {
    node(f.svg, "line", { x1: f.left, x2: f.width - f.right, y1: y(at), y2: y(at), class: "grid" });
    node(f.svg, "text", { x: f.left - 6, y: y(at) + 4, class: "tick", "text-anchor": "end" }, shownTick(at));
  }
  for (const at of options.kept || []) node(f.svg, "line", { x1: f.x(at), x2: f.x(at), y1: f.top, y2: f.top + f.height, class: "kept" });
  for (const line of lines) {
    let path = "", pen = "M";
    line.x.forEach((at, i) => {
      const v = line.y[i];
      if (v === null || (log && v <= 0)) { pen = "M"; return; }
      path += `${pen}${f.x(at).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
    });
    const alone = line.y.filter((v) => v !== null).length === 1;
    node(f.svg, "path", { d: alone ? path + "h.01" : path, class: "line" + (line.thin ? " thin" : ""), style: `stroke:var(${line.colour})`, "stroke-linecap": "round" });
  }
  reader(box, f, data, (at) => lines.map((line) => {
    let nearest = -1;
    line.x.forEach((v, i) => { if (line.y[i] !== null && (nearest < 0 || Math.abs(v - at) < Math.abs(line.x[nearest] - at))) nearest = i; });
    return [line.name, nearest < 0 ? "–" : shown(line.y[nearest]), line.colour];
  }));
  legend(box, lines);
}

function legend(box, lines) {
  const list = document.createElement("div");
  list.className = "legend";
  for (const line of lines) {
    const item = list.appendChild(document.createElement("span"));
    const swatch = item.appendChild(document.createElement("i"));
    swatch.style.background = line.fill || `var(${line.colour})`;
    if (line.thin) swatch.className = "thin";
    item.appendChild(document.createTextNode(line.name));
  }
  box.appendChild(list);
}

// A line under the pointer (or the finger, or the arrow keys), and what is there in words.
function reader(box, f, data, rows) {
  const line = node(f.svg, "line", { y1: f.top, y2: f.top + f.height, class: "pointer", visibility: "hidden" });
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  box.append(f.svg, tip);
  const show = (pixel) => {
    const [x0, x1] = data.range;
    const raw = x0 + ((pixel - f.left) / (f.width - f.left - f.right)) * (x1 - x0);
    const inside = Math.min(x1, Math.max(x0, data.whole ? Math.round(raw) : raw));
    line.setAttribute("x1", f.x(inside));
    line.setAttribute("x2", f.x(inside));
    line.setAttribute("visibility", "visible");
    tip.replaceChildren();
    const head = tip.appendChild(document.createElement("b"));
    head.textContent = `${data.unit} ${shownTick(inside)}`;
    for (const [name, value, colour] of rows(inside)) {
      const row = tip.appendChild(document.createElement("div"));
      const swatch = row.appendChild(document.createElement("i"));
      if (colour) swatch.style.background = colour.startsWith("--") ? `var(${colour})` : colour;
      row.appendChild(document.createTextNode(`${name}: ${value}`));
    }
    tip.hidden = false;
    const at = f.x(inside);
    tip.style.left = at > f.width / 2 ? "" : `${at + 10}px`;
    tip.style.right = at > f.width / 2 ? `${box.clientWidth - at + 10}px` : "";
  };
  f.svg.addEventListener("pointermove", (event) => show(event.clientX - f.svg.getBoundingClientRect().left));
  f.svg.addEventListener("pointerdown", (event) => show(event.clientX - f.svg.getBoundingClientRect().left));
  f.svg.addEventListener("pointerleave", () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); });
}

// The stages: a bar per slot, the blueprint's name above it, where its seed germinated.
function stageChart(box, data) {
  const lane = 42, bar = 16;
  const f = frame(box, data, { title: "Stages: the life of the seed in each slot", height: lane * data.slots.length, axis: "epoch" });
  const half = 0.5, seen = new Set();
  data.slots.forEach((slot, row) => {
    const y = f.top + row * lane + 22;
    node(f.svg, "text", { x: f.left, y: y - 8, class: "slot" }, slot.name);
    for (const [first, last, stage] of slot.spans) {
      seen.add(stage);
      const look = data.stages[stage];
      node(f.svg, "rect", { x: f.x(Math.max(data.range[0], first - half)), y, height: bar, style: `fill:${look ? look[0] : "#bbbbbb"}`, class: stage === "DORMANT" ? "empty" : "",
        width: Math.max(1, f.x(Math.min(data.range[1], last + half)) - f.x(Math.max(data.range[0], first - half))) });
    }
    let free = f.left + 8 * slot.name.length + 14;
    for (const seed of slot.seeds) {
      const at = Math.max(f.x(seed.from), free);
      const label = node(f.svg, "text", { x: at, y: y - 8, class: "blueprint" }, seed.blueprint);
      free = at + 6.6 * seed.blueprint.length + 10;
      if (free > f.width) { label.setAttribute("x", f.width - f.right); label.setAttribute("text-anchor", "end"); }
      if (seed.to !== null && seed.outcome === "fossilized") node(f.svg, "text", { x: f.x(seed.to), y: y + 13, class: "end", "text-anchor": "middle" }, "★");
      if (seed.to !== null && seed.outcome === "culled") node(f.svg, "text", { x: f.x(seed.to), y: y + 13, class: "end culled", "text-anchor": "middle" }, "✕");
    }
  });
  reader(box, f, data, (at) => data.slots.map((slot) => {
    const span = slot.spans.find(([first, last]) => first <= at && at <= last);
    const seed = slot.seeds.find((one) => one.from <= at && (one.to === null || at <= one.to));
    const stage = span ? span[2] : "";
    return [slot.name, stage.toLowerCase() + (seed ? `, ${seed.blueprint}` : ""), data.stages[stage] ? data.stages[stage][0] : ""];
  }));
  legend(box, Object.entries(data.stages).filter(([stage]) => seen.has(stage)).map(([, [fill, name]]) => ({ name, fill })));
}

function panel(charts) {
  const box = document.createElement("div");
  box.className = "chart";
  charts.appendChild(box);
  return box;
}

function draw(data) {
  const charts = document.getElementById("charts");
  if (!charts || !data) return;
  charts.replaceChildren();
  if (data.sizes) lineChart(panel(charts), data.sizes, data.sizes.lines, { title: data.sizes.title, height: 230, log: true, kept: data.sizes.kept, axis: data.sizes.axis });
  if (data.lines.length) lineChart(panel(charts), data, data.lines, { title: data.title, height: 230, log: true, kept: data.kept, axis: data.axis });
  if (data.parameters) lineChart(panel(charts), data, data.parameters.lines, { title: data.parameters.title, height: 90, kept: data.kept, low: 0, axis: data.axis });
  const alphas = (data.slots || []).map((slot, i) => ({ name: slot.name, x: data.epochs, y: slot.alpha, colour: COLOURS[i % COLOURS.length] }));
  if (alphas.length) {
    lineChart(panel(charts), data, alphas, { title: "Alpha: the share of each slot's seed", height: 80, low: -0.04, high: 1.04 });
    stageChart(panel(charts), data);
  }
}

let current = null;
const embedded = document.getElementById("data");
if (embedded) { current = JSON.parse(embedded.textContent); draw(current); }
let width = 0;
new ResizeObserver(() => {
  const now = document.body.clientWidth;
  if (now !== width) { width = now; draw(current); }
}).observe(document.body);

if (document.body.dataset.follow) {
  const state = document.getElementById("state");
  const refresh = async () => {
    const answer = await (await fetch(document.body.dataset.follow)).json();
    document.title = answer.title;
    document.getElementById("heading").textContent = answer.title;
    document.getElementById("run").innerHTML = answer.html; // escaped where it was made
    current = answer.charts;
    draw(current);
    state.textContent = answer.state;
  };
  const events = new EventSource("/changes");
  events.onmessage = refresh;
  events.onopen = refresh;
  events.onerror = () => { state.textContent = "The watcher has ended; the page shows what it last saw."; };
}
