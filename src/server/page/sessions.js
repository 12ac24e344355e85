// sessions.js - the list of sessions: where each is, how much it holds, and what can be done with it.

import {request} from "./api.js";
import {ask, byId, bytes, icon, make, one, say, short, toast, whole} from "./dom.js";

const list = byId("sessions"), menu = byId("session-menu"), filter = byId("filter"), note = byId("sessions-note");
const places = {device: "on the device", host: "in host memory", disk: "on disk", running: "running"};
const rows = new Map(); // by name: {element, entry, ...}
let entries = [];
let actions = {};       // {open(name), openNew(), current(), reload(name), renamed(from, to), deleted(name), shown()}
let refreshing = null;

const path = (name, rest = "") => "v1/sessions/" + encodeURIComponent(name) + rest;
const labelOf = (entry) => entry.title || entry.id;

export const titleOf = (name) => {
  const entry = entries.find((e) => e.id === name);
  return entry ? labelOf(entry) : null;
};
export const isListed = (name) => entries.some((e) => e.id === name);

export function connectSessions(given) {
  actions = given;
}

// ---- the list ----

const sizeOf = (entry) => {
  const b = entry.bytes || {};
  return (b.device || 0) + (b.host || 0) || b.disk || 0;
};

function detail(entry) {
  const b = entry.bytes || {};
  const parts = [labelOf(entry), "called " + entry.id + ", " + places[entry.tier], one(entry.tokens, "token"),
                 one(entry.exact_pages, "exact page") + ", " + whole(entry.coded_pages) + " coded"];
  for (const [name, word] of [["device", "on the device"], ["host", "in host memory"], ["disk", "on disk"]])
    if (b[name]) parts.push(bytes(b[name]) + " " + word);
  return parts.join("\n");
}

function makeRow(name) {
  const row = {name};
  row.title = make("span", {class: "session-title"});
  row.tier = make("span", {class: "tier"});
  row.size = make("span", {class: "session-size"});
  row.button = make("button", {type: "button", class: "session-open", on: {click: () => actions.open(row.name)}},
                    row.title, make("span", {class: "session-about quiet"}, row.tier, row.size));
  row.more = make("button", {type: "button", class: "icon small session-more", "aria-haspopup": "menu", "aria-expanded": "false",
                             on: {click: () => openMenu(row)}}, icon("more"));
  row.element = make("li", {class: "session"}, row.button, row.more);
  return row;
}

function paintRow(row, entry) {
  row.entry = entry;
  say(row.title, labelOf(entry));
  row.tier.className = "tier " + entry.tier;
  say(row.tier, entry.tier);
  say(row.size, entry.tokens ? short(entry.tokens) + " tokens" + (sizeOf(entry) ? ", " + bytes(sizeOf(entry)) : "") : "nothing yet");
  row.button.title = detail(entry);
  row.more.setAttribute("aria-label", "What to do with " + labelOf(entry));
  if (entry.id === actions.current()) row.button.setAttribute("aria-current", "true");
  else row.button.removeAttribute("aria-current");
}

export function paint() {
  const words = filter.value.trim().toLowerCase();
  const shown = entries.filter((e) => !words || (labelOf(e) + " " + e.id).toLowerCase().includes(words));
  for (const name of [...rows.keys()]) if (!shown.some((e) => e.id === name)) {
    rows.get(name).element.remove();
    rows.delete(name);
  }
  shown.forEach((entry, i) => {
    if (!rows.has(entry.id)) rows.set(entry.id, makeRow(entry.id));
    const row = rows.get(entry.id);
    paintRow(row, entry);
    if (list.children[i] !== row.element) list.insertBefore(row.element, list.children[i] || null);
  });
  note.hidden = shown.length > 0;
  say(note, words ? "No session has these words." : "What you say is kept here as sessions.");
}

export function refresh() {
  refreshing = refreshing || request("GET", "v1/sessions").then((answer) => {
    entries = answer.data;
    paint();
    actions.shown();
  }).finally(() => { refreshing = null; });
  return refreshing;
}

// What the picture of the cache says of them; names that are not known here are fetched.
export function update(seen) {
  for (const now of seen) {
    const entry = entries.find((e) => e.id === now.id);
    if (!entry) return refresh().catch(() => {});
    Object.assign(entry, now);
  }
  if (entries.some((e) => e.tokens && !seen.some((now) => now.id === e.id))) return refresh().catch(() => {});
  paint();
  return null;
}

// ---- what can be done ----

async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    toast(error.message);
    return null;
  } finally {
    refresh().catch(() => {});
  }
}

function freeName(name) {
  const base = name.replace(/-fork\d*$/, "").slice(0, 56);
  for (let i = 1;; i++) {
    const candidate = base + "-fork" + (i > 1 ? i : "");
    if (!isListed(candidate)) return candidate;
  }
}

async function fork(entry) {
  const copy = await attempt(async () => {
    const made = await request("POST", path(entry.id, "/fork"), {id: freeName(entry.id)});
    return request("PATCH", path(made.id), {title: (labelOf(entry).slice(0, 70) + " (fork)")});
  });
  if (copy) actions.open(copy.id);
}

async function rename(entry) {
  const agreed = await ask(byId("rename-dialog"), () => {
    byId("new-title").value = labelOf(entry);
    byId("new-name").value = entry.id;
    byId("new-title").select();
  });
  if (!agreed) return;
  const change = {};
  if (byId("new-title").value.trim() !== labelOf(entry)) change.title = byId("new-title").value.trim();
  if (byId("new-name").value !== entry.id) change.id = byId("new-name").value;
  if (!Object.keys(change).length) return;
  const made = await attempt(() => request("PATCH", path(entry.id), change));
  if (made && made.id !== entry.id) actions.renamed(entry.id, made.id);
}

async function remove(entry) {
  const agreed = await ask(byId("delete-dialog"), () => {
    byId("delete-what").textContent = labelOf(entry);
  });
  if (!agreed) return;
  const gone = await attempt(() => request("DELETE", path(entry.id)));
  if (gone) actions.deleted(entry.id);
}

const save = (entry) => attempt(async () => {
  await request("POST", path(entry.id, "/save"), {});
  toast("“" + labelOf(entry) + "” is on disk.");
});
const load = (entry) => attempt(async () => {
  await request("POST", path(entry.id, "/load"), {});
  toast("“" + labelOf(entry) + "” is on the device.");
});

// ---- the menu of one session ----

function itemsOf(entry) {
  const used = entry.tokens > 0 || entry.tier === "running";
  return [["Rename…", () => rename(entry), true], ["Fork", () => fork(entry), used], ["Save to disk", () => save(entry), used],
          ["Bring to the device", () => load(entry), used && entry.tier !== "running"],
          ["Reload messages", () => actions.reload(entry.id), used && entry.tier !== "running"], ["Delete…", () => remove(entry), true]];
}

function openMenu(row) {
  menu.replaceChildren(...itemsOf(row.entry).map(([label, act, possible]) =>
    make("button", {type: "button", role: "menuitem", tabindex: "-1", disabled: !possible,
                    on: {click: () => { menu.hidePopover(); row.more.focus(); act(); }}}, label)));
  menu.owner = row.more;
  row.more.setAttribute("aria-expanded", "true");
  menu.setAttribute("aria-label", "Session " + labelOf(row.entry));
  menu.showPopover();
  const at = row.more.getBoundingClientRect(), size = menu.getBoundingClientRect();
  menu.style.left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8)) + "px";
  menu.style.top = (at.bottom + size.height + 8 < innerHeight ? at.bottom + 4 : Math.max(8, at.top - size.height - 4)) + "px";
  menu.querySelector("button:not(:disabled)").focus();
}

menu.addEventListener("toggle", (event) => {
  if (event.newState === "closed" && menu.owner) menu.owner.setAttribute("aria-expanded", "false");
});

// ---- keys ----

function step(all, from, key) {
  if (key === "Home") return all[0];
  if (key === "End") return all[all.length - 1];
  return all[Math.max(0, Math.min(all.length - 1, all.indexOf(from) + (key === "ArrowDown" ? 1 : -1)))];
}

const isStep = (key) => key === "ArrowDown" || key === "ArrowUp" || key === "Home" || key === "End";

menu.addEventListener("keydown", (event) => {
  if (event.key === "Tab") menu.hidePopover();
  if (!isStep(event.key)) return;
  event.preventDefault();
  step([...menu.querySelectorAll("button:not(:disabled)")], document.activeElement, event.key).focus();
});

list.addEventListener("keydown", (event) => {
  const row = [...rows.values()].find((r) => r.element.contains(event.target));
  if (!row) return;
  if (event.key === "ArrowRight") row.more.focus();
  else if (event.key === "ArrowLeft") row.button.focus();
  else if (event.key === "F2") rename(row.entry);
  else if (event.key === "Delete") remove(row.entry);
  else if (event.key === "ArrowUp" && list.firstElementChild === row.element) filter.focus();
  else if (isStep(event.key)) {
    const next = step([...list.children], row.element, event.key);
    next.querySelector(event.target === row.more ? ".session-more" : ".session-open").focus();
  } else return;
  event.preventDefault();
});

filter.addEventListener("input", paint);
filter.addEventListener("keydown", (event) => {
  const first = list.querySelector(".session-open");
  if (event.key === "Escape" && filter.value) {
    event.stopPropagation();
    filter.value = "";
    paint();
  } else if (event.key === "ArrowDown" && first) {
    event.preventDefault();
    first.focus();
  } else if (event.key === "Enter" && first) {
    first.click();
  }
});
