// The calls of the server, with the key of this tab where one is needed; and its events.

const KEY = "htm-service key", NAMESPACE = "htm-service namespace";
let signingIn = null;
let signIn = async () => false;

export const key = () => sessionStorage.getItem(KEY);
export const keepKey = (text) => sessionStorage.setItem(KEY, text);
export const forgetKey = () => { sessionStorage.removeItem(KEY); sessionStorage.removeItem(NAMESPACE); };
/** Of a key that opens all namespaces: the one that is looked at. */
export const namespace = () => sessionStorage.getItem(NAMESPACE);
export const keepNamespace = (text) => (text ? sessionStorage.setItem(NAMESPACE, text) : sessionStorage.removeItem(NAMESPACE));
export const onUnauthenticated = (ask) => { signIn = ask; };

/** An answer that is an error, with its code. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `the server answers ${status}`);
    this.status = status;
    this.code = problem.code || "";
  }
}

async function send(path, { method = "GET", query = {}, body, accept = "application/json", signal } = {}) {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(query))
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") url.searchParams.append(name, one);
  while (true) {
    const used = key();
    const headers = { Accept: accept };
    if (used) headers.Authorization = `Bearer ${used}`;
    if (namespace() && path !== "/metrics") headers["X-HTM-Namespace"] = namespace();
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(url, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    if (response.status === 401 && (key() !== used || (await asked()))) continue; // signed in meanwhile, or now
    throw new Refused(response.status, problem);
  }
}

/** Ask for a key, once for all calls that wait for it. */
async function asked() {
  signingIn ??= signIn().finally(() => { signingIn = null; });
  return signingIn;
}

export async function call(path, options) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}
/** An answer whose body is read as it comes. */
export const stream = (path) => send(path, { accept: "application/x-safetensors" });
export const text = async (path) => (await send(path, { accept: "text/plain" })).text();
export const of = (id, rest = "") => `/v1/sessions/${encodeURIComponent(id)}${rest}`;

/** A mask of `length` values that are false but at `places`, as the server takes it. */
export function mask(length, places) {
  const values = new Uint8Array(length);
  for (const place of places) values[place] = 1;
  let binary = "";
  for (let at = 0; at < length; at += 32768) binary += String.fromCharCode(...values.subarray(at, at + 32768));
  return { b64: btoa(binary), shape: [length], dtype: "bool" };
}

/** Read server-sent events until they end: not by EventSource, which sends no key. */
export async function events(session, signal, onOpen, onEvent) {
  const response = await send("/v1/events", { query: { session }, accept: "text/event-stream", signal });
  onOpen();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]));
      if (fields.event) onEvent(fields.event, JSON.parse(fields.data));
    }
  }
}
