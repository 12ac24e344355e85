// options.js - the system prompt and how to sample. Sampling is remembered by the browser; so is the prompt that new sessions begin
// with, while a session that has one shows its own.

import {byId, recall, remember} from "./dom.js";

const fields = ["temperature", "top_p", "max_tokens", "seed"];
const system = byId("system");
let shown = null; // the session whose prompt is shown

function stored() {
  try {
    return JSON.parse(recall("options")) || {};
  } catch {
    return {};
  }
}

function keep() {
  const options = stored();
  for (const name of fields) options[name] = byId(name).value;
  if (shown === null) options.system = system.value;
  remember("options", JSON.stringify(options));
}

export function showSystemPrompt(name, prompt) {
  shown = prompt === undefined ? null : name;
  system.value = prompt === undefined ? stored().system || "" : prompt;
}

export const systemPrompt = () => system.value.trim();

// Fields of a request; what is left empty is the server's to choose.
export function samplingOptions() {
  const options = {};
  for (const name of fields) if (byId(name).value !== "") options[name] = Number(byId(name).value);
  return options;
}

const options = stored();
for (const name of fields) byId(name).value = options[name] || "";
byId("options").addEventListener("input", keep);
