// cache.js - a live picture of the cache, from /v1/cache. Asked about once a second while somebody can see it.

import {isConnected, keyIsMissing, request} from "./api.js";
import {byId, bytes, make, one, percent, say, short, svg, whole} from "./dom.js";

const samples = []; // {time, generated} of the last minute
const kept = 61;
const shownSessions = 10;
let unitBytes = 0; // of one coded page, as far as the free ones tell
let titleOf = () => null;
let take = () => {};

// ---- parts of the picture ----

function bar(names) {
  const parts = names.map((name) => make("span", {class: "part " + name}));
  return {element: make("div", {class: "stack", "aria-hidden": "true"}, ...parts), parts};
}

function setBar(made, values, all) {
  made.parts.forEach((part, i) => { part.style.width = (all > 0 ? (100 * Math.max(0, values[i])) / all : 0) + "%"; });
}

function legend(rows) {
  const values = rows.map(() => make("dd"));
  const names = rows.map(([name, label]) => make("dt", {}, make("span", {class: "dot " + name, "aria-hidden": "true"}), label));
  return {element: make("dl", {class: "legend"}, ...rows.flatMap((_, i) => [make("div", {}, names[i], values[i])])), values};
}

const section = (title, ...children) => make("section", {class: "panel"}, make("h3", {}, title), ...children);

const speed = {number: make("span", {class: "number"}), line: svg("path", {class: "line"}), area: svg("path", {class: "area"}),
               most: make("span", {class: "quiet"}), requests: make("p", {class: "quiet row-note"})};
const forms = bar(["exact", "coded", "other"]), holders = bar(["used", "tree"]);
const budget = {held: make("span", {class: "number"}), of: make("span", {class: "quiet"}),
                legend: legend([["exact", "Exact pages"], ["coded", "Coded pages"], ["tree", "Prefix tree alone"], ["free", "Free"]])};
const facts = legend([["none", "Bits per element"], ["none", "Most held"], ["none", "Host memory"], ["none", "Disk"]]);
const reuse = bar(["reused", "refilled", "computed"]);
const reuseLegend = legend([["reused", "Reused"], ["refilled", "Refilled"], ["computed", "Computed"]]);
const more = legend([["none", "Prompts that reused"], ["none", "Pages turned to codes"], ["none", "Guesses right"], ["none", "Attention read"]]);
const sessionRows = make("ul", {class: "session-bars"});
const sessionNote = make("p", {class: "quiet row-note"});
const rows = new Map();

byId("cache-body").append(
  section("Tokens per second", make("div", {class: "headline"}, speed.number, speed.most),
          svg("svg", {class: "spark", viewBox: "0 0 240 44", preserveAspectRatio: "none", "aria-hidden": "true"}, speed.area, speed.line), speed.requests),
  section("Memory", make("div", {class: "headline"}, budget.held, budget.of), forms.element, holders.element, budget.legend.element, facts.element),
  section("Prompt tokens", reuse.element, reuseLegend.element, more.element),
  section("Pages by session", sessionRows, sessionNote));

// ---- drawing ----

function drawSpeed(cache) {
  const last = samples[samples.length - 1];
  if (last && cache.tokens.generated < last.generated) samples.length = 0; // the server began anew
  samples.push({time: cache.time, generated: cache.tokens.generated});
  if (samples.length > kept) samples.shift();
  const rates = [];
  for (let i = 1; i < samples.length; i++) {
    const seconds = samples[i].time - samples[i - 1].time;
    rates.push(seconds > 0 ? (samples[i].generated - samples[i - 1].generated) / seconds : 0);
  }
  const most = Math.max(0, ...rates), scale = Math.max(1, most), now = rates[rates.length - 1] || 0;
  const points = rates.map((rate, i) => [240 - (rates.length - 1 - i) * (240 / (kept - 2)), 42 - (40 * rate) / scale]);
  const path = points.map(([x, y], i) => (i ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1)).join("");
  speed.line.setAttribute("d", path);
  speed.area.setAttribute("d", path && path + "L240 44L" + points[0][0].toFixed(1) + " 44Z");
  say(speed.number, now < 100 ? now.toFixed(1) : whole(now));
  say(speed.most, "most in the last minute " + (most < 100 ? most.toFixed(1) : whole(most)));
  const r = cache.requests;
  say(speed.requests, r.running + " running, " + r.prefilling + " reading prompts, " + r.waiting + " waiting");
}

// By form and by who holds it: two bars over the same bytes. Units are of one coded page; exact pages take several of them.
function drawMemory(cache) {
  const b = cache.bytes, free = Math.max(0, b.budget - b.held);
  if (cache.pages.free_units > 0) unitBytes = free / cache.pages.free_units;
  const coded = Math.min(b.held, cache.pages.coded * unitBytes), tree = Math.min(b.held, cache.prefix.bytes);
  const exact = cache.pages.exact > 0 ? b.held - coded : 0;
  setBar(forms, [exact, coded, b.held - coded - exact], b.budget);
  setBar(holders, [b.held - tree, tree], b.budget);
  say(budget.held, bytes(b.held));
  say(budget.of, "of " + bytes(b.budget) + ", " + percent(b.held, b.budget));
  const about = unitBytes ? ", " : "";
  say(budget.legend.values[0], short(cache.pages.exact) + about + (about && bytes(exact)));
  say(budget.legend.values[1], short(cache.pages.coded) + about + (about && bytes(coded)));
  say(budget.legend.values[2], bytes(tree));
  say(budget.legend.values[3], bytes(free));
  say(facts.values[0], cache.bits_per_element > 0 ? cache.bits_per_element.toFixed(3) : "–");
  say(facts.values[1], bytes(b.peak));
  say(facts.values[2], bytes(b.host));
  say(facts.values[3], bytes(b.disk));
}

function drawReuse(cache) {
  const t = cache.tokens, all = t.reused + t.refilled + t.computed, numbers = [t.reused, t.refilled, t.computed];
  setBar(reuse, numbers, all);
  numbers.forEach((n, i) => say(reuseLegend.values[i], short(n) + ", " + percent(n, all)));
  say(more.values[0], short(cache.prefix.hits) + " of " + short(cache.prefix.lookups));
  say(more.values[1], short(cache.demoted_pages));
  const a = cache.attention;
  say(more.values[2], short(t.accepted) + " of " + short(t.guessed));
  say(more.values[3], a.seconds > 0 ? (a.bytes / a.seconds / 1e9).toFixed(1) + " GB/s" : "");
  more.values[2].parentElement.hidden = !t.guessed;
  more.values[3].parentElement.hidden = !(a.seconds > 0);
}

function makeRow() {
  const stack = bar(["exact", "coded"]), name = make("span", {class: "bar-name"}), count = make("span", {class: "bar-count quiet"});
  return {element: make("li", {}, make("div", {class: "bar-head"}, name, count), stack.element), stack, name, count};
}

function drawSessions(cache) {
  const sorted = cache.sessions.filter((s) => s.exact_pages + s.coded_pages > 0)
                               .sort((a, b) => b.exact_pages + b.coded_pages - a.exact_pages - a.coded_pages);
  const shown = sorted.slice(0, shownSessions), most = shown.length ? shown[0].exact_pages + shown[0].coded_pages : 0;
  for (const id of [...rows.keys()]) if (!shown.some((s) => s.id === id)) {
    rows.get(id).element.remove();
    rows.delete(id);
  }
  shown.forEach((s, i) => {
    if (!rows.has(s.id)) rows.set(s.id, makeRow());
    const row = rows.get(s.id);
    say(row.name, titleOf(s.id) || s.id);
    say(row.count, short(s.exact_pages) + " exact, " + short(s.coded_pages) + " coded");
    row.element.className = "tier-" + s.tier;
    row.element.title = (titleOf(s.id) || s.id) + ": " + one(s.exact_pages + s.coded_pages, "page") + ", " + s.tier;
    setBar(row.stack, [s.exact_pages, s.coded_pages], most);
    if (sessionRows.children[i] !== row.element) sessionRows.insertBefore(row.element, sessionRows.children[i] || null);
  });
  sessionNote.hidden = shown.length > 0 && sorted.length === shown.length;
  say(sessionNote, shown.length ? one(sorted.length - shown.length, "smaller session") + " more" : "No session has pages.");
}

function draw(cache) {
  say(byId("cache-form"), cache.kv);
  drawSpeed(cache);
  drawMemory(cache);
  drawReuse(cache);
  drawSessions(cache);
}

// ---- asking ----

let timer = 0, asking = false; // at most one of them: it waits, or it asks
let visible = () => true;

async function poll() {
  clearTimeout(timer);
  timer = 0;
  if (asking || document.hidden) return;
  asking = true;
  const seen = visible();
  if (isConnected() && !keyIsMissing()) {
    try {
      const cache = await request("GET", "v1/cache");
      if (seen) draw(cache);
      take(cache);
    } catch { /* the banner tells of a lost connection, other requests of everything else */ }
  }
  asking = false;
  if (!document.hidden) timer = setTimeout(poll, seen ? 1000 : 4000);
}

export const pollNow = poll;

// panelIsOpen(): whether the picture is seen; the list of sessions is kept up to date, more slowly, if it is not.
export function startPolling(panelIsOpen, findTitle, onCache) {
  visible = panelIsOpen;
  titleOf = findTitle;
  take = onCache;
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) samples.length = 0; // what went on meanwhile is no rate of now
    poll();
  });
  poll();
}
