// What changes by itself: the events of the server, and its figures every two seconds, with some minutes of the past.

import { call, events, text } from "./api.js";

const EVERY_MS = 2000;
const KEPT = 150;
/** `recall`, `append`, `session` and `dropped` as they are told; `state`; `figures`; `again` after a gap. */
export const live = new EventTarget();
export const history = [];
export let info = null;

let stream = null;
let listening = Symbol();
let state = "connecting";
let hasMetrics = true;

const tell = (name, detail) => live.dispatchEvent(new CustomEvent(name, { detail }));
function become(next) {
  if (next === state) return;
  state = next;
  tell("state", state);
}

/** Listen to one session, or to all; again and again, should the server go. */
export async function listen(session) {
  stream?.abort();
  const own = (listening = Symbol());
  for (let delay = 500, isFirst = true; own === listening; delay = Math.min(delay * 2, 8000), isFirst = false) {
    stream = new AbortController();
    try {
      await events(session, stream.signal, () => {
        delay = 250;
        become("live");
        if (!isFirst) tell("again");
      }, tell);
    } catch (error) {
      if (error.status === 401 || error.status === 403) { if (own === listening) become("lost"); return; }
    }
    if (own !== listening) return;
    become("lost");
    await new Promise((wake) => setTimeout(wake, delay));
  }
}

/** Prometheus text as [name, labels, value]. */
export function parseMetrics(source) {
  const rows = [];
  for (const line of source.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    rows.push([found[1], labels, found[3] === "+Inf" ? Infinity : Number(found[3])]);
  }
  return rows;
}

/** Calls that a page like this one makes by itself, and those that nobody waits for: they are not what the server does. */
const ASIDE = new Set(["info", "metrics", "events", "livez", "readyz", "other"]);

/** Sums of counters by what matters here, and the buckets of the requests' times. */
export function summary(rows) {
  const sum = (name, is = () => true) => {
    const own = rows.filter(([one, labels]) => one === name && is(labels));
    return own.reduce((total, [, , value]) => total + value, 0);
  };
  const counts = ({ call: of }) => !ASIDE.has(of), ofDevice = ({ queue }) => queue === "device";
  const buckets = new Map();
  for (const [name, labels, value] of rows) {
    if (name !== "htm_request_seconds_bucket" || !counts(labels)) continue;
    const le = labels.le === "+Inf" ? Infinity : Number(labels.le);
    buckets.set(le, (buckets.get(le) || 0) + value);
  }
  return {
    requests: sum("htm_requests_total", counts),
    failed: sum("htm_requests_total", (labels) => counts(labels) && labels.status >= "500"),
    batches: sum("htm_batch_items_count", ofDevice),
    items: sum("htm_batch_items_sum", ofDevice),
    buckets: [...buckets].sort((a, b) => a[0] - b[0]),
  };
}

/** The time within which a share of the requests between two samples were answered; null when there were none. */
export function quantile(share, now, before) {
  const counts = now.map(([le, count], place) => [le, count - (before[place]?.[1] ?? 0)]);
  const all = counts.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return null;
  let low = 0, under = 0;
  for (const [le, count] of counts) {
    if (count >= share * all) return le === Infinity ? low : low + ((le - low) * (share * all - under)) / Math.max(1, count - under);
    [low, under] = [le, count];
  }
  return low;
}

async function metrics() {
  if (!hasMetrics) return null;
  try {
    return summary(parseMetrics(await text("/metrics")));
  } catch (error) {
    hasMetrics = !error.status; // not there, or not for this key
    return null;
  }
}

const ratio = (items, batches) => (batches > 0 ? items / batches : null);

async function look() {
  const [found, counters] = await Promise.all([call("/v1/info"), metrics()]);
  info = found;
  const sample = { at: Date.now(), totals: found.totals, counters };
  const last = history.at(-1);
  const per = (now, before) => (last && now >= before ? ((now - before) * 1000) / (sample.at - last.at) : null);
  const before = last?.counters;
  sample.attends = per(found.totals.attends, last?.totals.attends);
  sample.requests = counters && before ? per(counters.requests, before.requests) : null;
  sample.errors = counters && before ? per(counters.failed, before.failed) : null;
  sample.p50 = counters && before ? quantile(0.5, counters.buckets, before.buckets) : null;
  sample.p99 = counters && before ? quantile(0.99, counters.buckets, before.buckets) : null;
  const batches = last && found.totals.batches - last.totals.batches;
  sample.batch = counters && before ? ratio(counters.items - before.items, counters.batches - before.batches)
    : batches > 0 ? Math.max(1, (found.totals.attended_queries - last.totals.attended_queries) / batches) : null;
  sample.waiting = found.totals.waiting_device === undefined ? null : found.totals.waiting_device + found.totals.waiting_store; // not of one namespace
  sample.device = found.totals.device_bytes ?? null;
  history.push(sample);
  if (history.length > KEPT) history.shift();
  tell("figures", sample);
}

export const hasRequests = () => history.at(-1)?.counters != null;

/** Figures from now on; not while nobody looks. */
export async function watch() {
  while (true) {
    if (!document.hidden) await look().catch((error) => { if (!error.status) become("lost"); });
    await new Promise((wake) => setTimeout(wake, EVERY_MS));
  }
}
/** Another key may see what this one could not. */
export const lookAnew = () => { hasMetrics = true; };
