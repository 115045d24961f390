// Why: what one query took and what it nearly took. First the tokens with what they say, then chunks, then near misses.

import { Refused, call, mask, of } from "./api.js";
import { clock, counted, el, failure, number, percent } from "./dom.js";

const HITS_FIRST = 6;
const BARS_FIRST = 6;
const LONG = 360;
const NEAR = 5;
const RANKED = 40;

/** What a payload says: its text, and the rest of it. */
export function said(payload) {
  if (payload === null || payload === undefined) return { text: null, rest: [] };
  const texts = Object.entries(payload).filter(([, value]) => typeof value === "string" && value.trim());
  const [name, text] = texts.find(([key]) => ["text", "content", "message", "summary", "title"].includes(key))
    ?? texts.sort((a, b) => b[1].length - a[1].length)[0] ?? [null, JSON.stringify(payload)];
  const rest = Object.entries(payload).filter(([key, value]) => key !== name && name !== null && value !== "" && value !== null)
    .map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`);
  return { text, rest };
}

export function payloadNode(payload) {
  const { text, rest } = said(payload);
  if (text === null) return el("div", { class: "dim" }, "no payload");
  const isLong = text.length > LONG, node = el("div", { class: isLong ? "text long" : "text" }, text);
  const more = isLong && el("button", { type: "button", class: "link small", "aria-expanded": "false", onclick: (event) => {
    event.target.setAttribute("aria-expanded", String(!node.classList.toggle("long")));
    event.target.textContent = node.classList.contains("long") ? "More" : "Less";
  } }, "More");
  return [node, more, rest.length > 0 && el("div", { class: "meta" }, rest.slice(0, 6).map((item) => el("span", {}, item.slice(0, 120))))];
}

const chunkLink = (chunk, onChunk) => el("button", { type: "button", class: "link", onclick: () => onChunk(chunk) }, `chunk ${number(chunk)}`);

function hit(token, onChunk, isStrong) {
  return el("li", { class: isStrong ? "hit strong" : "hit" }, payloadNode(token.payload), el("div", { class: "meta" },
    el("span", { class: "share", "aria-hidden": "true" }, el("i", { share: token.weight })), el("span", {}, `weight ${percent(token.weight)}`),
    el("span", {}, `score ${number(token.score, 2)}`), el("span", {}, `position ${number(token.position)}`), chunkLink(token.chunk, onChunk)));
}

function hits(title, tokens, onChunk) {
  const most = Math.max(...tokens.map((token) => token.weight), 1e-12);
  const item = (token, place) => hit(token, onChunk, token.weight >= most / 4 || place === 0);
  const list = el("ol", { class: "hits" }, tokens.slice(0, HITS_FIRST).map(item));
  const more = tokens.length > HITS_FIRST && el("button", { type: "button", class: "quiet", onclick: (event) => {
    list.append(...tokens.slice(HITS_FIRST).map((token, place) => item(token, place + HITS_FIRST)));
    event.target.remove();
  } }, `${counted(tokens.length - HITS_FIRST, "more token")}`);
  return [el("h3", {}, title), tokens.length ? [list, more] : el("p", { class: "dim" }, "No token was visible.")];
}

function bars(title, chunks, onChunk) {
  const row = ({ index, weight, logit }) => [
    chunkLink(index, onChunk), el("span", { class: "track", "aria-hidden": "true" }, el("i", { share: weight })),
    el("span", { class: "num" }, percent(weight)), el("span", { class: "num dim small" }, logit === undefined ? "" : `logit ${number(logit, 2)}`)];
  const [first, rest] = [chunks.slice(0, BARS_FIRST), chunks.slice(BARS_FIRST)];
  const list = el("div", { class: "bars" }, first.map(row));
  const more = rest.length > 0 && el("button", { type: "button", class: "quiet", onclick: (event) => {
    list.append(...rest.flatMap(row));
    event.target.remove();
  } }, `${counted(rest.length, "more chunk")}, ${percent(rest.reduce((sum, { weight }) => sum + weight, 0))} together`);
  return [el("h3", {}, title), list, more];
}

function nearly(near, best, last, onChunk) {
  if (!near.length) return [];
  return [el("h3", {}, "What nearly took part"), el("ol", { class: "hits" }, near.map(({ index, logit }) => {
    const token = best.get(index);
    return el("li", { class: "hit" }, token && payloadNode(token.payload), el("div", { class: "meta" }, chunkLink(index, onChunk),
      el("span", {}, `logit ${number(logit, 2)}, ${number(last - logit, 2)} less than the last one taken`),
      token && el("span", {}, `its best token: position ${number(token.position)}, score ${number(token.score, 2)}`)));
  }))];
}

/** Ask the server to explain a query; the view of it, and what to light up. `answered`: the tokens that were answered. */
export async function explanation(id, asked, onChunk, answered = null) {
  const found = await call(of(id, "/explain"), { method: "POST", body: { ...asked, limit: RANKED, return: ["payloads"], max_recalled: 16 } });
  const chunks = found.chunks.index.map((index, place) => ({ index, logit: found.chunks.logit[place], weight: found.chunks.weight[place] }));
  const taken = chunks.slice(0, found.num_taken), near = chunks.slice(found.num_taken, found.num_taken + NEAR);
  const best = new Map();
  if (near.length) {
    const session = await call(of(id));
    const num = Math.ceil((asked.stop ?? found.length) / session.chunk_size);
    const body = { ...asked, stop: asked.stop ?? found.length, top_k: near.length, chunk_mask: mask(num, near.map(({ index }) => index)), limit: 1, return: ["payloads"], max_recalled: 64, rank_by: "score" };
    const others = await call(of(id, "/explain"), { method: "POST", body }).catch(() => null); // trimmed, or longer meanwhile
    for (const token of others?.recalled[0] ?? []) if (!best.has(token.chunk)) best.set(token.chunk, token);
  }
  const tokens = answered ?? found.recalled[0];
  const node = [
    hits(answered ? "What it answered" : "What weighed most", tokens, onChunk),
    bars(`${counted(found.num_taken, "chunk")} of ${number(found.num_visible)} taken`, taken, onChunk),
    nearly(near, best, taken.at(-1)?.logit ?? 0, onChunk)];
  return { node, taken: taken.map(({ index, weight }) => [index, weight]), near: near.map(({ index }) => index), weights: new Map(found.recalled[0].map((token) => [token.position, token.weight])), found };
}

/** Tokens of an account, which keeps no payloads, with theirs: a read for each chunk that they are in. */
async function withPayloads(id, tokens) {
  const groups = new Map();
  for (const token of tokens) groups.set(token.chunk, [...(groups.get(token.chunk) ?? []), token.position]);
  const payloads = new Map();
  await Promise.all([...groups.values()].map(async (positions) => {
    const start = Math.min(...positions);
    const found = await call(of(id, "/memories"), { query: { start, stop: Math.max(...positions) + 1, include: "payloads" } });
    found.payloads.forEach((payload, place) => payloads.set(found.start + place, payload));
  }));
  return tokens.map((token) => ({ ...token, payload: payloads.get(token.position) ?? null }));
}

export const titleOf = (recall) => recall.note || `Recall at ${clock(recall.at)}`;

/** The view of one query of a recall. The first is explained anew, as of then; of others there is the account. */
export async function why(id, recall, place, onChunk) {
  const stored = recall.chunks.index[place].map((index, at) => ({ index, weight: recall.chunks.weight[place][at] })).filter(({ index }) => index >= 0);
  const account = recall.recalled?.[place] ?? null;
  const notes = [];
  let view = null;
  if (recall.query && place === 0) {
    try {
      const asked = { queries: recall.query, model: recall.model, top_k: recall.top_k, start: recall.start, stop: recall.stop, episodes: recall.episodes ?? undefined };
      view = await explanation(id, asked, onChunk, account && (await withPayloads(id, account)));
      const now = view.taken.map(([index]) => index).join(), then = stored.map(({ index }) => index).join();
      const has = view.found.model_hash;
      if (has !== recall.model_hash) notes.push(`The model has other weights since, ${has.slice(0, 8)} instead of ${recall.model_hash.slice(0, 8)}: the ranking below is theirs.`);
      if (recall.is_masked) notes.push("It was asked with masks, which are not kept: the ranking below is without them.");
      else if (now !== then && has === recall.model_hash) notes.push("The session has changed since: the ranking below is as it would be answered now.");
    } catch (error) {
      if (!(error instanceof Refused) || ![404, 422].includes(error.status)) throw error;
      notes.push(`It cannot be explained anew: ${error.message}.`);
    }
  } else notes.push(place ? "Only the first query of a recall is kept; of this one there is the account." : "The query is too wide to be kept; there is the account.");
  if (!view) view = { node: [account && hits("What it answered", await withPayloads(id, account), onChunk), bars(`${counted(stored.length, "chunk")} taken`, stored, onChunk)], near: [], weights: new Map((account ?? []).map((token) => [token.position, token.weight])) };
  return { ...view, taken: stored.map(({ index, weight }) => [index, weight]), node: [notes.map((note) => el("p", { class: "dim small" }, note)), view.node] };
}

/** What is asked for a person's own query: a pasted vector, or the text of a position. */
export function tryIt(id, session, onFound, onChunk) {
  const vector = el("textarea", { id: "vector", spellcheck: "false", placeholder: "[0.12, -0.4, …]" });
  const position = el("input", { type: "number", min: session.first_position, id: "position", placeholder: "position" });
  const top = el("input", { type: "number", min: 1, max: 256, id: "top-k", placeholder: "model's" });
  const answer = el("div", { class: "card", hidden: true, "aria-live": "polite" });
  async function ask(event) {
    event?.preventDefault();
    answer.hidden = false;
    try {
      let queries;
      if (position.value !== "") {
        const at = Number(position.value);
        const read = await call(of(id, "/memories"), { query: { start: at, stop: at + 1, include: "embeddings" } });
        if (read.start !== at) throw new Error(`the token at position ${at} was trimmed`);
        queries = read.embeddings[0];
      } else {
        queries = vector.value.replace(/[[\]]/g, " ").split(/[\s,;]+/).filter(Boolean).map(Number);
        const wrong = queries.findIndex(Number.isNaN);
        if (!queries.length) throw new Error("paste a vector, or name a position");
        if (wrong >= 0) throw new Error(`value ${wrong + 1} of the vector is no number`);
        if (queries.length !== session.dim) throw new Error(`the vector has ${queries.length} values, the session's tokens have ${session.dim}`);
      }
      const found = await explanation(id, { queries, top_k: top.value ? Number(top.value) : undefined }, onChunk);
      answer.replaceChildren(...[found.node].flat(9).filter(Boolean));
      onFound(found);
    } catch (error) { answer.replaceChildren(failure(error)); }
  }
  const form = el("form", { class: "card", onsubmit: ask }, el("h2", {}, "Try it"),
    el("p", { class: "dim small" }, "What would an attend recall? It does not count as a recall."),
    el("label", { class: "field" }, `A vector of ${session.dim} numbers`, vector),
    el("div", { class: "row" }, el("label", { class: "field" }, "or a stored token", position), el("label", { class: "field" }, "Chunks to take", top),
      el("button", { type: "submit", class: "main" }, "Ask")));
  return { node: el("div", { class: "columns" }, form, answer), pick(at) { position.value = at; form.scrollIntoView({ block: "nearest" }); ask(); } };
}
