"use strict";
/* Names and notes come from anywhere: they reach the page as text nodes only, never as markup. */
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = $("blank").namespaceURI;
const ROWS = 200, RATIOS = 60, LINES = 4000;
/* A verdict's colour class and mark: the mark tells it without the colour. */
const VERDICTS = new Map([
  ["regression", ["gone", "▲"]], ["missing", ["gone", "✕"]], ["not decidable", ["doubt", "?"]], ["changed", ["doubt", "≠"]],
  ["improvement", ["come", "▼"]], ["no change", ["plain", "·"]],
]);
const ORDER = [...VERDICTS.keys()];
const look = (verdict) => VERDICTS.get(verdict) || ["plain", "·"];

function fill(node, attrs, kids) {
  for (const [name, value] of Object.entries(attrs)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...kids.map((kid) => kid instanceof Node ? kid : document.createTextNode(String(kid))));
  return node;
}
const el = (tag, attrs = {}, ...kids) => fill(document.createElement(tag), attrs, kids);
const svg = (tag, attrs = {}, ...kids) => fill(document.createElementNS(SVG, tag), attrs, kids);

const STEPS = { s: [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]], bytes: [[1e9, "GB"], [1e6, "MB"], [1e4, "kB", 1e3]] };
/* `like`: the value whose step is taken, so that the ticks of an axis share one. */
function quantity(value, unit, digits = 4, like = value) {
  if (value === null) return "none";
  const [least, name, factor = least] = (Object.hasOwn(STEPS, unit) && STEPS[unit].find(([from]) => Math.abs(like) >= from)) || [1, unit];
  return `${plain(value / factor, digits)} ${name}`.trim();
}
function plain(value, digits) {
  return Number.isInteger(value) && Math.abs(value) < 1e15 ? value.toLocaleString("en") : String(+value.toPrecision(Math.min(Math.max(digits, 1), 15)));
}

function tip(text, x, y) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  box.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - box.offsetHeight - 8))}px`;
}

function head() {
  $("name").textContent = D.title;
  $("footer").textContent = `Written by tilewright ${D.version}.`;
  if (!D.comparison) return;
  $("headline").textContent = `${D.comparison.exit_code ? "Failed" : "Passed"}: ${D.headline}`;
  $("headline").classList.add(D.comparison.exit_code ? "gone" : "come");
  $("facts").append(...D.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

/* The table of rows, and what filters it. */
const COLUMNS = [
  ["verdict", (r) => `${look(r.verdict)[1]} ${r.verdict}`, (r) => ORDER.indexOf(r.verdict)], ["tier", (r) => r.tier], ["kernel or phase", (r) => r.subject, null, "name"],
  ["case", (r) => r.case], ["target", (r) => r.target], ["what", (r) => r.series], ["old → new", (r) => r.change], ["ratio", (r) => r.factor, (r) => r.weight],
  ["gate", (r) => r.gate], ["owner", (r) => r.owner], ["note", (r) => r.note, null, "note"],
];
const rows = D.comparison ? D.comparison.rows.map((row, i) => ({ ...row, change: D.shown[i][0], factor: D.shown[i][1], band: D.shown[i][2], weight: weight(row) })) : [];
let sorted = [0, 1], most = ROWS, mostRatios = RATIOS;

function weight(row) {
  const value = row.ratio ? row.ratio.value : row.new / row.old;
  return typeof value === "number" && Number.isFinite(value) ? value : 0;
}

function choice(form, name, values, apply) {
  const select = el("select", { name, change: apply }, el("option", { value: "" }, "all"), ...values.map((v, i) => el("option", { value: String(i + 1) }, v)));
  form.append(el("label", {}, name, select));
  return () => select.value === "" ? null : values[Number(select.value) - 1];
}
function search(form, name, apply) {
  const input = el("input", { type: "search", name, input: apply });
  form.append(el("label", {}, name, input));
  return () => input.value.toLowerCase();
}
const distinct = (items) => [...new Set(items)];

function table() {
  const form = $("filters"), apply = () => { most = ROWS; mostRatios = RATIOS; show(); };
  form.addEventListener("submit", (e) => e.preventDefault());
  const chosen = [
    ["verdict", choice(form, "verdict", ORDER.filter((v) => rows.some((r) => r.verdict === v)), apply)],
    ...["tier", "case", "target"].map((key) => [key, choice(form, key, distinct(rows.map((r) => r[key])).sort(), apply)]),
  ];
  const words = search(form, "kernel, phase, what, owner", apply);
  $("table").tHead.append(el("tr", {}, ...COLUMNS.map(([name], i) => el("th", { scope: "col" }, el("button", { type: "button", click: () => { sorted = [i, sorted[0] === i ? -sorted[1] : 1]; show(); } }, name)))));
  $("more").addEventListener("click", () => { most += 1000; show(); });
  $("more-ratios").addEventListener("click", () => { mostRatios += 200; show(); });
  function show() {
    const wanted = chosen.map(([key, value]) => [key, value()]).filter(([, value]) => value !== null), text = words();
    const found = rows.filter((r) => wanted.every(([key, value]) => r[key] === value) && `${r.subject}\n${r.series}\n${r.owner}`.toLowerCase().includes(text));
    const [column, sign] = sorted, key = COLUMNS[column][2] || COLUMNS[column][1];
    found.sort((a, b) => { const x = key(a), y = key(b); return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))); });
    $("table").tBodies[0].replaceChildren(...found.slice(0, most).map(line));
    [...$("table").tHead.rows[0].cells].forEach((th, i) => th.setAttribute("aria-sort", i !== column ? "none" : sign > 0 ? "ascending" : "descending"));
    $("rows-lead").textContent = `${found.length} of ${rows.length} series`;
    rest($("more"), found.length - most);
    forest(found.filter((r) => r.ratio));
  }
  show();
}
const line = (row) => el("tr", {}, ...COLUMNS.map(([name, value, , cls]) => el("td", { class: name === "verdict" ? look(row.verdict)[0] : cls }, value(row))));
function rest(button, count) { button.hidden = count <= 0; button.textContent = `Show more (${count} are hidden)`; }

/* The forest plot: one line a measured ratio, on a logarithmic scale. */
function forest(found) {
  const shown = found.slice(0, mostRatios);
  rest($("more-ratios"), found.length - shown.length);
  if (!shown.length) { $("forest").replaceChildren(el("p", { class: "lead" }, "No measured ratio among these.")); return; }
  const W = 1200, LEFT = 420, RIGHT = 200, ROW = 22, TOP = 24, H = TOP + ROW * shown.length + 8;
  const ends = shown.flatMap((r) => [r.ratio.low, r.ratio.value, r.ratio.high, ...(r.band || [])]).filter((v) => typeof v === "number" && v > 0);
  const reach = Math.min(Math.max(Math.log(1.02), ...ends.map((v) => Math.abs(Math.log(v)))), Math.log(4)) * 1.05;
  const x = (v) => { const at = typeof v !== "number" ? 1 : v <= 0 ? -1 : Math.max(-1, Math.min(1, Math.log(v) / reach)); return LEFT + (W - LEFT - RIGHT) * (at + 1) / 2; };
  const far = (v, sign) => v === null || v === "inf" || v === "-inf" || (typeof v === "number" && (v <= 0 || sign * Math.log(v) > reach));
  const kids = [svg("title", {}, "Measured ratios, new over old"), svg("desc", {}, `${shown.length} series; each with its interval, and the band that its gate lets pass.`)];
  for (let t = -2; t <= 2; t++) {
    const v = Math.exp(reach * t / 2.1);
    kids.push(svg("line", { class: t === 0 ? "one" : "grid", x1: x(v), x2: x(v), y1: TOP - 6, y2: H }), svg("text", { x: x(v), y: 12, "text-anchor": "middle" }, `${v.toFixed(reach < 0.1 ? 3 : 2)}×`));
  }
  shown.forEach((r, i) => {
    const y = TOP + ROW * (i + 0.5), [cls, mark] = look(r.verdict), { low, high, value } = r.ratio;
    const name = `${r.subject} ${r.series} · ${r.case} on ${r.target}`;
    const group = svg("g", { class: cls }, svg("title", {}, `${name}: ${r.factor}, gate ${r.gate}, ${r.verdict}`));
    if (r.band) group.append(svg("rect", { class: "band", x: x(r.band[0]), width: Math.max(0, x(r.band[1]) - x(r.band[0])), y: y - 8, height: 16 }));
    const a = far(low, -1) ? LEFT : x(low), b = far(high, 1) ? W - RIGHT : x(high);
    group.append(svg("line", { class: "bar", x1: a, x2: b, y1: y, y2: y }), svg("circle", { class: r.verdict === "no change" ? "mark hollow" : "mark", cx: x(value), cy: y, r: 4 }));
    if (far(low, -1)) group.append(svg("path", { class: "mark", d: `M${LEFT},${y}l7,-4v8z` }));
    if (far(high, 1)) group.append(svg("path", { class: "mark", d: `M${W - RIGHT},${y}l-7,-4v8z` }));
    group.append(svg("text", { class: "row", x: 0, y: y + 4 }, `${mark} ${short(name, 58)}`), svg("text", { x: W - RIGHT + 12, y: y + 4 }, r.factor));
    kids.push(group);
  });
  $("forest").replaceChildren(svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" }, ...kids));
}
function short(text, size) { const all = [...text]; return all.length > size ? `${all.slice(0, size - 1).join("")}…` : text; }

/* Diffs are filled when they are opened first. */
function diffs() {
  $("diff-list").append(...D.diffs.map(([index, count, places]) => {
    const diff = D.comparison.diffs[index], box = el("details", {}, el("summary", {}, el("code", {}, diff.subject), el("span", {}, `${diff.what}: ${places}`)));
    box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(pre(diff.text)); });
    return box;
  }));
}
function pre(text) {
  const lines = text.trimEnd().split("\n"), cls = (l) => l.startsWith("+") ? "come" : l.startsWith("-") ? "gone" : l.startsWith("@") ? "doubt" : null;
  const box = el("pre", { tabindex: 0 }, ...lines.slice(0, LINES).map((l) => el("span", { class: cls(l) }, l)));
  if (lines.length > LINES) box.append(el("span", { class: "plain" }, `… ${lines.length - LINES} more lines; the JSON holds them all.`));
  return box;
}

/* Histories: a card each; a plot is drawn when its card comes near to the window. */
function history() {
  const plots = [...D.plots].sort((a, b) => ORDER.indexOf(a.verdict) - ORDER.indexOf(b.verdict) || b.change_points.length - a.change_points.length);
  const form = $("series-filters");
  form.addEventListener("submit", (e) => e.preventDefault());
  const verdict = choice(form, "verdict", ORDER.filter((v) => plots.some((p) => p.verdict === v)), apply), words = search(form, "name, case, target, kernel", apply);
  const drawn = new Map();
  const seen = "IntersectionObserver" in window ? new IntersectionObserver((entries) => { for (const e of entries) if (e.isIntersecting) drawn.get(e.target)(); }, { rootMargin: "500px" }) : null;
  const cards = plots.map((p) => {
    const [cls, mark] = look(p.verdict), box = el("div", { class: "plot" });
    const card = el("article", {}, el("h3", { class: cls }, `${mark} ${p.name}`), el("p", {}, [p.verdict, `${p.case} on ${p.target}`, p.subject, p.series, p.better === "equal" ? "" : `${p.better} is better`, p.note].filter(Boolean).join(" · ")), box);
    drawn.set(card, () => { if (!box.firstChild) box.append(plot(p)); if (seen) seen.unobserve(card); });
    return card;
  });
  $("series").append(...cards);
  if (seen) cards.forEach((card) => seen.observe(card)); else drawn.forEach((draw) => draw());
  function apply() {
    const wanted = verdict(), text = words();
    let count = 0;
    plots.forEach((p, i) => {
      const fits = (wanted === null || p.verdict === wanted) && [p.name, p.case, p.target, p.subject, p.series].join("\n").toLowerCase().includes(text);
      cards[i].hidden = !fits;
      count += fits;
    });
    $("series-lead").textContent = `${count} of ${plots.length} series`;
  }
  apply();
}

function plot(p) {
  const W = 1200, H = 232, LEFT = 84, RIGHT = 16, TOP = 22, BOTTOM = 24;
  const points = p.points.map(([time, commit, value, low, high], i) => ({ i, time, commit, value, low, high })).filter((q) => q.value !== null);
  if (!points.length) return el("p", { class: "lead" }, "No points.");
  const levels = [...points.flatMap((q) => [q.value, q.low, q.high]), p.pinned].filter((v) => v !== null);
  const least = levels.reduce((a, b) => Math.min(a, b)), top = levels.reduce((a, b) => Math.max(a, b));
  const pad = (top - least) * 0.08 || Math.abs(top) * 0.01 || 1, lo = least - pad, hi = top + pad;
  const digits = Math.ceil(Math.log10(Math.max(Math.abs(lo), Math.abs(hi)) / (hi - lo))) + 3;
  const n = p.points.length, x = (i) => LEFT + (W - LEFT - RIGHT) * (i + 0.5) / n, y = (v) => TOP + (H - TOP - BOTTOM) * (hi - v) / (hi - lo);
  const kids = [svg("title", {}, p.name), svg("desc", {}, describe(p, points))];
  for (let t = 0; t <= 3; t++) {
    const v = lo + (hi - lo) * (t + 0.5) / 4;
    kids.push(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v) }), svg("text", { x: LEFT - 8, y: y(v) + 4, "text-anchor": "end" }, quantity(v, p.unit, digits, hi)));
  }
  for (const i of distinct([0, 1, 2, 3, 4].map((t) => Math.round((n - 1) * t / 4)))) kids.push(svg("text", { x: x(i), y: H - 6, "text-anchor": n > 1 && i === 0 ? "start" : n > 1 && i === n - 1 ? "end" : "middle" }, p.points[i][0].slice(0, 10)));
  if (p.pinned !== null) kids.push(svg("line", { class: "pinned", x1: LEFT, x2: W - RIGHT, y1: y(p.pinned), y2: y(p.pinned) }, svg("title", {}, "pinned baseline")), svg("text", { x: W - RIGHT, y: y(p.pinned) - 4, "text-anchor": "end" }, `pinned ${quantity(p.pinned, p.unit)}`));
  kids.push(svg("path", { class: "path", d: points.map((q, k) => `${k ? "L" : "M"}${x(q.i).toFixed(1)},${y(q.value).toFixed(1)}`).join("") }));
  kids.push(svg("g", { class: "points" },
    ...points.filter((q) => q.low !== null && q.high !== null).map((q) => svg("line", { class: "bar", x1: x(q.i), x2: x(q.i), y1: y(q.low), y2: y(q.high) })),
    ...points.map((q) => svg("circle", { class: "mark", cx: x(q.i), cy: y(q.value), r: n > 200 ? 2 : 3.5 }, svg("title", {}, label(p, q))))));
  p.change_points.forEach(([index, before, after], k) => {
    const at = x(index - 0.5), right = at > W - 280, worse = p.better !== "equal" && before !== after && (after > before) === (p.better === "lower");
    kids.push(svg("g", { class: p.better === "equal" ? "doubt" : worse ? "gone" : "come" }, svg("line", { class: "change", x1: at, x2: at, y1: 4, y2: H - BOTTOM }),
      svg("text", { class: "change-label", x: right ? at - 5 : at + 5, y: 13 + (k % 3) * 13, "text-anchor": right ? "end" : "start" }, step(p, before, after))));
  });
  const at = svg("circle", { class: "at", r: 6, visibility: "hidden" });
  return explore(p, svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0 }, ...kids, at), at, points, x, y, W);
}
function step(p, before, after) {
  const share = before && after !== null ? ` (${after >= before ? "+" : ""}${((after / before - 1) * 100).toFixed(1)}%)` : "";
  return `${quantity(before, p.unit)} → ${quantity(after, p.unit)}${share}`;
}
function label(p, q) {
  const between = q.low === null || q.high === null ? "" : `\n${quantity(q.low, p.unit)} to ${quantity(q.high, p.unit)}`;
  return `${quantity(q.value, p.unit, 6)}${between}\n${q.time}${q.commit ? `\ncommit ${q.commit.slice(0, 12)}` : ""}`;
}
function describe(p, points) {
  const changes = p.change_points.map(([index, before, after]) => `at ${p.points[index] ? p.points[index][0] : index}: ${step(p, before, after)}`);
  return `${points.length} points, the latest ${quantity(points[points.length - 1].value, p.unit)}. Change points: ${changes.join("; ") || "none"}.${p.pinned === null ? "" : ` Pinned baseline ${quantity(p.pinned, p.unit)}.`}`;
}
function explore(p, picture, at, points, x, y, width) {
  let k = points.length - 1;
  const mark = (place) => {
    const q = points[k], box = picture.getBoundingClientRect(), scale = box.width / width;
    fill(at, { cx: x(q.i), cy: y(q.value), visibility: "visible" }, []);
    tip(label(p, q), place ? place.clientX : box.left + x(q.i) * scale, place ? place.clientY : box.top + y(q.value) * scale);
  };
  const leave = () => { at.setAttribute("visibility", "hidden"); tip(""); };
  const moves = { ArrowLeft: () => k - 1, ArrowRight: () => k + 1, Home: () => 0, End: () => points.length - 1 };
  picture.addEventListener("pointermove", (e) => {
    const box = picture.getBoundingClientRect(), px = (e.clientX - box.left) * width / box.width;
    points.forEach((q, j) => { if (Math.abs(x(q.i) - px) < Math.abs(x(points[k].i) - px)) k = j; });
    mark(e);
  });
  picture.addEventListener("keydown", (e) => {
    if (e.key === "Escape") { leave(); return; }
    if (!Object.hasOwn(moves, e.key)) return;
    k = Math.max(0, Math.min(points.length - 1, moves[e.key]()));
    e.preventDefault();
    mark();
  });
  picture.addEventListener("focus", () => mark());
  picture.addEventListener("blur", leave);
  picture.addEventListener("pointerleave", leave);
  return picture;
}

head();
const parts = [["rows", rows.length, table], ["ratios", rows.some((r) => r.ratio), () => {}], ["diffs", D.comparison && D.comparison.diffs.length, diffs], ["history", D.plots.length, history]];
for (const [id, there, draw] of parts) {
  document.querySelector(`nav a[href="#${id}"]`).hidden = !there;
  $(id).hidden = !there;
  if (there) draw();
}
