// The sessions, as a table: searched, by last use first, a page at a time, renewed as they are used.

import { call } from "./api.js";
import { ask, bytes, counted, el, failure, number, say, span, timeOf } from "./dom.js";
import { live } from "./live.js";

const PAGE = 200;
const RENEW_MS = 1500;

const left = (session) => session.length - session.first_position;
const endsIn = (session) => (session.ttl_s === null ? Infinity : session.ttl_s - (Date.now() - Date.parse(session.last_used_at)) / 1000);
const COLUMNS = [
  ["id", "Session", (s) => s.id, "id"],
  ["tokens", "Tokens", left, "num"],
  ["chunks", "Chunks", (s) => s.num_chunks, "num wide"],
  ["device", "On the device", (s) => s.bytes.device, "num mid"],
  ["stored", "Stored", (s) => s.bytes.stored, "num wide"],
  ["recalls", "Recalls", (s) => s.num_attends, "num wide"],
  ["residency", "Where", (s) => s.residency, "mid"],
  ["used", "Last used", (s) => s.last_used_at, ""],
  ["expires", "Expires", endsIn, "mid"],
];

/** Delete all sessions of a label, once it was written again; whether that was done. */
export async function deleteAll({ label, prefix = "" }) {
  const form = await ask(`Delete all sessions with the label ${label}?`, [
    el("p", {}, `All their tokens, payloads and recalls go, for good${prefix ? `; only of ids that begin with ${prefix}` : ""}.`),
    el("label", { class: "field" }, "Write the label once more", el("input", { name: "again", autocomplete: "off", required: true }))],
  "Delete them", { danger: true });
  if (!form) return false;
  if (form.elements.again.value.trim() !== label) throw new Error("that is another label; nothing was deleted");
  const { deleted } = await call("/v1/sessions", { method: "DELETE", query: { label, prefix } });
  say(`${counted(deleted, "session")} deleted`);
  return true;
}

/** The view; `stop` it when it is left. */
export function sessionsView() {
  let query = { prefix: "", label: "" }, order = "last_used", sort = null;
  let cursors = [null], page = { sessions: [], cursor: null }, asking = 0, renewing = null;
  const rows = new Map();

  const prefix = el("input", { type: "search", id: "prefix", autocomplete: "off", spellcheck: "false", placeholder: "agent-", oninput: soon });
  const label = el("input", { type: "search", id: "label", autocomplete: "off", spellcheck: "false", placeholder: "user:ana", oninput: soon });
  const trouble = el("div");
  const body = el("tbody");
  const caption = el("caption");
  const heads = COLUMNS.map(([name, title, , style]) => el("th", { scope: "col", class: style === "id" ? null : style, "data-name": name },
    el("button", { type: "button", onclick: () => sortBy(name) }, title)));
  const back = el("button", { type: "button", onclick: () => turn(-1) }, "Previous");
  const next = el("button", { type: "button", onclick: () => turn(1) }, "Next");
  const where = el("span", { class: "dim small" });
  const wipe = el("button", { type: "button", class: "danger", hidden: true, onclick: wipeAll }, "Delete all with this label…");
  const view = [el("section", { class: "card", "aria-labelledby": "title" },
    el("div", { class: "between" }, el("h1", { id: "title", tabindex: "-1" }, "Sessions"),
      el("form", { class: "row", role: "search", onsubmit: (event) => event.preventDefault() },
        el("label", { class: "field" }, "Id begins with", prefix), el("label", { class: "field" }, "Label", label), wipe)),
    trouble,
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of sessions" },
      el("table", {}, caption, el("thead", {}, el("tr", {}, heads)), body)),
    el("div", { class: "between" }, where, el("div", { class: "row" }, back, next)))];

  function soon() {
    clearTimeout(asking);
    asking = setTimeout(() => {
      query = { prefix: prefix.value.trim(), label: label.value.trim() };
      cursors = [null];
      load();
    }, 200);
  }

  let loads = 0;
  async function load(marked = new Set()) {
    const own = ++loads;
    const wrong = query.label && !query.label.includes(":") ? "a label is written key:value" : "";
    try {
      if (wrong) throw new Error(wrong);
      const found = await call("/v1/sessions", { query: { ...query, order, limit: PAGE, cursor: cursors.at(-1) } });
      if (own !== loads) return;
      page = found;
      trouble.replaceChildren();
      show(marked);
    } catch (error) {
      if (own === loads) trouble.replaceChildren(failure(error));
    }
  }

  function show(marked) {
    const column = COLUMNS.find(([name]) => name === sort?.name);
    const sessions = [...page.sessions];
    if (column) sessions.sort((a, b) => {
      const [x, y] = [column[2](a), column[2](b)];
      return (x < y ? -1 : x > y ? 1 : 0) * (sort.descending ? -1 : 1);
    });
    const wanted = sessions.map((session) => {
      const row = rows.get(session.id) ?? el("tr", { "data-id": session.id });
      fill(row, session);
      if (marked.has(session.id)) { row.classList.remove("fresh"); void row.offsetWidth; row.classList.add("fresh"); }
      return row;
    });
    rows.clear();
    wanted.forEach((row) => rows.set(row.dataset.id, row));
    wanted.forEach((row, place) => { if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null); });
    while (body.children.length > wanted.length) body.lastChild.remove();
    if (!wanted.length) body.append(el("tr", {}, el("td", { colspan: COLUMNS.length, class: "empty" },
      query.prefix || query.label ? "No session matches." : "No sessions yet: they appear here as they are created.")));
    const filtered = query.prefix || query.label ? " that match" : "";
    const by = sort ? `sorted by ${column[1].toLowerCase()} among these` : order === "id" ? "by id" : "last used first";
    caption.textContent = `${counted(wanted.length, "session")}${filtered}${page.cursor || cursors.length > 1 ? " on this page" : ""}, ${by}`;
    where.textContent = cursors.length > 1 || page.cursor ? `Page ${cursors.length}` : "";
    back.hidden = next.hidden = cursors.length === 1 && !page.cursor;
    back.disabled = cursors.length === 1;
    next.disabled = !page.cursor;
    wipe.hidden = !query.label || !wanted.length;
    for (const head of heads) {
      const { name } = head.dataset, own = sort ? sort.name === name : name === (order === "id" ? "id" : "used");
      if (own) head.setAttribute("aria-sort", (sort ? sort.descending : order !== "id") ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  }

  function fill(row, session) {
    const link = row.querySelector("td.id a") ?? el("a", { href: `#/session/${encodeURIComponent(session.id)}` }, session.id);
    const labels = Object.entries(session.labels).map(([key, value]) => el("span", { class: "chip" }, `${key}:${value}`));
    const expires = endsIn(session);
    const cells = [
      [link, labels.length && el("div", { class: "chips" }, labels), session.damage && el("div", { class: "bad small" }, session.damage)],
      [number(left(session))], [number(session.num_chunks)], [bytes(session.bytes.device)], [bytes(session.bytes.stored)],
      [number(session.num_attends)], [el("span", { class: `tier ${session.residency}` }, session.residency)],
      [timeOf(session.last_used_at)],
      [expires === Infinity ? el("span", { class: "dim" }, "never") : `in ${span(expires)}`],
    ];
    if (!row.children.length) row.append(...COLUMNS.map(([, , , style]) => el("td", { class: style || null })));
    cells.forEach((content, place) => {
      const cell = row.children[place], fresh = content.filter(Boolean);
      if (place || !cell.contains(link)) cell.replaceChildren(...fresh); // what has the focus stays where it is
    });
  }

  function sortBy(name) {
    if (name === "used" || name === "id") {
      sort = null;
      order = name === "id" ? "id" : "last_used";
      cursors = [null];
      load();
    } else {
      sort = { name, descending: sort?.name === name ? !sort.descending : name !== "residency" && name !== "expires" };
      show(new Set());
    }
  }

  function turn(by) {
    if (by > 0 && page.cursor) cursors.push(page.cursor);
    if (by < 0 && cursors.length > 1) cursors.pop();
    load().then(() => say(caption.textContent));
  }

  async function wipeAll() {
    try {
      if (await deleteAll(query)) await load();
    } catch (error) { trouble.replaceChildren(failure(error)); }
  }

  const marked = new Set();
  const renew = (event) => {
    if (event.detail?.session) marked.add(event.detail.session);
    renewing ??= setTimeout(() => {
      renewing = null;
      load(new Set(marked));
      marked.clear();
    }, RENEW_MS);
  };
  for (const name of ["recall", "append", "truncate", "session", "again", "dropped"]) live.addEventListener(name, renew);
  load();
  return {
    title: "Sessions", session: null, nodes: view,
    stop() {
      clearTimeout(renewing);
      for (const name of ["recall", "append", "truncate", "session", "again", "dropped"]) live.removeEventListener(name, renew);
    },
  };
}
