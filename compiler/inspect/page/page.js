"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const esc = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`;
const scaled = (v, steps) => { for (const [k, u] of steps) if (Math.abs(v) >= k) return `${(v / k).toFixed(k === 1 ? 0 : 1)} ${u}`; return `${+v.toPrecision(2)} ${steps[steps.length - 1][1]}`; };
const bytes = (v) => scaled(v, [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]);
const count = (v) => scaled(v, [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]]).trim();
const time = (s) => s >= 1 ? `${s.toFixed(1)} s` : s >= 1e-3 ? `${(s * 1e3).toFixed(1)} ms` : s >= 1e-6 ? `${(s * 1e6).toFixed(1)} µs` : `${(s * 1e9).toFixed(0)} ns`;
const CLASSES = { matmul: "matmul", attention: "attention", norm: "norm, rope, gate", fused: "fused", math: "elementwise, reduction", cache: "cache write", move: "data movement", aten: "torch op, control" };
let setting = D.settings[0][0];
const drawn = () => D.drawings[D.drawn[setting]];

function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)}px`;
}

function head() {
  $("name").textContent = D.name;
  $("facts").innerHTML = D.facts.filter(([k]) => k !== "model").map(([k, v]) => `<div><dt>${esc(k)}</dt><dd>${esc(v)}</dd></div>`).join("");
  $("footer").textContent = `Written by tilewright ${D.version}. Rooflines are the least times that the target's peak rates allow.`;
  if (D.settings.length < 2) return;
  $("setting").innerHTML = D.settings.map(([n, t, c]) => `<button data-setting="${n}" title="T = ${t}, context ${c}">${n}</button>`).join("");
  $("setting").addEventListener("click", (e) => { if (e.target.dataset.setting) { const before = drawn(); setting = e.target.dataset.setting; if (drawn() !== before) { chosen = null; folded.clear(); } update(); } });
}

/* The graph: blocks one below the other in one drawing. */
const folded = new Set();
const view = { x: 0, y: 0, k: 1, w: 0 };
let chosen = null;
const BOX = 40, TOP = 46, SIDE = 28, BETWEEN = 30;

const half = (n) => n.cls === "port" ? 13 : BOX / 2;

function curve(points, from, to) {
  const p = points.map(([x, y], i) => [x, y + (i === 0 ? half(from) : i === points.length - 1 ? -half(to) : 0)]);
  let d = `M${p[0]}`;
  for (let i = 1; i < p.length; i++) { const m = (p[i - 1][1] + p[i][1]) / 2; d += `C${p[i - 1][0]},${m} ${p[i][0]},${m} ${p[i]}`; }
  return d;
}

function nodeMarkup(n, id) {
  const left = n.x - n.w / 2, top = n.y - BOX / 2;
  if (n.cls === "port") return `<g class="node port" data-node="${id}"><rect class="box" x="${left}" y="${n.y - 13}" width="${n.w}" height="26" rx="13"/><text x="${n.x}" y="${n.y + 4}">${esc(n.label)}</text></g>`;
  return `<g class="node" data-node="${id}"><rect class="box" x="${left}" y="${top}" width="${n.w}" height="${BOX}" rx="7"/><rect class="bar" x="${left}" y="${top}" width="5" height="${BOX}" rx="2.5" style="fill:var(--${n.cls})"/><text x="${n.x}" y="${n.y - 2}">${esc(n.label)}</text><text class="type" x="${n.x}" y="${n.y + 12}">${esc(n.short)}</text></g>`;
}

function layer(block) {
  const total = block.nodes.reduce((s, n) => s + (n.cost ? n.cost[setting][2] : 0), 0);
  const times = block.repeat > 1 ? `, ${block.repeat} alike, ${time(total)} each` : "";
  return `${plural(block.nodes.filter((n) => n.cost).length, "node")}${times}, ${time(total * block.repeat)} in all`;
}

function draw() {
  const drawing = drawn();
  const width = Math.max(...drawing.map((b) => b.width), 460) + 2 * SIDE;
  let y = 0, out = "";
  drawing.forEach((b, i) => {
    const open = !folded.has(i), height = TOP + (open ? b.height + 14 : 0);
    out += `<rect class="frame" x="0" y="${y}" width="${width}" height="${height}" rx="12"/>`;
    out += `<g class="fold" data-fold="${i}"><rect x="0" y="${y}" width="${width}" height="${TOP}" fill="transparent"/><text class="heading" x="20" y="${y + 28}">${open ? "▾" : "▸"} ${esc(b.title)}<tspan dx="12">${esc(layer(b))}</tspan></text></g>`;
    if (open) {
      const dx = (width - b.width) / 2;
      out += `<g transform="translate(${dx},${y + TOP})">`;
      out += b.edges.map(([a, c, p]) => `<path class="edge" data-from="${i}.${a}" data-to="${i}.${c}" d="${curve(p, b.nodes[a], b.nodes[c])}"/>`).join("");
      out += b.nodes.map((n, j) => nodeMarkup(n, `${i}.${j}`)).join("") + "</g>";
    }
    y += height + BETWEEN;
    if (i < drawing.length - 1) out += `<path class="edge" d="M${width / 2},${y - BETWEEN}V${y}"/>`;
  });
  $("drawing").innerHTML = `<svg role="img" aria-label="The final graph"><g id="scene">${out}</g></svg>`;
  view.w = width;
  place();
  mark();
}

function place() { const g = $("scene"); if (g) g.setAttribute("transform", `translate(${view.x},${view.y}) scale(${view.k})`); }

function fit() {
  const room = $("drawing").clientWidth - 48;
  view.k = Math.min(1, room / view.w);
  view.x = ($("drawing").clientWidth - view.w * view.k) / 2;
  view.y = 20;
  place();
}

function zoom(factor, cx, cy) {
  const k = Math.min(3, Math.max(0.1, view.k * factor)), r = k / view.k;
  view.x = cx - (cx - view.x) * r; view.y = cy - (cy - view.y) * r; view.k = k;
  place();
}

function navigate() {
  const box = $("drawing");
  let start = null, moved = false;
  box.addEventListener("pointerdown", (e) => { start = [e.clientX - view.x, e.clientY - view.y, e.clientX, e.clientY]; moved = false; });
  addEventListener("pointermove", (e) => {
    if (!start) return;
    if (Math.hypot(e.clientX - start[2], e.clientY - start[3]) > 4) { moved = true; box.classList.add("moving"); }
    if (moved) { view.x = e.clientX - start[0]; view.y = e.clientY - start[1]; place(); }
  });
  addEventListener("pointerup", () => { start = null; box.classList.remove("moving"); });
  box.addEventListener("click", (e) => {
    if (moved) return;
    const fold = e.target.closest("[data-fold]"), node = e.target.closest("[data-node]");
    if (fold) { const i = +fold.dataset.fold; folded.has(i) ? folded.delete(i) : folded.add(i); draw(); return; }
    chosen = node ? node.dataset.node : null;
    mark();
  });
  box.addEventListener("wheel", (e) => {
    const at = box.getBoundingClientRect();
    if (!e.ctrlKey && !e.metaKey) return;
    zoom(Math.exp(-e.deltaY / 300), e.clientX - at.left, e.clientY - at.top);
    e.preventDefault();
  }, { passive: false });
  document.querySelector(".zoom").addEventListener("click", (e) => {
    const f = +e.target.dataset.zoom;
    if (e.target.dataset.zoom === undefined) return;
    f ? zoom(f, box.clientWidth / 2, box.clientHeight / 2) : fit();
  });
}

function mark() {
  document.querySelectorAll(".node.chosen").forEach((n) => n.classList.remove("chosen"));
  document.querySelectorAll(".edge").forEach((p) => p.classList.toggle("near", chosen !== null && (p.dataset.from === chosen || p.dataset.to === chosen)));
  const node = chosen && document.querySelector(`[data-node="${chosen}"]`);
  if (node) {
    node.classList.add("chosen");
    const room = $("drawing").getBoundingClientRect().right - 370 - node.getBoundingClientRect().right;
    if (room < 0) { view.x += room; place(); }
  }
  const [i, j] = (chosen || "").split(".");
  const n = chosen ? drawn()[i].nodes[j] : null;
  $("detail").innerHTML = n && n.cost ? detail(n, drawn()[i]) : "";
}

function detail(n, block) {
  const rows = (pairs) => `<table>${pairs.map(([a, b]) => `<tr><td>${esc(a)}</td><td>${esc(b)}</td></tr>`).join("")}</table>`;
  const cost = Object.entries(n.cost).map(([name, [f, b, s]]) => {
    const whole = D.costs[name].reduce((t, r) => t + r.roofline_seconds, 0) || 1;
    return `<h3>${esc(name)}</h3>` + rows([["FLOPs", count(f)], ["bytes", bytes(b)], ["intensity", b ? `${(f / b).toFixed(1)} FLOP/B` : "–"], ["roofline", time(s)], ["share", `${(100 * s / whole).toFixed(2)} %${block.repeat > 1 ? `, × ${block.repeat} layers` : ""}`]]);
  }).join("");
  return `<button class="close" aria-label="Close" onclick="chosen=null;mark()">×</button><h4 style="color:var(--${n.cls})">${esc(n.label)}</h4><div class="mono">${esc(n.name)}: ${esc(n.type)}</div>`
    + (n.operands.length ? `<h3>operands</h3>${rows(n.operands)}` : "") + (n.attrs.length ? `<h3>attributes</h3>${rows(n.attrs)}` : "") + cost
    + (n.body ? `<h3>body</h3><pre>${esc(n.body)}</pre>` : "");
}

/* Passes: bars of node counts, texts, differences. */
function passes() {
  const most = Math.max(...D.passes.flatMap((p) => p.nodes), 1);
  const row = (p) => {
    const [a, b] = p.nodes, pc = (v) => `${(100 * v / most).toFixed(2)}%`;
    const cut = b < a ? `<s style="left:${pc(b)};width:${pc(a - b)}"></s>` : "";
    const error = p.max_error === null || p.max_error === undefined ? "–" : p.max_error.toExponential(1);
    return `<div class="step"><span>${esc(p.name)}</span><div class="track"><b style="width:${pc(b)}"></b>${cut}</div><span>${a} → ${b}</span><span>${time(p.seconds)}</span><span>${error}</span></div>`;
  };
  $("timeline").innerHTML = `<div class="step head"><span>pass</span><span>nodes</span><span></span><span>time</span><span>largest error</span></div>` + D.passes.map(row).join("");
  $("texts").innerHTML = D.graphs.map((g, i) => `<details data-text="${i}"><summary>${String(i).padStart(3, "0")} ${esc(g.name)}<span>${plural(g.text.split("\n").length, "line")}</span></summary><div class="tabs">${i ? '<button data-tab="diff">changes</button>' : ""}<button data-tab="text">text</button></div><pre></pre></details>`).join("");
  $("texts").addEventListener("toggle", (e) => { if (e.target.open && !e.target.dataset.tab) show(e.target, +e.target.dataset.text ? "diff" : "text"); }, true);
  $("texts").addEventListener("click", (e) => { if (e.target.dataset.tab) show(e.target.closest("details"), e.target.dataset.tab); });
}

function show(details, tab) {
  const i = +details.dataset.text;
  details.dataset.tab = tab;
  details.querySelectorAll("[data-tab]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.tab === tab));
  details.querySelector("pre").innerHTML = tab === "text" ? esc(D.graphs[i].text) : changes(D.graphs[i - 1].text, D.graphs[i].text);
}

/* Values are numbered anew after each pass: lines that differ in such numbers alone are the same. */
const key = (line) => line.replace(/\b([a-z]\w*?)_\d+\b/g, "$1");

function changes(before, after) {
  const a = before.split("\n"), b = after.split("\n"), ops = myers(a.map(key), b.map(key));
  if (ops.every(([kind]) => kind === "=")) return '<span class="skip">nothing changed</span>';
  const near = new Set();
  ops.forEach(([kind], i) => { if (kind !== "=") for (let d = -2; d <= 2; d++) near.add(i + d); });
  const out = [];
  let skipped = 0;
  const flush = () => { if (skipped) out.push(`<span class="skip">  ⋯ ${plural(skipped, "line")} alike</span>`); skipped = 0; };
  ops.forEach(([kind, i], at) => {
    if (!near.has(at)) { skipped++; return; }
    flush();
    if (kind === "=") out.push(`<span>  ${esc(b[i])}</span>`);
    else out.push(kind === "+" ? `<span class="come">+ ${esc(b[i])}</span>` : `<span class="gone">- ${esc(a[i])}</span>`);
  });
  flush();
  return out.join("");
}

/* Myers, An O(ND) difference algorithm (1986). Gives ["=", j], ["-", i], ["+", j] in order. */
function myers(a, b) {
  const ids = new Map(), id = (s) => ids.get(s) ?? (ids.set(s, ids.size), ids.size - 1);
  const x = a.map(id), y = b.map(id), n = x.length, m = y.length, trace = [];
  let v = new Map([[1, 0]]);
  search: for (let d = 0; d <= n + m; d++) {
    const next = new Map();
    for (let k = -d; k <= d; k += 2) {
      let i = k === -d || (k !== d && (v.get(k - 1) ?? -1) < (v.get(k + 1) ?? -1)) ? v.get(k + 1) : v.get(k - 1) + 1;
      while (i < n && i - k < m && x[i] === y[i - k]) i++;
      next.set(k, i);
      if (i >= n && i - k >= m) { trace.push(v); break search; }
    }
    trace.push(v);
    v = next;
  }
  const ops = [];
  let i = n, j = m;
  for (let d = trace.length - 1; d >= 0; d--) {
    const w = trace[d], k = i - j;
    const down = k === -d || (k !== d && (w.get(k - 1) ?? -1) < (w.get(k + 1) ?? -1));
    const pk = down ? k + 1 : k - 1, pi = d ? w.get(pk) : 0, pj = d ? pi - pk : 0;
    while (i > (d ? (down ? pi : pi + 1) : 0) && j > (d ? (down ? pj + 1 : pj) : 0)) ops.push(["=", (i--, --j)]);
    if (d) { if (down) ops.push(["+", --j]); else ops.push(["-", --i]); }
  }
  return ops.reverse();
}

function calls() {
  const rows = D.costs[setting], whole = rows.reduce((t, r) => t + r.roofline_seconds, 0) || 1, s = D.settings.find((one) => one[0] === setting);
  $("calls-lead").textContent = `${s[0]}: T = ${s[1]}, context ${s[2]}. ${count(rows.reduce((t, r) => t + r.flops, 0))}FLOP, ${bytes(rows.reduce((t, r) => t + r.bytes, 0))}, at least ${time(whole)}.`;
  $("ops").innerHTML = "<tr><th>op</th><th>calls</th><th>FLOPs</th><th>bytes</th><th>roofline</th><th>share</th><th></th></tr>" + rows.map((r) => `<tr><td><i style="background:var(--${D.classes[r.op]})"></i>${esc(r.op)}</td><td>${r.calls}</td><td>${count(r.flops)}</td><td>${bytes(r.bytes)}</td><td>${time(r.roofline_seconds)}</td><td>${(100 * r.roofline_seconds / whole).toFixed(1)} %</td><td style="text-align:left;width:110px"><span class="share" style="background:var(--${D.classes[r.op]});width:${(100 * r.roofline_seconds / whole).toFixed(1)}px"></span></td></tr>`).join("");
  D.steps ? compiled() : plain();
}

function plain() {
  $("kernels").innerHTML = "<tr><th>kernel</th><th style='text-align:left'>computes</th><th>calls</th></tr>" + D.kernels.map((k) => `<tr><td>${esc(k.kernel)}</td><td class="wide">${esc(k.ops)}</td><td>${k.calls}</td></tr>`).join("");
}

/* Kernels of ours: a row each, and its source below it when it is clicked. */
const unfolded = new Set();
const HEADS = [["kernel", ""], ["kind", ""], ["launches", "a step"], ["registers", "a thread"], ["spills", "bytes a thread"], ["shared", "memory a block"], ["threads", "a block"], ["blocks", "an SM holds at once"], ["occupancy", "warps an SM holds, of those it could"], ["FLOPs", "a step"], ["bytes", "a step"], ["roofline", "least time a step"], ["of the floor", "share of the step's least time"]];

/* Decode steps may have a Program of their own. */
const shownKernels = () => setting === "decode" && D.decode_kernels ? D.decode_kernels : D.kernels;

function compiled() {
  const s = D.steps[setting], layer = s.launches_a_layer === null ? "" : `, ${+s.launches_a_layer.toFixed(2)} a layer (${plural(s.layers, "layer")})`;
  $("call-tables").classList.add("stacked");
  $("kernels-lead").textContent = `${plural(s.launches, "launch")} a step${layer}; ${count(s.flops)}FLOP, ${bytes(s.bytes)}, at least ${time(s.roofline_seconds)}. A call of a library or of torch counts as one launch. Click a kernel for its source.`;
  $("kernels").innerHTML = `<tr>${HEADS.map(([h, t]) => `<th title="${t}">${h}</th>`).join("")}</tr>` + shownKernels().map(kernelRow).join("");
}

function kernelRow(k, i) {
  const ran = k.binaries.filter((b) => b.runs_at.includes(setting)), shown = ran.length ? ran : k.binaries, c = k.costs[setting];
  const each = (f) => shown.length ? [...new Set(shown.map(f))].join(" / ") : "–";
  const cells = [esc(k.kernel), esc(k.kind), k.launches[setting], each((b) => b.registers), each((b) => b.spilled_bytes ? `<span class="hot">${b.spilled_bytes}</span>` : 0), each((b) => bytes(b.shared_bytes)), each((b) => b.threads), each((b) => b.blocks_per_sm ?? "–"), each((b) => b.occupancy === null ? "–" : `${Math.round(100 * b.occupancy)} %`), count(c.flops), bytes(c.bytes), time(c.roofline_seconds), shareBar(c.roofline_seconds)];
  const open = unfolded.has(i);
  const row = `<tr ${k.source === null ? "" : `class="kernel" data-kernel="${i}" tabindex="0" aria-expanded="${open}"`}>${cells.map((one) => `<td>${one}</td>`).join("")}</tr>`;
  return open ? `${row}<tr class="source"><td colspan="${cells.length}"><p>${esc(kernelNote(k))}</p><pre>${esc(k.source)}</pre></td></tr>` : row;
}

function shareBar(seconds) {
  const share = (100 * seconds / (D.steps[setting].roofline_seconds || 1)).toFixed(1);
  return `<span class="share" title="${share} %" style="background:var(--accent);width:${share}px"></span>`;
}

function kernelNote(k) {
  const limits = k.binaries.filter((b) => b.limited_by).map((b) => `${b.function}: ${plural(b.blocks_per_sm, "block")} an SM, limited by ${b.limited_by}`);
  return [`computes ${k.ops}, ${plural(k.calls, "call")}`, ...limits].join("; ");
}

function unfold(e) {
  const row = e.target.closest("[data-kernel]");
  if (!row || (e.type === "keydown" && e.key !== "Enter")) return;
  const i = +row.dataset.kernel;
  unfolded.has(i) ? unfolded.delete(i) : unfolded.add(i);
  compiled();
}

function memory() {
  const m = D.memory[setting], kv = D.kv_per_token * D.context;
  const bars = [["weights", D.weight_bytes, "matmul"]];
  if (kv) bars.push([`KV cache, ${D.context} tokens`, kv, "cache"]);
  bars.push([`intermediate values, ${setting}`, m.peak, "norm"]);
  const most = Math.max(...bars.map((b) => b[1]), 1);
  bars.push(["all together", bars.reduce((t, b) => t + b[1], 0), "move"]);
  const scale = Math.max(most, bars[bars.length - 1][1]);
  $("bars").innerHTML = bars.map(([n, v, c]) => `<div class="bar-row"><span>${esc(n)}</span><div><b style="width:${(100 * v / scale).toFixed(2)}%;background:var(--${c})"></b></div><span>${bytes(v)}</span></div>`).join("");
  $("memory-lead").textContent = (m.of_graph ? "One session runs the whole graph and plans its own memory: this is the plan for the graph run op by op. " : "") + `Calls from left to right, the arena from bottom to top. ${plural(m.boxes.length, "value")} of ${bytes(m.sum)} lie in ${bytes(m.peak)}; ${bytes(m.lower_bound)} are alive at the fullest call.`;
  const W = 1200, H = 360, L = 60, B = 22, n = Math.max(m.calls.length, 1), peak = m.peak || 1;
  const x = (i) => L + (W - L) * i / n, y = (o) => (H - B) * (1 - o / peak);
  let out = "";
  for (let t = 0; t <= 4; t++) { const v = peak * t / 4; out += `<line x1="${L}" x2="${W}" y1="${y(v)}" y2="${y(v)}"/><text x="${L - 8}" y="${y(v) + (t === 4 ? 10 : 3)}" text-anchor="end">${bytes(v)}</text>`; }
  for (let t = 0; t <= 6; t++) { const i = Math.round(n * t / 6); out += `<text x="${x(i)}" y="${H - 5}" text-anchor="${t === 6 ? "end" : "middle"}">${i}</text>`; }
  out += m.boxes.map(([name, type, a, b, o, s], i) => `<rect class="value" data-box="${i}" x="${x(a).toFixed(2)}" y="${y(o + s).toFixed(2)}" width="${Math.max(x(b + 1) - x(a), .6).toFixed(2)}" height="${Math.max(y(o) - y(o + s), .4).toFixed(2)}" style="fill:var(--${D.classes[m.calls[a]] || "math"})"/>`).join("");
  $("arena").innerHTML = m.boxes.length ? `<svg viewBox="0 0 ${W} ${H}" preserveAspectRatio="none" role="img" aria-label="The memory plan">${out}</svg>` : '<p class="lead">No intermediate values.</p>';
}

function extras() {
  $("legend").innerHTML = Object.entries(CLASSES).filter(([c]) => Object.values(D.classes).includes(c)).map(([c, t]) => `<span><i style="background:var(--${c})"></i>${t}</span>`).join("");
  $("weights").innerHTML = "<tr><th>name</th><th>size</th></tr>" + D.weights.map(([n, s]) => `<tr><td class="mono">${esc(n)}</td><td>${bytes(s)}</td></tr>`).join("") + (D.weight_count > D.weights.length ? `<tr><td>${D.weight_count - D.weights.length} others</td><td>${bytes(D.weight_bytes - D.weights.reduce((t, w) => t + w[1], 0))}</td></tr>` : "");
  $("note-list").innerHTML = (D.notes.length ? D.notes : ["None: every call runs in the backend, and no op runs as torch defines it."]).map((n) => `<li>${esc(n)}</li>`).join("");
  $("arena").addEventListener("mousemove", (e) => {
    const i = e.target.dataset.box;
    if (i === undefined) { tip(e, ""); return; }
    const m = D.memory[setting], [name, type, a, b, o, s] = m.boxes[i];
    tip(e, `${name}: ${type}\n${bytes(s)} at ${bytes(o)}\nmade by call ${a} (${m.calls[a]}), last used by ${b} (${m.calls[b] || "the caller"})`);
  });
  $("kernels").addEventListener("click", unfold);
  $("kernels").addEventListener("keydown", unfold);
  $("arena").addEventListener("mouseleave", (e) => tip(e, ""));
}

function update() {
  document.querySelectorAll("[data-setting]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.setting === setting));
  draw(); calls(); memory();
}

head(); extras(); passes(); update(); navigate(); fit();
addEventListener("resize", place);
