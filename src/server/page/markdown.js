// markdown.js - what a model writes, as elements. Nothing of it is ever parsed as HTML: tags stay text, links lead to http, https and
// mailto only, pictures become links.
//
// The text is cut into blocks; while an answer grows, blocks whose text is the same keep their elements, so that only the last one
// is made again. Emphasis goes by a stack of openers (the idea of CommonMark 0.31's appendix, without its rule of three): the time
// is linear in the text, whatever it is.

import {copy, icon, make} from "./dom.js";

const deepest = 12; // nesting of quotes and lists; beyond it, text

// ---- inside a block ----

function safeAddress(text) {
  if (!/^(https?:\/\/|mailto:)/i.test(text)) return null;
  try {
    const address = new URL(text);
    return /^(https?|mailto):$/.test(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function link(address, children) {
  return make("a", {href: address, rel: "noopener noreferrer", target: "_blank"}, ...children);
}

// For each "[" the place of its "]", and for each run of backticks that of the run that ends it.
function matches(text) {
  const brackets = new Map(), ticks = new Map(), waiting = new Map(), open = [];
  for (const run of text.matchAll(/`+/g)) {
    const same = waiting.get(run[0].length);
    if (same !== undefined) for (const start of same) ticks.set(start, run.index);
    waiting.set(run[0].length, [run.index]);
  }
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "`") {
      const length = runLength(text, i);
      i = (ticks.has(i) ? ticks.get(i) : i) + length - 1;
    } else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) brackets.set(open.pop(), i);
  }
  return {brackets, ticks};
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

// "(address "title")" at `at`: {address, end}, or null.
function destination(text, at) {
  if (text[at] !== "(") return null;
  const found = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(text.slice(at, at + 2048));
  return found ? {address: (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"), end: at + found[0].length} : null;
}

const isSpace = (c) => c === undefined || /\s/.test(c);
const isMark = (c) => c !== undefined && /[\p{P}\p{S}]/u.test(c);

// A space at either end only keeps backticks apart.
function codeText(text) {
  const line = text.replace(/\n/g, " ");
  return line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
}

class Inline {
  constructor() {
    this.parts = [];   // nodes, and delimiters {mark, length}
    this.openers = []; // places of delimiters in parts
    this.waiting = {"*": 0, "_": 0, "~": 0};
  }

  text(text) {
    const last = this.parts[this.parts.length - 1];
    if (typeof last === "string") this.parts[this.parts.length - 1] = last + text;
    else this.parts.push(text);
  }

  delimiter(text, at, length) {
    const mark = text[at], before = text[at - 1], after = text[at + length];
    const left = !isSpace(after) && (!isMark(after) || isSpace(before) || isMark(before));
    const right = !isSpace(before) && (!isMark(before) || isSpace(after) || isMark(after));
    const opens = left && (mark !== "_" || !right || isMark(before));
    let rest = length;
    if (right && (mark !== "_" || !left || isMark(after)))
      while (rest && this.waiting[mark]) rest = this.close(mark, rest);
    if (rest && opens && (mark !== "~" || rest === 2)) {
      this.openers.push(this.parts.length);
      this.waiting[mark]++;
      this.parts.push({mark, length: rest});
    } else if (rest) {
      this.text(mark.repeat(rest));
    }
  }

  // Wraps what is between the nearest opener of this mark and here; returns how many marks are left.
  close(mark, length) {
    let at;
    do {
      at = this.openers.pop();
      this.waiting[this.parts[at].mark]--;
    } while (this.parts[at].mark !== mark);
    const opener = this.parts[at];
    if (mark === "~" && length !== 2) {
      this.parts[at] = "~".repeat(opener.length);
      return length;
    }
    const used = Math.min(2, opener.length, length);
    const inner = this.parts.splice(at + 1).map(plain);
    const name = mark === "~" ? "del" : used === 2 ? "strong" : "em";
    const node = make(name, {}, ...inner);
    opener.length -= used;
    if (opener.length) {
      this.openers.push(at);
      this.waiting[mark]++;
    } else {
      this.parts.pop();
    }
    this.parts.push(node);
    return length - used;
  }

  nodes() {
    return this.parts.map(plain);
  }
}

const plain = (part) => (part.mark ? part.mark.repeat(part.length) : part);

function inline(text, links = true) {
  const {brackets, ticks} = matches(text);
  const out = new Inline();
  for (let i = 0; i < text.length;) {
    const c = text[i];
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] || "")) {
      out.text(text[i + 1]);
      i += 2;
    } else if (c === "\n") {
      out.parts.push(make("br"));
      i++;
    } else if (c === "`") {
      const length = runLength(text, i), end = ticks.get(i);
      if (end !== undefined) out.parts.push(make("code", {}, codeText(text.slice(i + length, end))));
      else out.text(text.slice(i, i + length));
      i = (end !== undefined ? end : i) + length;
    } else if (c === "*" || c === "_" || c === "~") {
      const length = runLength(text, i);
      out.delimiter(text, i, length);
      i += length;
    } else if (links && (c === "[" || (c === "!" && text[i + 1] === "["))) {
      const start = c === "!" ? i + 1 : i, close = brackets.get(start);
      const to = close === undefined ? null : destination(text, close + 1);
      const address = to && safeAddress(to.address);
      if (address) {
        out.parts.push(link(address, inline(text.slice(start + 1, close) || to.address, false)));
        i = to.end;
      } else {
        out.text(c);
        i++;
      }
    } else if (links && (c === "<" || c === "h") && (c === "<" || i === 0 || !/[\p{L}\p{N}]/u.test(text[i - 1]))) {
      const found = c === "<" ? /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/i.exec(text.slice(i, i + 2010))
                              : /^(https?:\/\/[^\s<>"'`|]{1,2000}[^\s<>"'`|.,:;!?)\]*_~])/.exec(text.slice(i, i + 2010));
      const address = found && safeAddress(found[1]);
      if (address) out.parts.push(link(address, [found[1]]));
      else out.text(c);
      i += address ? found[0].length : 1;
    } else {
      const rest = /^[^\\\n`*_~[!<h]+/.exec(text.slice(i, i + 1000));
      const piece = rest ? rest[0] : c;
      out.text(piece);
      i += piece.length;
    }
  }
  return out.nodes();
}

// ---- blocks ----

// No two neighbours of these can take the same character: a line that does not fit is known not to in linear time.
const fence = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const heading = /^ {0,3}(#{1,6})(?:\s(.*))?$/;
const rule = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const quote = /^ {0,3}> ?(.*)$/;
const item = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( +)(?=\S)|\s*$)(.*)$/;
const divider = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/; // of a trimmed line

const indent = (line) => line.length - line.trimStart().length;

function isTable(lines, i) {
  return lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && divider.test(lines[i + 1].trim()) &&
         cells(lines[i]).length === cells(lines[i + 1]).length;
}

function interrupts(lines, i) {
  const line = lines[i];
  return fence.test(line) || heading.test(line) || rule.test(line) || quote.test(line) || isTable(lines, i) ||
         (item.test(line) && !/^ {0,3}(?:[-*+]|\d+[.)])\s*$/.test(line));
}

// Cuts lines into blocks {kind, from, to}.
function blocks(lines) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    const from = i, line = lines[i];
    let kind = "text", opened;
    if (!line.trim()) {
      i++;
      continue;
    } else if ((opened = fence.exec(line))) {
      kind = "code";
      const end = new RegExp("^ {0,3}" + opened[1][0] + "{" + opened[1].length + ",}\\s*$");
      for (i++; i < lines.length && !end.test(lines[i]);) i++;
      i++;
    } else if (heading.test(line)) {
      kind = "heading";
      i++;
    } else if (rule.test(line)) {
      kind = "rule";
      i++;
    } else if (quote.test(line)) {
      kind = "quote";
      while (i < lines.length && (quote.test(lines[i]) || (lines[i].trim() && !interrupts(lines, i)))) i++;
    } else if (item.test(line)) {
      kind = "list";
      i = listEnd(lines, i);
    } else if (isTable(lines, i)) {
      kind = "table";
      for (i += 2; i < lines.length && lines[i].trim() && lines[i].includes("|");) i++;
    } else {
      for (i++; i < lines.length && lines[i].trim() && !interrupts(lines, i);) i++;
    }
    found.push({kind, from, to: Math.min(i, lines.length)});
  }
  return found;
}

const isOrdered = (marker) => /\d/.test(marker);

function listEnd(lines, i) {
  const ordered = isOrdered(item.exec(lines[i])[2]);
  let last = i;
  for (i++; i < lines.length; i++) {
    const line = lines[i];
    if (!line.trim()) continue;
    const next = item.exec(line);
    const same = next && isOrdered(next[2]) === ordered && !rule.test(line);
    const lazy = i === last + 1 && !interrupts(lines, i);
    if (!same && indent(line) < 2 && !lazy) break;
    last = i;
  }
  return last + 1;
}

function listOf(lines, depth) {
  const first = item.exec(lines[0])[2], ordered = isOrdered(first);
  const list = make(ordered ? "ol" : "ul", ordered && parseInt(first, 10) !== 1 ? {start: String(parseInt(first, 10))} : {});
  const items = [], base = indent(lines[0]);
  let loose = false;
  for (const line of lines) {
    const begun = item.exec(line);
    if (begun && begun[1].length < base + 2 && isOrdered(begun[2]) === ordered) {
      const blank = items.length && !items[items.length - 1].lines[items[items.length - 1].lines.length - 1].trim();
      loose = loose || Boolean(blank);
      const space = (begun[3] || " ").length;
      items.push({room: begun[1].length + begun[2].length + (space > 4 ? 1 : space), lines: [begun[4]]});
    } else {
      const current = items[items.length - 1];
      current.lines.push(line.slice(Math.min(indent(line), current.room)));
    }
  }
  for (const one of items) {
    const task = /^\[([ xX])\]\s+(.*)$/.exec(one.lines[0]);
    if (task) one.lines[0] = task[2];
    const content = elements(one.lines, depth + 1);
    const tight = !loose && content.filter((node) => node.tagName === "P").length < 2;
    const entry = make("li", task ? {class: "task"} : {});
    if (task) entry.append(make("input", {type: "checkbox", disabled: true, checked: task[1] !== " "}));
    for (const node of content) entry.append(...(node.tagName === "P" && tight ? [...node.childNodes] : [node]));
    list.append(entry);
  }
  return list;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/([^\\]|^)\|$/, "$1");
  const all = [""];
  let ticked = false;
  for (let i = 0; i < inner.length; i++) {
    if (inner[i] === "\\" && inner[i + 1] === "|") all[all.length - 1] += inner[++i];
    else if (inner[i] === "|" && !ticked) all.push("");
    else {
      if (inner[i] === "`") ticked = !ticked && inner.indexOf("`", i + 1) >= 0;
      all[all.length - 1] += inner[i];
    }
  }
  return all.map((cell) => cell.trim());
}

function tableOf(lines) {
  const sides = cells(lines[1]).map((cell) => (/^:-+:$/.test(cell) ? "center" : /-:$/.test(cell) ? "right" : "left"));
  const row = (line, tag) => {
    const texts = cells(line);
    return make("tr", {}, ...sides.map((side, i) => make(tag, side === "left" ? {} : {class: side}, ...inline(texts[i] || ""))));
  };
  return make("div", {class: "table", tabindex: "0", role: "region", "aria-label": "Table"},
              make("table", {}, make("thead", {}, row(lines[0], "th")), make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

function codeOf(lines) {
  const opened = fence.exec(lines[0]), language = opened[2].trim().split(/\s/)[0];
  const last = lines[lines.length - 1];
  const closed = lines.length > 1 && last.trim().startsWith(opened[1]) && /^([`~])\1*$/.test(last.trim());
  const space = indent(lines[0]);
  const text = lines.slice(1, closed ? -1 : undefined).map((line) => line.slice(Math.min(space, indent(line)))).join("\n");
  const button = make("button", {type: "button", class: "icon small", "aria-label": "Copy the code", title: "Copy the code"}, icon("copy"));
  button.addEventListener("click", () => copy(text, button));
  return make("div", {class: "code"}, make("div", {class: "code-head"}, make("span", {}, language || "text"), button),
              make("pre", {tabindex: "0"}, make("code", {}, text)));
}

function element(kind, lines, depth) {
  if (kind === "code") return codeOf(lines);
  if (kind === "rule") return make("hr");
  if (kind === "table") return tableOf(lines);
  if (kind === "heading") {
    const found = heading.exec(lines[0]);
    const text = (found[2] || "").trim(), bare = text.replace(/#+$/, "");
    return make("h" + Math.min(6, found[1].length + 2), {class: "h" + found[1].length},
                ...inline((bare === "" || bare.endsWith(" ") ? bare : text).trim()));
  }
  if (kind === "quote" && depth < deepest)
    return make("blockquote", {}, ...elements(lines.map((line) => (quote.exec(line) || ["", line])[1]), depth + 1));
  if (kind === "list" && depth < deepest) return listOf(lines, depth);
  return make("p", {}, ...inline(lines.map((line) => line.trim()).join("\n")));
}

function elements(lines, depth) {
  return blocks(lines).map((block) => element(block.kind, lines.slice(block.from, block.to), depth));
}

// Makes `container` show `text`.
export function show(container, text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const sources = container.sources || (container.sources = []);
  const found = blocks(lines);
  found.forEach((block, i) => {
    const mine = lines.slice(block.from, block.to), source = mine.join("\n");
    if (sources[i] === source) return;
    sources[i] = source;
    const node = element(block.kind, mine, 0);
    if (container.children[i]) container.children[i].replaceWith(node);
    else container.append(node);
  });
  sources.length = found.length;
  while (container.children.length > found.length) container.lastElementChild.remove();
}
