"use strict";
// Everything shown is text of strangers: it goes through textContent and fillText, never through markup.
const data = JSON.parse(document.getElementById("data").textContent);
const ROW = 18, GUTTER = 190, AXIS = 22, RIGHT = 14;
const agents = data.agents;
const byName = new Map(agents.map((agent, row) => [agent.name, row]));
const end = Math.max(data.end, 1e-9);
const scroll = document.getElementById("scroll"), canvas = document.getElementById("canvas");
const pen = canvas.getContext("2d");
let chosen = -1, from = 0, to = end;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const seconds = (t) => (t < 10 ? t.toFixed(2) : t < 100 ? t.toFixed(1) : Math.round(t).toString()) + " s";

function add(parent, tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  parent.appendChild(node);
  return node;
}

// ----------------------------------------------------------------------------------------------------------- header
document.getElementById("question").textContent = data.question;
document.getElementById("status").textContent = data.summary;
for (const [name, value, meaning] of data.measures) {
  const box = add(document.getElementById("measures"), "div");
  box.title = meaning;
  add(box, "dt", name);
  add(box, "dd", value);
}

// ------------------------------------------------------------------------------------------------------------ chart
const x = (time) => GUTTER + ((time - from) / (to - from)) * (canvas.clientWidth - GUTTER - RIGHT);

function bar(begin, finish, y, height, fill) {
  const left = Math.max(x(begin), GUTTER), right = Math.min(x(finish), canvas.clientWidth - RIGHT);
  if (right < left) return;
  pen.fillStyle = fill;
  pen.fillRect(left, y, Math.max(right - left, 1.5), height);
}

function axis(width, height, paint) {
  pen.fillStyle = paint.back;
  pen.fillRect(0, 0, width, AXIS);
  const step = Math.pow(10, Math.floor(Math.log10((to - from) / 5)));
  const tick = [1, 2, 5, 10].map((m) => m * step).find((s) => (to - from) / s <= 10) || step;
  for (let t = Math.ceil(from / tick) * tick; t <= to; t += tick) {
    pen.fillStyle = paint.line;
    pen.fillRect(x(t), AXIS - 4, 1, height);
    pen.fillStyle = paint.soft;
    const label = seconds(t);
    if (x(t) + 3 + pen.measureText(label).width < width) pen.fillText(label, x(t) + 3, AXIS - 8);
  }
}

function row(agent, index, y, width, paint) {
  if (index === chosen) {
    pen.fillStyle = paint.chosen;
    pen.fillRect(0, y, width, ROW);
  }
  pen.fillStyle = agent.status === "ok" ? paint.text : paint.critical;
  const label = "  ".repeat(agent.depth) + (agent.name === "root" ? "root" : agent.name.split("/").pop() + " " + agent.agent);
  pen.fillText(label.slice(0, 30), 10, y + ROW - 5, GUTTER - 16);
  if (agent.start !== null && agent.start > agent.spawn) bar(agent.spawn, agent.start, y + 7, 4, paint.queue);
  if (agent.start !== null) bar(agent.start, agent.end, y + 8, 2, paint.line);
  for (const turn of agent.turns) {
    if (turn.time < from || turn.time - turn.duration > to) continue;
    const fill = turn.critical ? paint.critical : turn.kind === "step" ? paint.model : paint.tool;
    bar(turn.time - turn.duration, turn.time, y + (turn.kind === "step" ? 3 : 6), turn.kind === "step" ? ROW - 6 : ROW - 12, fill);
  }
}

function draw() {
  const width = scroll.clientWidth, height = scroll.clientHeight, scale = window.devicePixelRatio || 1;
  if (canvas.width !== width * scale || canvas.height !== height * scale) {
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
  }
  document.getElementById("spacer").style.height = Math.max(0, AXIS + agents.length * ROW - height) + "px";
  const paint = Object.fromEntries(
    ["back", "text", "soft", "line", "chosen", "model", "tool", "queue", "critical"].map((name) => [name, colour(name)]));
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = paint.back;
  pen.fillRect(0, 0, width, height);
  axis(width, height, paint);
  const first = Math.floor(scroll.scrollTop / ROW), offset = scroll.scrollTop - first * ROW;
  pen.save();
  pen.beginPath();
  pen.rect(0, AXIS, width, height - AXIS);
  pen.clip();
  for (let i = first; i < agents.length && AXIS + (i - first) * ROW - offset < height; i++) {
    row(agents[i], i, AXIS + (i - first) * ROW - offset, width, paint);
  }
  pen.restore();
}

function zoom(factor, centre) {
  const width = Math.min(Math.max((to - from) * factor, end / 1e5), end);
  from = Math.min(Math.max(centre - (centre - from) * (width / (to - from)), 0), end - width);
  to = from + width;
  draw();
}

// ------------------------------------------------------------------------------------------------------- transcript
function turnBox(parent, turn) {
  const box = add(parent, "div", undefined, "turn" + (turn.critical ? " critical" : ""));
  const facts = [seconds(turn.time), seconds(turn.duration), ...(turn.tokens ? [turn.tokens] : []),
    ...(turn.critical ? ["critical path"] : [])].join(" · ");
  add(box, "h3", (turn.kind === "step" ? "step " + (turn.step + 1) : turn.name) + " · " + facts,
    turn.status === "ok" ? "" : "bad");
  for (const text of turn.texts) add(box, "pre", text);
}

function choose(index) {
  if (index < 0 || index >= agents.length) return;
  chosen = index;
  const agent = agents[index], panel = document.getElementById("transcript");
  panel.replaceChildren();
  add(panel, "h2", agent.name + (agent.name === "root" ? "" : " (" + agent.agent + ")"));
  add(panel, "p", agent.facts, "facts" + (agent.status === "ok" ? "" : " bad"));
  add(panel, "h3", "task");
  add(panel, "pre", agent.brief);
  for (const turn of agent.turns) turnBox(panel, turn);
  add(panel, "h3", "result");
  add(panel, "pre", agent.summary);
  panel.scrollTop = 0;
  const y = index * ROW, room = scroll.clientHeight - AXIS - ROW;
  if (y < scroll.scrollTop) scroll.scrollTop = y;
  else if (y > scroll.scrollTop + room) scroll.scrollTop = y - room;
  draw();
}

canvas.addEventListener("click", (event) => {
  const y = event.clientY - canvas.getBoundingClientRect().top;
  if (y >= AXIS) choose(Math.floor((y - AXIS + scroll.scrollTop) / ROW));
});
scroll.addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!move) return;
  event.preventDefault();
  choose(chosen + move);
});
scroll.addEventListener("scroll", draw);
scroll.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  const share = (event.offsetX - GUTTER) / (canvas.clientWidth - GUTTER - RIGHT);
  zoom(event.deltaY > 0 ? 1.25 : 0.8, from + Math.min(Math.max(share, 0), 1) * (to - from));
}, { passive: false });
document.getElementById("in").addEventListener("click", () => zoom(0.5, (from + to) / 2));
document.getElementById("out").addEventListener("click", () => zoom(2, (from + to) / 2));
document.getElementById("fit").addEventListener("click", () => { from = 0; to = end; draw(); });
window.addEventListener("resize", draw);
draw();
choose(byName.get(decodeURIComponent(location.hash.slice(1))) ?? 0);
document.body.dataset.ready = String(performance.now());
