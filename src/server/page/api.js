// api.js - requests to the server: the API key, errors in the server's words, a lost connection that is found again.

import {ask, byId} from "./dom.js";

export class ServerError extends Error {
  constructor(status, body) {
    super((body && body.error && body.error.message) || "The server answered with status " + status + ".");
    this.status = status;
    this.code = (body && body.error && body.error.code) || "";
  }
}

export class ConnectionError extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

// ---- the connection ----

const watchers = [];
let connected = true;

export function onConnection(watcher) {
  watchers.push(watcher);
}

function setConnected(now) {
  if (connected === now) return;
  connected = now;
  for (const watcher of watchers) watcher(now);
  if (!now) look(1000);
}

// Asks after the server until it answers.
function look(wait) {
  setTimeout(async () => {
    try {
      await fetch("health", {cache: "no-store"});
      setConnected(true);
    } catch {
      look(Math.min(8000, wait * 1.5));
    }
  }, wait);
}

export const isConnected = () => connected;

// ---- the key ----

// The key lives as long as the tab, and outlives a reload where the browser allows that.
const keyName = "oscar-key";
let key = null;
try {
  key = sessionStorage.getItem(keyName);
} catch { /* it may not be kept */ }

function setKey(given) {
  key = given;
  try {
    sessionStorage.setItem(keyName, given);
  } catch { /* as above */ }
}

let asking = null; // one question, whoever asks
let refused = false;

// Whether somebody left the question for a key unanswered: what asks by itself then waits.
export const keyIsMissing = () => refused;

async function askForKey(reason) {
  byId("key-reason").textContent = reason;
  byId("key").value = "";
  const given = await ask(byId("key-dialog"));
  if (given) setKey(byId("key").value.trim());
  refused = !given;
  return given;
}

export function needKey(reason) {
  asking = asking || askForKey(reason).finally(() => { asking = null; });
  return asking;
}

// ---- requests ----

async function send(method, path, body, signal) {
  const headers = {}, used = key;
  if (used) headers.Authorization = "Bearer " + used;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body)});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setConnected(false);
    throw new ConnectionError();
  }
  setConnected(true);
  if (answer.ok) return answer;
  const text = await answer.text().catch(() => "");
  let told = null;
  try {
    told = JSON.parse(text);
  } catch { /* somebody between us and the server answered in another form */ }
  const error = new ServerError(answer.status, told);
  error.key = used;
  throw error;
}

// The answer of the server; a key that is needed is asked for, until there is one it knows.
async function reach(method, path, body, signal) {
  for (;;) {
    try {
      return await send(method, path, body, signal);
    } catch (error) {
      if (!(error instanceof ServerError) || error.status !== 401) throw error;
      // Another request may have got a key meanwhile.
      if (error.key !== key) continue;
      if (refused && !asking && method === "GET") throw error;
      if (!await needKey(error.message)) throw error;
    }
  }
}

export async function request(method, path, body) {
  return (await reach(method, path, body)).json();
}

// Server-sent events of an answer: calls take(object) for each, until [DONE].
export async function stream(path, body, signal, take) {
  const answer = await reach("POST", path, body, signal);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      setConnected(false);
      throw new ConnectionError();
    }
    if (piece.done) throw new Error("The answer ended before it was complete.");
    rest += decoder.decode(piece.value, {stream: true});
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new ServerError(answer.status, told);
      take(told);
    }
  }
}
