// app.js - puts the page together: what is open, the keyboard, light and dark, the connection.

import {isConnected, keyIsMissing, needKey, onConnection, request} from "./api.js";
import {pollNow, startPolling} from "./cache.js";
import {connectChat, currentName, forget, isAnswering, open, openNew, renamed, showState, stop, systemOf} from "./chat.js";
import {byId, recall, remember, say, toast} from "./dom.js";
import {showSystemPrompt} from "./options.js";
import {connectSessions, isListed, paint, refresh, titleOf, update} from "./sessions.js";

const frame = byId("frame"), root = document.documentElement;
const narrow = matchMedia("(max-width: 800px)"), medium = matchMedia("(max-width: 1180px)");

// ---- what is open: "#/NAME" in the address ----

const addressOf = (name) => "#/" + name; // names have nothing to escape
const nameInAddress = () => location.hash.replace(/^#(\/([\w.-]*))?.*$/s, "$2");

function shownNow() {
  showSystemPrompt(currentName(), systemOf());
  paint();
  showState();
}

async function openSession(name) {
  const became = await open(name);
  if (became === "late") return;
  if (became === "gone") {
    toast("There is no session “" + name + "” any more.");
    startNew();
    return;
  }
  if (nameInAddress() !== name) history.pushState(null, "", addressOf(name));
  setDrawer("sessions", false);
  shownNow();
}

function startNew() {
  openNew();
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  setDrawer("sessions", false);
  shownNow();
  byId("message").focus();
}

function openFromAddress() {
  const name = nameInAddress();
  if (!name) startNew();
  else if (name !== currentName()) openSession(name);
}

connectChat((name, exists) => {
  if (exists && name === currentName() && !location.hash) history.replaceState(null, "", addressOf(name));
  refresh().catch(() => {});
  pollNow();
}, titleOf);

connectSessions({
  open: openSession,
  current: currentName,
  reload: (name) => {
    forget(name);
    openSession(name);
  },
  renamed: (from, to) => {
    renamed(from, to);
    if (currentName() === to) history.replaceState(null, "", addressOf(to));
    shownNow();
  },
  deleted: (name) => {
    const shown = name === currentName();
    forget(name);
    if (shown) startNew();
  },
  shown: showState,
});

// ---- drawers: the sessions at the left, the cache at the right ----

const drawers = {
  sessions: {button: byId("open-sessions"), close: byId("close-sessions"), element: byId("sidebar"), over: narrow},
  cache: {button: byId("toggle-cache"), close: byId("close-cache"), element: byId("cache"), over: medium},
};

const isOpen = (name) => frame.classList.contains(name + "-open");
const isSeen = (name) => isOpen(name) || (name === "sessions" && !narrow.matches);

function setDrawer(name, open) {
  const drawer = drawers[name], was = isOpen(name);
  frame.classList.toggle(name + "-open", open);
  drawer.button.setAttribute("aria-expanded", String(open));
  drawer.element.inert = !isSeen(name);
  byId("veil").hidden = !Object.keys(drawers).some((n) => isOpen(n) && drawers[n].over.matches);
  byId("main").inert = !byId("veil").hidden;
  if (!drawer.over.matches || was === open) return;
  if (open) drawer.close.focus();
  else drawer.button.focus();
}

for (const [name, drawer] of Object.entries(drawers)) {
  drawer.button.addEventListener("click", () => {
    setDrawer(name, !isOpen(name));
    if (name === "cache" && !medium.matches) remember("cache", isOpen(name) ? "open" : "closed");
    pollNow();
  });
  drawer.close.addEventListener("click", () => {
    setDrawer(name, false);
    if (name === "cache" && !medium.matches) remember("cache", "closed");
  });
}

const closeOver = () => Object.keys(drawers).filter((n) => isOpen(n) && drawers[n].over.matches).map((n) => setDrawer(n, false)).length > 0;

byId("veil").addEventListener("click", closeOver);

// As wide as the window is: what would lie over the rest is closed.
function arrange() {
  setDrawer("sessions", false);
  setDrawer("cache", !medium.matches && recall("cache") !== "closed");
}

narrow.addEventListener("change", arrange);
medium.addEventListener("change", arrange);

byId("toggle-options").addEventListener("click", () => {
  const options = byId("options"), button = byId("toggle-options");
  options.hidden = !options.hidden;
  button.setAttribute("aria-expanded", String(!options.hidden));
  if (!options.hidden) byId("system").focus();
});

// ---- light and dark ----

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
}

byId("toggle-theme").addEventListener("click", () => {
  const dark = (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  // What the system says anyway is not remembered: the page goes on following it.
  const theme = dark === prefersDark.matches ? (dark ? "light" : "dark") : "";
  remember("theme", theme);
  setTheme(theme);
});
setTheme(recall("theme"));

// ---- keys ----

const isWriting = (element) => element.closest("input, textarea, select, [contenteditable]") !== null;

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || document.querySelector("dialog[open], [popover]:popover-open")) return;
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (narrow.matches) setDrawer("sessions", true);
    byId("filter").focus();
    byId("filter").select();
  } else if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey && !isWriting(event.target)) {
    event.preventDefault();
    closeOver();
    byId("message").focus();
  } else if (event.key === "Escape") {
    if (closeOver()) return;
    if (isAnswering()) stop();
    else byId("message").focus();
  }
});

// ---- the connection ----

const banner = byId("banner"), action = byId("banner-action");

function tell() {
  const lost = !isConnected(), keyless = keyIsMissing();
  banner.hidden = !lost && !keyless;
  if (lost) say(byId("banner-text"), "The server cannot be reached. Looking for it…");
  else if (keyless) say(byId("banner-text"), "The server wants an API key.");
  action.hidden = lost;
  action.textContent = "Enter it";
}

action.addEventListener("click", async () => {
  if (await needKey("The server wants an API key.")) start();
});

onConnection((connected) => {
  tell();
  if (connected) start();
});

async function start() {
  tell();
  try {
    const models = await request("GET", "v1/models");
    const model = models.data[0];
    say(byId("model"), model.id);
    byId("model").title = "context of " + model.context_length.toLocaleString("en-US") + " tokens, cache " + model.kv;
    await refresh();
  } catch (error) {
    if (isConnected() && error.status !== 401) toast(error.message);
  }
  tell();
}

// ---- beginning ----

arrange();
byId("new-session").addEventListener("click", startNew);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("message").focus();
});
addEventListener("popstate", openFromAddress);
await start();
if (nameInAddress() && !isListed(nameInAddress()) && isConnected() && !keyIsMissing()) startNew();
else openFromAddress();
startPolling(() => isSeen("cache"), titleOf, (cache) => update(cache.sessions));
