// Streams a completion with early exits, then the same at full depth, and colours each token by the layer it left at.
"use strict";

const at = (id) => document.getElementById(id);
const model = { name: "", layers: 0, exits: [], hasTemplate: false };
const WAITING = "waiting…";
let stopping = null;

const headers = () => {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function asked(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

function complain(error) {
  at("error").textContent = error.message;
  at("error").hidden = false;
}

function paint(element, layer) {
  const isEarly = layer < model.layers;
  element.classList.add(isEarly ? "early" : "whole");
  if (isEarly) element.style.setProperty("--depth", layer / model.layers);
}

async function load() {
  const [models, exits] = await Promise.all([asked("v1/models"), asked("v1/exits")]);
  model.name = (await models.json()).data[0].id;
  const told = await exits.json();
  Object.assign(model, { layers: told.num_layers, exits: told.exit_layers, hasTemplate: told.has_chat_template });
  at("model").textContent = `${model.name}: ${model.layers} layers, exits after ${model.exits.join(", ") || "none"}`;
  at("legend").replaceChildren(...[...model.exits.filter((layer) => layer < model.layers), model.layers].map((layer) => {
    const mark = document.createElement("span");
    mark.textContent = layer < model.layers ? `layer ${layer}` : `layer ${layer}, the end`;
    paint(mark, layer);
    return mark;
  }));
  const chat = document.querySelector("input[value=chat]");
  chat.disabled = !model.hasTemplate;
  chat.parentElement.title = model.hasTemplate ? "" : "the model has no chat template";
  for (const id of ["policy", "threshold"]) at(id).disabled = !model.exits.length;
  const first = Object.values(told.default.exit_thresholds)[0];
  if (first !== undefined && first <= 1) at("threshold").value = first;
  showThreshold();
  at("error").hidden = true;
}

function showThreshold() {
  at("threshold-value").value = Number(at("threshold").value).toFixed(2);
  at("threshold").disabled = !model.exits.length || at("policy").value !== "threshold";
}

function request(policy) {
  const isChat = document.querySelector("input[name=mode]:checked").value === "chat";
  const body = { model: model.name, max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value) };
  Object.assign(body, { seed: 0, stream: true, return_exit_layers: true, ...policy });
  const text = at("text").value;
  return isChat
    ? ["v1/chat/completions", { ...body, messages: [{ role: "user", content: text }] }]
    : ["v1/completions", { ...body, prompt: text }];
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function show(name, policy) {
  const [path, body] = request(policy);
  const text = at(name), figures = at(`${name}-figures`);
  const layers = [];
  text.replaceChildren();
  figures.textContent = WAITING;
  const began = performance.now();
  const answer = await asked(path, { method: "POST", body: JSON.stringify(body), signal: stopping.signal });
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (!choice?.exit_layers) continue;
    const [layer] = choice.exit_layers;
    layers.push(layer);
    const said = choice.text ?? choice.delta?.content ?? "";
    if (said) {
      const token = document.createElement("span");
      token.className = "token";
      token.textContent = said;
      token.title = `layer ${layer} of ${model.layers}, confidence ${choice.confidences[0].toFixed(3)}`;
      paint(token, layer);
      text.append(token);
      text.scrollTop = text.scrollHeight;
    }
    const seconds = (performance.now() - began) / 1000; // from the request on: a burst of chunks has no speed of its own
    const speed = `${seconds.toFixed(1)} s · ${(layers.length / seconds).toFixed(1)} tokens/s`;
    const depth = layers.reduce((sum, each) => sum + each, 0) / layers.length;
    figures.textContent = `${layers.length} tokens in ${speed} · mean depth ${depth.toFixed(1)} of ${model.layers}`;
  }
}

async function run() {
  if (stopping) return;
  stopping = new AbortController();
  at("run").disabled = true;
  at("stop").disabled = false;
  at("error").hidden = true;
  try {
    if (!model.name) await load();
    const isThreshold = at("policy").value === "threshold";
    const early = isThreshold ? { exit_threshold: Number(at("threshold").value) } : { policy: "speculative" };
    for (const id of ["early", "full"]) at(id).replaceChildren();
    at("full-figures").textContent = "–";
    await show("early", model.exits.length ? early : { policy: "full" });
    await show("full", { policy: "full" }); // one after the other: neither slows the other down
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
    for (const id of ["early-figures", "full-figures"]) if (at(id).textContent === WAITING) at(id).textContent = "–";
  } finally {
    stopping = null;
    at("run").disabled = false;
    at("stop").disabled = true;
  }
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
at("stop").addEventListener("click", () => stopping?.abort());
at("threshold").addEventListener("input", showThreshold);
at("policy").addEventListener("change", showThreshold);
at("key").addEventListener("change", () => load().catch(complain));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  if (event.key === "Escape") stopping?.abort();
});
load().catch((error) => { at("model").textContent = ""; complain(error); });
