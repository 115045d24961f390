// Elements and texts. Everything is set as text: ids, labels, notes and payloads come from anyone.

export const $ = (id) => document.getElementById(id);

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "share") node.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const number = (value, digits = 0) =>
  value.toLocaleString(undefined, { maximumFractionDigits: digits, minimumFractionDigits: digits });
export const counted = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
export const percent = (share) => (share >= 0.0995 || share === 0 ? number(share * 100) : number(share * 100, share < 0.001 ? 2 : 1)) + " %";

/** A figure of any size in at most four characters or so. */
export function brief(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const units = ["", "k", "M", "G", "T"];
  let unit = 0;
  while (Math.abs(value) >= 9999.5 || (unit > 0 && Math.abs(value) >= 999.5)) { value /= 1000; unit++; }
  return number(value, value !== 0 && Math.abs(value) < 10 && (unit > 0 || !Number.isInteger(value)) ? 1 : 0) + units[unit];
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit++; }
  return `${number(value, unit && value < 100 ? 1 : 0)} ${units[unit]}`;
}

export const milliseconds = (seconds) =>
  seconds === null || seconds === undefined ? "–" : seconds >= 1 ? `${number(seconds, 1)} s` : `${brief(seconds * 1000)} ms`;

const STEPS = [[60, 1, "s"], [3600, 60, "min"], [86400, 3600, "h"], [Infinity, 86400, "d"]];
export function span(seconds) {
  const [, size, unit] = STEPS.find(([below]) => seconds < below);
  return `${number(Math.max(0, Math.floor(seconds / size)))} ${unit}`;
}
export const secondsSince = (text) => (Date.now() - Date.parse(text)) / 1000;
export const ago = (text) => (secondsSince(text) < 2 ? "now" : `${span(secondsSince(text))} ago`);
export const when = (text) => new Date(text).toLocaleString();
export const clock = (text) => new Date(text).toLocaleTimeString();

/** A time that says how long ago it was, and when, if one asks. */
export const timeOf = (text) => el("time", { datetime: text, title: when(text), "data-ago": text }, ago(text));
export function renewTimes() {
  for (const node of document.querySelectorAll("time[data-ago]")) {
    const text = ago(node.dataset.ago);
    if (node.textContent !== text) node.textContent = text;
  }
}

export const failure = (error) => el("p", { class: "bad", role: "alert" }, error.message);

const PAUSE_MS = 4000;
let saidAt = 0;
/** Say something to who listens rather than looks; what comes by itself may be left out when much comes. */
export function say(text, { often = false } = {}) {
  if (often && Date.now() - saidAt < PAUSE_MS) return;
  saidAt = Date.now();
  $("said").textContent = text;
}

/** Ask in a dialog; `fields` go above its buttons. Resolves with the form, or null. */
export function ask(title, fields, action, { danger = false, cancel = true } = {}) {
  const dialog = $("dialog");
  return new Promise((resolve) => {
    const form = el("form", { method: "dialog", onsubmit: (event) => { event.preventDefault(); done(form); } },
      el("h2", { id: "dialog-title" }, title), fields,
      el("div", { class: "row" }, cancel && el("button", { type: "button", onclick: () => done(null) }, "Cancel"),
        el("button", { type: "submit", class: danger ? "main danger" : "main" }, action)));
    const done = (result) => { dialog.oncancel = null; dialog.close(); dialog.replaceChildren(); resolve(result); };
    dialog.oncancel = (event) => { event.preventDefault(); if (cancel) done(null); };
    dialog.replaceChildren(form);
    if (!dialog.open) dialog.showModal();
  });
}
