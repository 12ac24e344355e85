// dom.js - making elements, and numbers as people read them. Text reaches the page as text nodes only.

export const byId = (id) => document.getElementById(id);

// make("a", {class: "x", href: "..."}, child, "text", ...); handlers as {on: {click: f}}
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const icon = (name) => svg("svg", {"aria-hidden": "true"}, svg("use", {href: "#i-" + name}));

export function iconButton(name, label, handler) {
  return make("button", {type: "button", class: "icon small", "aria-label": label, title: label, on: {click: handler}}, icon(name));
}

// Sets a text only if it changed: a live picture does not disturb a selection for nothing.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export async function copy(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure origin there is no clipboard: the old way, over a selection.
    const area = make("textarea", {class: "unseen", "aria-hidden": "true"});
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  if (!done) return toast("The browser does not allow copying.");
  button.querySelector("use").setAttribute("href", "#i-done");
  announce("Copied");
  setTimeout(() => button.querySelector("use").setAttribute("href", "#i-copy"), 1200);
}

// ---- numbers ----

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i + 1 < units.length; i++) n /= 1024;
  return (i === 0 || n >= 100 ? n.toFixed(0) : n.toFixed(1)) + " " + units[i];
}

export const whole = (n) => Math.round(n).toLocaleString("en-US");

export function short(n) {
  if (n < 10000) return whole(n);
  return n < 1e6 ? (n / 1e3).toFixed(n < 1e5 ? 1 : 0) + "K" : (n / 1e6).toFixed(1) + "M";
}

export const percent = (part, all) => (all > 0 ? Math.round((100 * part) / all) : 0) + "%";

export const one = (n, word) => (n === 1 ? "1 " + word : whole(n) + " " + word + "s");

// ---- what the browser remembers; one that may not remember anything shows the page all the same ----

function tryStore(use) {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}

export const recall = (name) => tryStore((store) => store.getItem("oscar-" + name));
export const remember = (name, value) => tryStore((store) => store.setItem("oscar-" + name, value));

// ---- telling ----

export function announce(text) {
  byId("announce").textContent = text;
}

export function toast(text) {
  const note = make("div", {class: "toast"}, text);
  byId("toasts").append(note);
  setTimeout(() => note.remove(), 6000);
}

// A dialog's form: resolves to true when it is submitted, false when it is left.
export function ask(dialog, before) {
  return new Promise((resolve) => {
    const form = dialog.querySelector("form");
    let agreed = false;
    const submit = (event) => {
      event.preventDefault();
      agreed = true;
      dialog.close();
    };
    const cancel = () => dialog.close();
    const button = form.querySelector("button[value=cancel]");
    form.addEventListener("submit", submit);
    button.addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submit);
      button.removeEventListener("click", cancel);
      resolve(agreed);
    }, {once: true});
    dialog.showModal();
    if (before) before();
  });
}
