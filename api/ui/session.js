// One session: what it is, its chunks as a strip, its recalls as they come and why, its tokens, its growth, a query to try.

import { call, of } from "./api.js";
import { $, ask, brief, bytes, clock, counted, el, failure, number, percent, say, span, timeOf, when } from "./dom.js";
import { live } from "./live.js";
import { plot } from "./plot.js";
import { exportButton } from "./export.js";
import { deleteAll } from "./sessions.js";
import { strip } from "./strip.js";
import { payloadNode, titleOf, tryIt, why } from "./why.js";

const KEPT = 200;
const RENEW_MS = 700;

/** The first letters of a hash, which tell weights apart. */
const short = (hash) => hash.slice(0, 8);

/** Of recalls, newest first, those by other weights than the recall before by a model of the same name. */
function swapsOf(recalls) {
  const last = new Map(), found = new Set();
  for (const recall of [...recalls].reverse()) {
    const before = last.get(recall.model);
    if (before !== undefined && before !== recall.model_hash) found.add(recall);
    last.set(recall.model, recall.model_hash);
  }
  return found;
}

export function sessionView(id) {
  let session = null, recalls = [], shown = null, weights = new Map(), renewing = null, isGone = false, isOpen = true;
  const growth = [];
  const title = el("h1", { id: "title", tabindex: "-1" }, id);
  const labels = el("div", { class: "chips" }), facts = el("dl", { class: "facts" }), trouble = el("div");
  const list = el("ol", { class: "recalls", "aria-label": "Recalls, newest first" });
  const counter = el("span", { class: "dim small" });
  const reason = el("section", { class: "card", "aria-label": "Why", id: "why" }, el("h2", {}, "Why"), el("p", { class: "dim" }, "Choose a recall to see what it took, and why."));
  const tokens = el("section", { class: "card", hidden: true, "aria-labelledby": "tokens-title" });
  const drawing = strip(id, (chunk) => showChunk(chunk));
  const grown = plot("Tokens", brief, { steps: true }), often = plot("Recalls per minute", (value) => brief(value));
  const trial = el("div");
  let tried = null;
  const cuts = [el("button", { type: "button", class: "writes", disabled: true, onclick: branch }, "Fork…"), el("button", { type: "button", class: "danger", disabled: true, onclick: forget }, "Truncate…")];  // until its length is known
  const nodes = [
    el("section", { class: "card", "aria-labelledby": "title" }, el("div", { class: "between" }, el("div", {}, el("a", { href: "#/", class: "small" }, "All sessions"), title),
      el("div", { class: "row" }, exportButton(id), cuts,
        el("button", { type: "button", class: "danger", onclick: remove }, "Delete…"))), labels, trouble, facts),
    el("section", { class: "card", "aria-label": "Chunks" }, drawing.node),
    el("div", { class: "columns" }, el("section", { class: "card follow", "aria-label": "Recalls" }, el("div", { class: "between" }, el("h2", {}, "Recalls"), counter), list), reason),
    tokens,
    el("section", { class: "card", "aria-label": "Over time" }, el("h2", {}, "Over time"), el("div", { class: "plots" }, grown.figure, often.figure)),
    trial];

  const fact = (name, ...value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  async function load() {
    try {
      session = await call(of(id));
      if (!isOpen) return;
      for (const button of cuts) button.disabled = false;
      trouble.replaceChildren(...(session.damage ? [failure(new Error(session.damage))] : []));
      labels.replaceChildren(...Object.entries(session.labels).map(([key, value]) => el("span", { class: "chip" }, `${key}:${value}`)));
      facts.replaceChildren(
        fact("Tokens", number(session.length - session.first_position), session.first_position ? el("span", { class: "dim" }, ` from ${number(session.first_position)}`) : ""),
        fact("Chunks", number(session.num_chunks), el("span", { class: "dim" }, ` of ${session.chunk_size}`)), fact("Width", number(session.dim), el("span", { class: "dim" }, ` ${session.dtype}`)),
        fact("Model", session.model), fact("Where", el("span", { class: `tier ${session.residency}` }, session.residency)),
        fact("On the device", bytes(session.bytes.device)), fact("Stored", bytes(session.bytes.stored)),
        fact("Recalls", number(session.num_attends), session.num_queries !== session.num_attends && el("span", { class: "dim" }, ` of ${number(session.num_queries)} queries`)),
        fact("Last used", timeOf(session.last_used_at)), fact("Last append", timeOf(session.updated_at)), fact("Created", timeOf(session.created_at)),
        fact("Expires", session.ttl_s === null ? el("span", { class: "dim" }, "never") : `after ${span(session.ttl_s)} idle`),
        ...(session.max_tokens === null ? [] : [fact("At most", number(session.max_tokens), el("span", { class: "dim" }, session.on_full === "reject" ? " then refused" : " then oldest go"))]));
      drawing.update(session);
      if (!tried) {
        tried = tryIt(id, session, (found) => light(found), showChunk);
        trial.replaceChildren(tried.node);
      }
      remember(Date.parse(session.updated_at), session.length);
      drawPlots();
    } catch (error) {
      if (isGone) return;
      trouble.replaceChildren(failure(error));
    }
  }

  function remember(at, length) {
    growth.push([at, length]);
    growth.sort((a, b) => a[0] - b[0]);
    if (growth.length > 4 * KEPT) growth.shift();
  }
  function drawPlots() {
    if (!session) return;
    const swaps = [...swapsOf(recalls)], marks = swaps.map((recall) => [Date.parse(recall.at), `model ${recall.model} has the weights ${short(recall.model_hash)} from here on`]);
    drawing.mark(swaps.map((recall) => recall.length));
    grown.draw([[[Date.parse(session.created_at), 0], ...growth, [Date.now(), session.length]].sort((a, b) => a[0] - b[0])], { marks });
    if (!recalls.length) { often.draw([[]]); return; }
    const times = recalls.map((recall) => Date.parse(recall.at)), last = Date.now(), first = Math.min(...times), bins = 30, wide = Math.max(1000, (last - first) / bins);
    const counts = Array.from({ length: bins }, () => 0);
    for (const at of times) counts[Math.min(bins - 1, Math.floor((at - first) / wide))] += 1;
    often.draw([counts.map((count, place) => [first + (place + 0.5) * wide, (count * 60000) / wide])], { since: first, marks });
  }

  async function loadRecalls() {
    try {
      ({ recalls } = await call(of(id, "/recalls"), { query: { limit: KEPT } }));
      for (const recall of recalls) remember(Date.parse(recall.at), recall.length);
      const swaps = swapsOf(recalls);
      list.replaceChildren(...recalls.map((recall) => item(recall, false, swaps.has(recall))));
      counted_();
      drawPlots();
      if (recalls.length && !shown && recalls[0].chunks.index.length) choose(recalls[0], false);
    } catch (error) { if (!isGone) list.replaceChildren(el("li", {}, failure(error))); }
  }
  function counted_() {
    counter.textContent = recalls.length ? `the last ${number(recalls.length)}, as they come` : "";
    if (!recalls.length) list.replaceChildren(el("li", { class: "empty" }, "Nothing was recalled since the server started. Recalls appear here as they come."));
  }
  const sameRecall = (a, b) => a && b && a.at === b.at && a.request_id === b.request_id;

  function item(recall, isNew, isSwap) {
    const shares = recall.chunks.weight[0] ?? [];
    return el("li", { class: isNew ? "fresh" : null }, el("button", { type: "button", "aria-pressed": String(sameRecall(recall, shown)), "data-at": recall.at, onclick: () => choose(recall) },
      el("span", { class: "ask" }, recall.note || el("span", { class: "dim" }, "no note")),
      el("span", { class: "shares", "aria-hidden": "true" }, shares.slice(0, 16).filter((weight) => weight > 0.004).map((weight) => el("i", { share: weight }))),
      el("span", { class: "meta" }, el("time", { datetime: recall.at, title: when(recall.at) }, clock(recall.at)), el("span", {}, counted(recall.chunks.index[0]?.filter((index) => index >= 0).length ?? 0, "chunk")),
        isSwap && el("span", { class: "chip", title: `weights ${recall.model_hash}` }, "other weights"), recall.num_queries > 1 && el("span", {}, `${recall.num_queries} queries`), el("span", {}, `at length ${number(recall.length)}`))));
  }

  let choosing = 0;
  async function choose(recall, isAsked = true, place = 0) {
    const own = ++choosing;
    shown = recall;
    for (const button of list.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.at === recall.at));
    const others = recall.chunks.index.length > 1 && el("label", { class: "field" }, `Query of ${number(recall.num_queries)}`,
      el("select", { onchange: (event) => choose(recall, false, Number(event.target.value)) }, recall.chunks.index.map((_, at) => el("option", { value: at, selected: at === place }, String(at + 1)))));
    const head = [el("div", { class: "between" }, el("h2", {}, recall.note ? `“${recall.note}”` : titleOf(recall)), others),
      el("p", { class: "meta" }, el("span", {}, when(recall.at)), el("span", {}, `model ${recall.model}`), el("span", { class: "mono", title: recall.model_hash }, `weights ${short(recall.model_hash)}`), el("span", {}, `top ${recall.top_k}`),
        el("span", {}, `positions ${number(recall.start)} to ${number(recall.stop)} of ${number(recall.length)}`), recall.request_id && el("span", { class: "mono" }, recall.request_id))];
    try {
      const { recalls: kept } = await call(of(id, "/recalls"), { query: { limit: KEPT, include: "query" } });
      const whole = kept.find((one) => sameRecall(one, recall)) ?? recall;
      const found = await why(id, whole, place, (chunk) => showChunk(chunk));
      if (own !== choosing) return;
      reason.replaceChildren(...[head, found.node].flat(9).filter(Boolean));
      light(found);
      if (isAsked && reason.getBoundingClientRect().top > innerHeight * 0.8) reason.scrollIntoView({ block: "start" });
    } catch (error) { if (own === choosing) reason.replaceChildren(...head.flat(9).filter(Boolean), failure(error)); }
  }

  function light(found) {
    weights = found.weights;
    drawing.light(found.taken, found.near);
  }

  let opening = 0;
  async function showChunk(index) {
    const own = ++opening;
    try {
      const { chunk, payloads } = await call(of(id, `/chunks/${index}`));
      if (own !== opening) return;
      drawing.show(index);
      const rows = payloads.map((payload, place) => {
        const position = chunk.start + place, weight = weights.get(position);
        return el("tr", { class: weight === undefined ? null : "taken" }, el("td", { class: "num" }, number(position)), el("td", {}, payloadNode(payload)),
          el("td", { class: "num" }, weight === undefined ? "" : percent(weight)),
          el("td", { class: "num" }, el("button", { type: "button", class: "link", onclick: () => tried?.pick(position), "aria-label": `Try the token at position ${position} as a query` }, "Try")));
      });
      tokens.hidden = false;
      tokens.replaceChildren(el("div", { class: "between" }, el("h2", { id: "tokens-title", tabindex: "-1" }, `Chunk ${number(index)}`),
        el("div", { class: "row" }, el("button", { type: "button", disabled: chunk.start === 0, onclick: () => showChunk(index - 1) }, "Before"), el("button", { type: "button", disabled: !session || index + 1 >= session.num_chunks, onclick: () => showChunk(index + 1) }, "After"),
          el("button", { type: "button", onclick: () => { tokens.hidden = true; } }, "Close"))),
      el("p", { class: "meta" }, el("span", {}, `positions ${number(chunk.start)} to ${number(chunk.stop - 1)}`), el("span", {}, chunk.sealed ? "sealed" : "open"), el("span", { class: `tier ${chunk.tier}` }, chunk.tier),
        el("span", {}, `taken ${number(chunk.num_recalls)} ×`), el("span", {}, `attention ${number(chunk.mass, 2)}`), chunk.last_recalled_at && el("span", {}, "last ", timeOf(chunk.last_recalled_at))),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Tokens of chunk ${index}` }, el("table", {}, el("caption", { class: "unseen" }, `Tokens of chunk ${index}`), el("thead", {}, el("tr", {}, ["Position", "Payload", "Weight", ""].map((name, at) =>
        at === 3 ? el("td") : el("th", { scope: "col", class: at === 1 ? null : "num" }, name)))), el("tbody", {}, rows))));
      $("tokens-title").focus({ preventScroll: true });
      const first = tokens.querySelector("tr.taken");
      (first ?? tokens).scrollIntoView({ block: first ? "center" : "start" });
    } catch (error) {
      tokens.hidden = false;
      tokens.replaceChildren(failure(error));
    }
  }

  async function remove() {
    const named = Object.entries(session?.labels ?? {}).map(([key, value]) => `${key}:${value}`);
    const form = await ask(`Delete ${id}?`, [
      el("p", {}, `${session ? counted(session.length - session.first_position, "token") : "Its tokens"}, with payloads and recalls, go for good.`),
      named.length > 0 && el("label", { class: "field" }, "What goes", el("select", { name: "what" }, el("option", { value: "" }, "this session"), named.map((label) => el("option", { value: label }, `all sessions with the label ${label}`))))],
    "Delete", { danger: true });
    if (!form) return;
    const label = form.elements.what?.value;
    try {
      isGone = true;
      if (label) isGone = await deleteAll({ label });
      else await call(of(id), { method: "DELETE" });
      if (isGone) location.hash = "#/";
    } catch (error) {
      isGone = false;
      trouble.replaceChildren(failure(error));
    }
  }

  const at = (length) => el("label", { class: "field" }, "Length", el("input", { name: "until", type: "number", required: true, min: 0, max: session.length, value: length }));

  async function branch() {
    const form = await ask(`Fork ${id}?`, [
      el("p", {}, "A new session with its first tokens, which the two share: nothing is copied, and each goes on by itself."),
      el("label", { class: "field" }, "New session", el("input", { name: "fork", placeholder: "named by the server", pattern: "[A-Za-z0-9._~\\-]{1,128}" })), at(session.length)], "Fork");
    if (!form) return;
    const body = { length: Number(form.elements.until.value), ...(form.elements.fork.value && { id: form.elements.fork.value }) };
    try {
      const { id: made } = await call(of(id, "/fork"), { method: "POST", body });
      location.hash = `#/session/${encodeURIComponent(made)}`;
    } catch (error) { trouble.replaceChildren(failure(error)); }
  }

  async function forget() {
    const form = await ask(`Truncate ${id}?`, [el("p", {}, "All tokens from this position on, with payloads and recalls, go for good. 0 forgets all."), at(session.length)], "Truncate", { danger: true });
    if (!form) return;
    try {
      await call(of(id, "/truncate"), { method: "POST", body: { length: Number(form.elements.until.value), if_length: session.length } });
      await load();
      await loadRecalls();
    } catch (error) { trouble.replaceChildren(failure(error)); }
  }

  function renew() {
    renewing ??= setTimeout(() => { renewing = null; load(); }, RENEW_MS);
  }
  const heard = {
    recall({ detail }) {
      recalls = [detail, ...recalls].slice(0, KEPT);
      if (recalls.length === 1) list.replaceChildren();
      list.prepend(item(detail, true, swapsOf(recalls).has(detail)));
      while (list.children.length > KEPT) list.lastChild.remove();
      counted_();
      remember(Date.parse(detail.at), detail.length);
      say(`New recall: ${titleOf(detail)}`, { often: true });
      if (!shown && detail.chunks.index.length) choose(detail, false);
      renew();
    },
    append({ detail }) { remember(Date.parse(detail.at), detail.length); renew(); },
    truncate({ detail }) {
      remember(Date.parse(detail.at), detail.length);
      drawing.cut(detail.length);
      say(`Truncated to ${counted(detail.length, "token")}`);
      loadRecalls();
      renew();
    },
    session({ detail }) {
      if (detail.change === "deleted") { isGone = true; trouble.replaceChildren(failure(new Error("This session was deleted."))); } else { isGone = false; renew(); }
    },
    dropped() { loadRecalls(); renew(); },
    again() { loadRecalls(); renew(); },
  };
  for (const [name, act] of Object.entries(heard)) live.addEventListener(name, act);
  load().then(loadRecalls);
  return {
    title: id, session: id, nodes,
    stop() {
      isOpen = false;
      clearTimeout(renewing);
      drawing.stop();
      for (const [name, act] of Object.entries(heard)) live.removeEventListener(name, act);
    },
  };
}
