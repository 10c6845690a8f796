"use strict";
// Text of the model and of errors goes into text nodes alone; nothing here writes markup.
const $ = (id) => document.getElementById(id);
const KEPT = "tilewright.key"; // in sessionStorage: gone with the tab
const EVERY = 1000; // ms between two looks at the figures
const SHOWN = 60; // looks that a chart holds
const SVG = "http://www.w3.org/2000/svg";
const grouped = new Intl.NumberFormat("en");
const chat = { messages: [], asking: null, failed: null };

function made(tag, parent, name, text) {
  const found = document.createElement(tag);
  if (name) found.className = name;
  if (text !== undefined) found.textContent = text;
  parent.append(found);
  return found;
}

/* The server */

class Refusal extends Error {
  constructor(status, message, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

function headers() {
  const key = $("key").value.trim();
  const json = { "Content-Type": "application/json" };
  return key ? { ...json, Authorization: `Bearer ${key}` } : json;
}

async function asked(path, body, signal) {
  const method = body ? "POST" : "GET";
  let answer;
  try {
    answer = await fetch(path, { method, headers: headers(), signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  const message = said?.error?.message ?? `The server answered with status ${answer.status}.`;
  throw new Refusal(answer.status, message, Number(answer.headers.get("Retry-After")) || 0);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal(0, "The answer broke off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Refusal(500, piece.error.message);
      yield piece;
    }
  }
}

async function models() {
  const found = (await (await asked("v1/models")).json()).data.map((one) => one.id);
  $("model").replaceChildren();
  for (const name of found) made("option", $("model"), "", name).value = name;
  $("model").hidden = found.length < 2;
  $("served").textContent = found.length < 2 ? found[0] ?? "" : "";
  $("served").title = $("served").textContent;
}

/* The conversation */

function turn(kind, who, text) {
  $("empty").hidden = true;
  const article = made("article", $("log"), kind);
  made("h3", article, "", who);
  made("div", article, "text").append(document.createTextNode(text));
  return article;
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function toEnd() {
  $("log").scrollTop = $("log").scrollHeight;
}

function busy(article) {
  const writing = Boolean(article);
  $("send").hidden = writing;
  $("stop").hidden = !writing;
  $("log").setAttribute("aria-busy", String(writing));
}

function request() {
  const system = $("system").value.trim();
  return {
    model: $("model").value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...chat.messages],
    temperature: Number($("temperature").value),
    max_tokens: Number($("most").value),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function read(article, signal) {
  const body = request();
  const text = article.querySelector(".text").firstChild;
  const began = performance.now();
  const found = { first: 0, tokens: 0, reason: "" };
  for await (const piece of events(await asked("v1/chat/completions", body, signal))) {
    const [choice] = piece.choices;
    if (piece.usage) found.tokens = piece.usage.completion_tokens;
    if (!choice) continue;
    found.first ||= performance.now();
    found.reason = choice.finish_reason ?? found.reason;
    if (!choice.delta.content) continue;
    const follows = atEnd();
    text.appendData(choice.delta.content);
    if (follows) toEnd();
  }
  return about(found, began, performance.now());
}

function about({ first, tokens, reason }, began, ended) {
  const parts = [`${grouped.format(tokens)} token${tokens === 1 ? "" : "s"}`];
  if (first) parts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  if (tokens > 1) parts.push(`then ${((tokens - 1) * 1000 / Math.max(1, ended - first)).toFixed(1)} tok/s`);
  if (reason === "length") parts.push("cut at its longest");
  return parts.join(", ");
}

async function answer() {
  const asking = new AbortController();
  const article = turn("answered writing", $("served").textContent || $("model").value || "Answer", "");
  const kept = chat.messages;
  chat.asking = asking;
  chat.failed = null;
  busy(article);
  toEnd();
  try {
    made("p", article, "about", await read(article, asking.signal));
    $("said").textContent = "The answer is complete.";
  } catch (error) {
    if (error.name === "AbortError") {
      made("p", article, "about", "Stopped.");
      $("said").textContent = "Stopped.";
    } else {
      fault(article, error);
    }
  } finally {
    article.classList.remove("writing");
    const text = article.querySelector(".text").textContent;
    if (text) kept.push({ role: "assistant", content: text });
    if (chat.asking === asking) {
      chat.asking = null;
      busy(null);
      $("question").focus();
    }
    if (atEnd()) toEnd();
  }
}

function fault(article, error) {
  console.warn(error);
  chat.failed = { article, status: error.status };
  const box = made("div", article, "bad");
  made("span", box).setAttribute("role", "alert");
  box.firstChild.textContent = error instanceof Refusal ? error.message : `The page failed: ${error.message}`;
  const again = made("button", box, "", "Try again");
  again.type = "button";
  if (error.status === 401) {
    again.textContent = "Give the key";
    again.addEventListener("click", () => settle("The server asks for a key."));
  } else {
    again.addEventListener("click", retry);
    if (error.wait) wait(again, error.wait);
  }
}

function wait(button, seconds) {
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
  if (seconds > 0) setTimeout(wait, 1000, button, seconds - 1);
}

function retry() {
  if (chat.asking || !chat.failed) return;
  chat.failed.article.remove();
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop(); // what came before it failed
  answer();
}

function send() {
  const question = $("question").value.trim();
  if (!question || chat.asking) return;
  $("question").value = "";
  grow();
  chat.failed?.article.querySelector("button")?.remove(); // it is too late for that
  chat.messages.push({ role: "user", content: question });
  turn("asked", "You", question);
  answer();
}

function stop() {
  chat.asking?.abort();
}

function fresh() {
  stop();
  chat.messages = [];
  chat.failed = null;
  for (const article of $("log").querySelectorAll("article")) article.remove();
  $("empty").hidden = false;
  $("question").focus();
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  $("send").disabled = !box.value.trim();
}

/* Settings */

function settle(wrong) {
  $("wrong").textContent = wrong ?? "";
  $("wrong").hidden = !wrong;
  if (!$("settings").open) $("settings").showModal();
  (wrong ? $("key") : $("system")).focus();
}

async function settled() {
  const key = $("key").value.trim();
  if (key === (sessionStorage.getItem(KEPT) ?? "")) return;
  if (key) sessionStorage.setItem(KEPT, key);
  else sessionStorage.removeItem(KEPT);
  if (await named() && chat.failed?.status === 401) retry();
}

async function named() {
  try {
    await models();
    return true;
  } catch (error) {
    if (error.status === 401) settle($("key").value ? "The server does not take this key." : "The server asks for a key.");
    return false;
  }
}

/* Live figures */

const past = { rate: [], batch: [], pages: [] };
let last = null;

function chart(name, value) {
  const values = past[name];
  values.push(value);
  if (values.length > SHOWN) values.shift();
  const top = Math.max(1, ...values) * 1.15;
  const begin = SHOWN - values.length;
  const points = values.map((one, i) => `${begin + i},${(100 - 96 * one / top).toFixed(1)}`);
  const svg = $(`${name}-chart`);
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${SHOWN - 1} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    for (const kind of ["polygon", "polyline"]) svg.append(document.createElementNS(SVG, kind));
    svg.firstChild.setAttribute("class", "area");
    svg.lastChild.setAttribute("class", "line");
  }
  svg.firstChild.setAttribute("points", `${begin},100 ${points.join(" ")} ${SHOWN - 1},100`);
  svg.lastChild.setAttribute("points", points.join(" "));
}

function show(now) {
  const since = last && now.uptime > last.uptime ? last : null; // another server, if it is younger
  const rate = since ? (now.generated_tokens - since.generated_tokens) / (now.uptime - since.uptime) : 0;
  $("rate").textContent = rate >= 100 ? grouped.format(Math.round(rate)) : rate.toFixed(rate ? 1 : 0);
  $("running").textContent = grouped.format(now.running);
  $("waiting").textContent = grouped.format(now.waiting);
  $("pages").textContent = grouped.format(now.pages_used);
  $("all-pages").textContent = grouped.format(now.pages);
  $("generated").textContent = grouped.format(now.generated_tokens);
  $("reused").textContent = now.prompt_tokens ? `${Math.round(100 * now.cached_tokens / now.prompt_tokens)}%` : "–";
  $("context").textContent = `${grouped.format(now.max_model_len)} tokens`;
  $("uptime").textContent = lasting(now.uptime);
  chart("rate", rate);
  chart("batch", now.running);
  chart("pages", now.pages_used);
  last = now;
}

function lasting(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

function light(kind, text) {
  $("light").className = kind;
  if ($("state").textContent !== text) $("state").textContent = text;
}

async function look() {
  try {
    const now = await (await asked("stats")).json();
    show(now);
    light(now.draining ? "" : "ready", now.draining ? "ending" : "ready");
  } catch (error) {
    light("gone", error.status ? "no figures" : "not reachable");
  }
  setTimeout(look, EVERY);
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("settings").open) stop(); });
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", fresh);
$("set").addEventListener("click", () => settle());
$("settings").addEventListener("close", settled);
for (const idea of document.querySelectorAll(".idea")) idea.addEventListener("click", () => { $("question").value = idea.textContent; send(); });

$("key").value = sessionStorage.getItem(KEPT) ?? "";
grow();
named();
look();
