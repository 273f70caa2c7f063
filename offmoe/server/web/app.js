// The chat: messages, what is asked with them, and the stream of the reply.

import { watchExperts } from "/static/experts.js";
import { renderMarkdown } from "/static/markdown.js";
import { readEvents } from "/static/sse.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"];
const KEPT = ["system", "api_key", ...NUMBERS];
let messages = [];
let running = null;
let watching = null;

function headers() {
  const key = $("api_key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function save() {
  sessionStorage.setItem("offmoe", JSON.stringify({
    messages: messages.map(({ role, content, reasoning, line }) => ({ role, content, reasoning, line })),
    settings: Object.fromEntries(KEPT.map((id) => [id, $(id).value])),
  }));
}

function restore() {
  let found = {};
  try { found = JSON.parse(sessionStorage.getItem("offmoe")) || {}; } catch { /* another version's */ }
  messages = found.messages || [];
  for (const [id, value] of Object.entries(found.settings || {})) if (KEPT.includes(id)) $(id).value = value;
}

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(label, action) {
  const made = make("button", "", label);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function draw() {
  const shown = messages.map(drawMessage);
  if (!shown.length) shown.push(make("p", "empty", "Nothing was said yet. What you write stays on this machine."));
  $("messages").replaceChildren(...shown);
  $("messages").scrollTop = $("messages").scrollHeight;
}

function drawMessage(message, at) {
  const box = make("article", `message ${message.role}`);
  box.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
  message.box = box;
  if (message.role === "user") box.append(make("div", "body", message.content));
  else {
    message.thought = make("details", "reasoning");
    message.thought.append(make("summary", "", "Reasoning"), make("div", "inner"));
    message.body = make("div", "body");
    box.append(message.thought, message.body);
    update(message);
  }
  const tools = make("div", "tools");
  if (message.role === "user") tools.append(button("Edit", () => edit(at)));
  else {
    if (at === messages.length - 1 && !running) tools.append(button("Retry", () => retry(at)));
    tools.append(button("Copy", () => navigator.clipboard.writeText(message.content)));
    message.note = make("span", message.isWrong ? "wrong" : "", message.line || "");
    tools.append(message.note);
  }
  box.append(tools);
  return box;
}

function update(message) {
  message.thought.hidden = !message.reasoning;
  if (message.reasoning) {
    renderMarkdown(message.reasoning, message.thought.lastChild);
    message.thought.firstChild.textContent = message.content ? "Reasoning" : "Reasoning ...";
  }
  renderMarkdown(message.content, message.body);
  message.body.classList.toggle("writing", running?.message === message);
}

function edit(at) {
  if (running) return;
  const area = make("textarea", "edit");
  area.value = messages[at].content;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the message");
  const send = () => {
    const text = area.value.trim();
    if (!text) return;
    messages = messages.slice(0, at);
    ask(text);
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
    if (event.key === "Escape") draw();
  });
  const tools = make("div", "tools");
  tools.append(button("Send", send), button("Cancel", draw));
  messages[at].box.replaceChildren(area, tools);
  area.focus();
}

function retry(at) {
  if (running) return;
  messages = messages.slice(0, at);
  answer();
}

function ask(text) {
  messages.push({ role: "user", content: text });
  answer();
}

function request() {
  // A reply that failed before its first word is shown with its reason, and not sent again.
  const said = messages.filter(({ role, content }) => role === "user" || content).map(({ role, content }) => ({ role, content }));
  const system = $("system").value.trim();
  const body = { messages: system ? [{ role: "system", content: system }, ...said] : said, stream: true };
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  return body;
}

async function answer() {
  const body = request();
  const message = { role: "assistant", content: "", reasoning: "", line: "" };
  messages.push(message);
  running = { control: new AbortController(), message };
  setRunning(true);
  draw();
  try {
    await receive(message, body, running.control.signal);
  } catch (error) {
    if (error.name === "AbortError") message.line = "stopped";
    else { message.line = error.message; message.isWrong = true; }
  }
  running = null;
  setRunning(false);
  draw();
  save();
}

async function receive(message, body, signal) {
  const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!reply.ok) throw new Error((await reply.json().catch(() => null))?.error?.message || `the server answers ${reply.status}`);
  let isDue = false;
  for await (const { data, comment } of readEvents(reply.body)) {
    if (comment) $("status").textContent = comment;
    if (!data || data === "[DONE]") continue;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    message.content += choice.delta.content || "";
    message.reasoning += choice.delta.reasoning_content || "";
    if (choice.finish_reason) message.line = summary(event.timings, choice.finish_reason);
    $("status").textContent = "";
    if (!isDue) {
      isDue = true;
      requestAnimationFrame(() => { isDue = false; show(message); });
    }
  }
}

function show(message) {
  const log = $("messages");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  update(message);
  if (follows) log.scrollTop = log.scrollHeight;
}

function summary(timings, reason) {
  if (!timings) return "cut by the server's end";
  const parts = [`${timings.predicted_n} tokens`];
  if (timings.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(1)} tok/s`);
  parts.push(`first token ${(timings.prompt_ms / 1000).toFixed(2)} s for ${timings.prompt_n + timings.cache_n} prompt tokens`);
  if (timings.cache_n) parts.push(`${timings.cache_n} kept`);
  parts.push(`hits ${Math.round(100 * timings.hit_rate)}%`, `${(timings.disk_bytes_per_token / 1e6).toFixed(1)} MB read a token`);
  if (reason === "length") parts.push("cut at the most tokens");
  return parts.join(" · ");
}

function setRunning(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("status").textContent = "";
  if (!is) $("input").focus();
}

function stop() {
  running?.control.abort();
}

function toggle(id, part) {
  const isHidden = !$(part).hidden;
  $(part).hidden = isHidden;
  $(id).setAttribute("aria-expanded", String(!isHidden));
  return !isHidden;
}

function watch() {
  watching?.abort();
  watching = new AbortController();
  watchExperts($("picture"), $("experts-line"), headers(), watching.signal).catch((error) => {
    if (error.name !== "AbortError") setTimeout(() => { if (!$("experts").hidden) watch(); }, 3000);
  });
}

async function greet() {
  try {
    const health = await (await fetch("/health")).json();
    if (health.status !== "ok") {
      $("model").textContent = health.message || health.status;
      setTimeout(greet, 1000);
      return;
    }
    const models = await fetch("/v1/models", { headers: headers() });
    if (models.status === 401) { $("model").textContent = `${health.model}: set the API key in the settings`; return; }
    const model = (await models.json()).data[0];
    $("model").textContent = `${model.id}, context of ${model.context_length} tokens`;
    if (!$("experts").hidden) watch();
  } catch {
    $("model").textContent = "the server is not reached";
    setTimeout(greet, 3000);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  ask(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); $("input").focus(); }
});
$("messages").addEventListener("click", (event) => {
  if (event.target.matches(".code .copy")) navigator.clipboard.writeText(event.target.parentElement.querySelector("code").textContent);
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", () => { stop(); messages = []; save(); draw(); $("input").focus(); });
$("toggle-settings").addEventListener("click", () => { if (toggle("toggle-settings", "settings")) $("system").focus(); });
$("toggle-experts").addEventListener("click", () => { if (toggle("toggle-experts", "experts")) watch(); else watching?.abort(); });
$("api_key").addEventListener("change", () => { save(); greet(); });
for (const id of KEPT) $(id).addEventListener("change", save);

restore();
if (window.matchMedia("(max-width: 720px)").matches) toggle("toggle-experts", "experts");
draw();
greet();
$("input").focus();
