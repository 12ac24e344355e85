// chat.js - conversations: what was said, saying more, answers as they arrive.
//
// A conversation keeps its own elements, so that an answer goes on arriving while another conversation is looked at. What the
// server keeps of a session is what was sent last and its answer; to edit or to ask again is to send fewer messages.

import {request, stream} from "./api.js";
import {announce, byId, copy, iconButton, make, one, say, whole} from "./dom.js";
import {show} from "./markdown.js";
import {samplingOptions, systemPrompt} from "./options.js";

const log = byId("log"), scroll = byId("scroll"), input = byId("message"), sendButton = byId("send");
const conversations = new Map();
let current = null;
let changed = () => {};   // told of whatever the list of sessions shows
let titleOf = () => null; // of a session, by name

export function connectChat(onChange, findTitle) {
  changed = onChange;
  titleOf = findTitle;
}

export const currentName = () => (current ? current.name : null);
export const isAnswering = () => Boolean(current && current.controller);

// ---- conversations ----

function newName() {
  const letters = "abcdefghijkmnpqrstuvwxyz23456789";
  return "chat-" + Array.from(crypto.getRandomValues(new Uint8Array(10)), (b) => letters[b % letters.length]).join("");
}

function makeConversation(name, exists) {
  const conversation = {name, exists, messages: [], controller: null, failure: null, element: make("div", {class: "messages"})};
  conversations.set(name, conversation);
  return conversation;
}

// Everything that can be shown of a message's content, which may be a list of parts.
function textOf(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content.map((part) => part.text || "").join("");
}

const sameMessages = (ours, theirs) =>
  theirs.every((message, i) => ours[i] && ours[i].role === message.role && ours[i].text === textOf(message.content)) &&
  (ours.length === theirs.length || (ours.length === theirs.length + 1 && Boolean(ours[theirs.length].stopped)));

function take(conversation, messages) {
  const system = messages.find((message) => message.role === "system" || message.role === "developer");
  conversation.system = system ? textOf(system.content) : "";
  const rest = messages.filter((message) => message !== system);
  if (sameMessages(conversation.messages, rest)) return;
  conversation.messages = rest.map((message) => ({role: message.role, text: textOf(message.content), raw: message,
                                                  reasoning: message.reasoning_content || "", calls: message.tool_calls || []}));
  conversation.failure = null;
  render(conversation);
}

function display(conversation) {
  current = conversation;
  log.replaceChildren(conversation.element);
  render(conversation);
  showState();
  follow = true;
  toEnd();
}

export function openNew() {
  opening++;
  display(makeConversation(newName(), false));
}

let opening = 0; // counts: of several that are being fetched the last one is shown

// "shown"; "gone": there is no such session; "late": another was asked for meanwhile.
export async function open(name) {
  const mine = ++opening;
  const conversation = conversations.get(name) || makeConversation(name, true);
  if (!conversation.controller && conversation.exists) {
    try {
      take(conversation, (await request("GET", "v1/sessions/" + encodeURIComponent(name))).messages);
    } catch (error) {
      if (error.status === 404) {
        conversations.delete(name);
        return mine === opening ? "gone" : "late";
      }
      conversation.failure = {text: error.message, again: () => open(name)};
    }
  }
  if (mine !== opening) return "late";
  display(conversation);
  return "shown";
}

export function renamed(from, to) {
  const conversation = conversations.get(from);
  if (!conversation) return;
  conversations.delete(from);
  conversation.name = to;
  conversations.set(to, conversation);
}

export function forget(name) {
  const conversation = conversations.get(name);
  if (conversation && conversation.controller) conversation.controller.abort();
  conversations.delete(name);
}

export const systemOf = () => (current ? current.system : undefined);

// ---- rendering ----

function wordsOf(message) {
  const stats = message.stats;
  const words = [];
  if (message.stopped) words.push("stopped");
  if (message.finish === "length") words.push("cut off at the limit of tokens");
  if (!stats) return words;
  words.push(one(stats.generated, "token"));
  if (stats.perSecond) words.push((stats.perSecond < 100 ? stats.perSecond.toFixed(1) : whole(stats.perSecond)) + " tokens/s");
  if (stats.first) words.push("first after " + (stats.first < 1 ? (1000 * stats.first).toFixed(0) + " ms" : stats.first.toFixed(1) + " s"));
  words.push("prompt: " + whole(stats.reused) + " reused, " + whole(stats.prompt - stats.reused) + " computed");
  return words;
}

function callElement(call) {
  const f = call.function || {};
  return make("div", {class: "call"}, make("span", {class: "call-name"}, f.name || ""), make("code", {}, f.arguments || ""));
}

function buildAnswer(conversation, message) {
  message.body = make("div", {class: "markdown"});
  message.thoughts = make("details", {class: "thoughts", hidden: true}, make("summary", {}, "Thoughts"), make("div", {class: "plain-text"}));
  message.callList = make("div", {class: "calls"});
  message.note = make("span", {class: "note quiet"});
  const copyButton = iconButton("copy", "Copy the answer", () => copy(message.text, copyButton));
  message.tools = make("div", {class: "tools"}, copyButton, iconButton("again", "Answer again", () => again(conversation, message)), message.note);
  message.node = make("article", {class: "answer", "aria-label": "Answer"}, message.thoughts, message.body, message.callList, message.tools);
}

function paintAnswer(conversation, message) {
  const live = conversation.controller && message === conversation.messages[conversation.messages.length - 1];
  show(message.body, message.text);
  message.thoughts.hidden = !message.reasoning;
  say(message.thoughts.lastChild, message.reasoning);
  // Thoughts are shown while there is nothing else; what the reader does with them later stays.
  if (!message.settled) message.thoughts.open = Boolean(live && message.reasoning && !message.text);
  if (message.text) message.settled = true;
  if (message.callList.childElementCount !== message.calls.length || live) message.callList.replaceChildren(...message.calls.map(callElement));
  message.node.classList.toggle("live", Boolean(live));
  message.node.classList.toggle("empty", !message.text && !message.reasoning && !message.calls.length);
  message.tools.hidden = Boolean(live);
  say(message.note, wordsOf(message).join("  ·  "));
}

function buildQuestion(conversation, message) {
  const bubble = make("div", {class: "bubble plain-text"}, message.text);
  const copyButton = iconButton("copy", "Copy the message", () => copy(message.text, copyButton));
  const tools = make("div", {class: "tools"}, iconButton("edit", "Edit and send again", () => edit(conversation, message)), copyButton);
  message.node = make("article", {class: "question", "aria-label": "You"}, bubble, tools);
}

function buildOther(message) {
  message.node = make("article", {class: "result", "aria-label": message.role},
                      make("details", {}, make("summary", {}, message.role === "tool" ? "Result of a call" : message.role),
                           make("div", {class: "plain-text"}, message.text)));
}

function greeting() {
  return make("div", {class: "greeting"}, make("p", {class: "large"}, "What is on your mind?"),
              make("p", {class: "quiet"}, "A session keeps what was said and what the model made of it. Come back to it or fork it, and it goes on from there."));
}

function failureElement(conversation) {
  const {text, code, again: retry} = conversation.failure;
  return make("div", {class: "failure", role: "alert"}, make("span", {class: "plain-text"}, text, code ? make("code", {}, code) : null),
              make("button", {type: "button", class: "plain", on: {click: () => retry()}}, "Try again"));
}

function render(conversation) {
  const nodes = [];
  for (const message of conversation.messages) {
    if (!message.node && message.role === "assistant") buildAnswer(conversation, message);
    else if (!message.node && message.role === "user") buildQuestion(conversation, message);
    else if (!message.node) buildOther(message);
    if (message.role === "assistant") paintAnswer(conversation, message);
    nodes.push(message.node);
  }
  if (!nodes.length && !conversation.failure) nodes.push(greeting());
  const last = conversation.messages[conversation.messages.length - 1];
  if (conversation.failure) nodes.push(failureElement(conversation));
  else if (last && last.role === "user" && !conversation.controller)
    nodes.push(make("div", {class: "unanswered quiet"}, "No answer was kept. ",
                    make("button", {type: "button", class: "plain", on: {click: () => answer(conversation)}}, "Answer")));
  const places = conversation.element;
  nodes.forEach((node, i) => { if (places.children[i] !== node) places.insertBefore(node, places.children[i] || null); });
  while (places.children.length > nodes.length) places.lastElementChild.remove();
  if (conversation === current) showState();
}

// What belongs to the conversation outside of its elements.
export function showState() {
  if (!current) return;
  const title = titleOf(current.name) || (current.messages.length ? firstLine(current) : "New session");
  say(byId("title"), title);
  document.title = title + " – OSCAR";
  const answering = Boolean(current.controller);
  const name = answering ? "Stop" : "Send";
  sendButton.setAttribute("aria-label", name);
  sendButton.title = name;
  sendButton.classList.toggle("stop", answering);
  sendButton.querySelector("use").setAttribute("href", answering ? "#i-stop" : "#i-send");
  sendButton.disabled = !answering && !input.value.trim();
}

const firstLine = (conversation) => ((conversation.messages.find((m) => m.role === "user") || {}).text || "").split("\n")[0].slice(0, 80);

// ---- following what arrives ----

let follow = true;

function toEnd() {
  if (follow) scroll.scrollTop = scroll.scrollHeight;
  showJump();
}

function showJump() {
  byId("jump").hidden = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120;
}

scroll.addEventListener("scroll", () => {
  follow = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
  showJump();
}, {passive: true});

byId("jump").addEventListener("click", () => {
  follow = true;
  toEnd();
  input.focus();
});

new ResizeObserver(toEnd).observe(scroll);

// ---- answers ----

// As the server takes it.
function asSent(message) {
  if (message.raw) return message.raw;
  const sent = {role: message.role, content: message.text};
  if (message.calls && message.calls.length) {
    sent.tool_calls = message.calls;
    if (!message.text) sent.content = null;
  }
  return sent;
}

function takeCall(message, piece) {
  const call = message.calls[piece.index] || (message.calls[piece.index] = {id: "", type: "function", function: {name: "", arguments: ""}});
  if (piece.id) call.id = piece.id;
  if (piece.function && piece.function.name) call.function.name += piece.function.name;
  if (piece.function && piece.function.arguments) call.function.arguments += piece.function.arguments;
}

function takeChunk(message, chunk, times) {
  const choice = chunk.choices && chunk.choices[0];
  if (choice) {
    const delta = choice.delta || {};
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      times.last = performance.now();
      times.first = times.first || times.last;
    }
    message.text += delta.content || "";
    message.reasoning += delta.reasoning_content || "";
    for (const piece of delta.tool_calls || []) takeCall(message, piece);
    if (choice.finish_reason) message.finish = choice.finish_reason;
  }
  if (chunk.usage) {
    const usage = chunk.usage, details = usage.prompt_tokens_details || {}, seconds = (times.last - times.first) / 1000;
    message.stats = {generated: usage.completion_tokens, prompt: usage.prompt_tokens, reused: details.cached_tokens || 0,
                     perSecond: usage.completion_tokens > 1 && seconds > 0 ? (usage.completion_tokens - 1) / seconds : 0,
                     first: times.first ? (times.first - times.sent) / 1000 : 0};
  }
}

// Asks for an answer to what the conversation holds.
async function answer(conversation) {
  if (conversation.controller) return;
  const system = conversation === current ? systemPrompt() : conversation.system || "";
  const messages = conversation.messages.map(asSent);
  if (system) messages.unshift({role: "system", content: system});
  const message = {role: "assistant", text: "", reasoning: "", calls: []};
  const times = {sent: performance.now()};
  conversation.system = system;
  conversation.failure = null;
  conversation.messages.push(message);
  conversation.controller = new AbortController();
  follow = follow || conversation === current;
  render(conversation);
  toEnd();

  let due = 0;
  const paint = () => {
    due = 0;
    paintAnswer(conversation, message);
    if (conversation === current) toEnd();
  };
  try {
    const body = {messages, stream: true, stream_options: {include_usage: true}, session: conversation.name, ...samplingOptions()};
    await stream("v1/chat/completions", body, conversation.controller.signal, (chunk) => {
      if (!conversation.exists) {
        conversation.exists = true;
        changed(conversation.name, conversation.exists);
      }
      takeChunk(message, chunk, times);
      due = due || requestAnimationFrame(paint);
    });
    announce("The answer is complete.");
  } catch (error) {
    message.stopped = true;
    if (error.name === "AbortError") announce("Stopped.");
    else conversation.failure = {text: error.message, code: error.code, again: () => retry(conversation, message)};
  }
  cancelAnimationFrame(due);
  conversation.controller = null;
  if (message.stopped && !message.text && !message.reasoning && !message.calls.length) conversation.messages.pop();
  render(conversation);
  if (conversation === current) toEnd();
  changed(conversation.name, conversation.exists);
}

function retry(conversation, message) {
  const at = conversation.messages.indexOf(message);
  if (at >= 0) conversation.messages.length = at;
  return answer(conversation);
}

function again(conversation, message) {
  if (conversation.controller) return;
  conversation.messages.length = conversation.messages.indexOf(message);
  answer(conversation);
}

export function stop() {
  if (!isAnswering()) return false;
  current.controller.abort();
  return true;
}

// ---- saying ----

function edit(conversation, message) {
  if (conversation.controller) return;
  const area = make("textarea", {"aria-label": "Edit the message", rows: "1"});
  area.value = message.text;
  const leave = () => form.replaceWith(message.node);
  const submit = () => {
    const text = area.value.trim();
    if (!text || conversation.controller) return;
    conversation.messages.length = conversation.messages.indexOf(message);
    conversation.messages.push({role: "user", text});
    form.remove();
    answer(conversation);
    input.focus();
  };
  const form = make("div", {class: "edit"}, area,
                    make("div", {class: "actions"}, make("button", {type: "button", on: {click: leave}}, "Cancel"),
                         make("button", {type: "button", class: "primary", on: {click: submit}}, "Send")));
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      leave();
      message.node.querySelector("button").focus();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  message.node.replaceWith(form);
  grow(area);
  area.focus();
}

// As high as its text, up to what the style allows.
function grow(area) {
  area.style.height = "auto";
  area.style.height = area.scrollHeight + area.offsetHeight - area.clientHeight + "px";
}

function sendInput() {
  const text = input.value.trim();
  if (!text || !current || current.controller) return;
  input.value = "";
  grow(input);
  follow = true;
  current.messages.push({role: "user", text});
  answer(current);
}

sendButton.addEventListener("click", () => {
  if (!stop()) sendInput();
  input.focus();
});

input.addEventListener("input", () => {
  grow(input);
  showState();
});

input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  sendInput();
});
