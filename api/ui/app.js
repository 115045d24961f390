// Where one is on the page, its header, and the sign-in.

import { forgetKey, keepKey, keepNamespace, key, namespace, onUnauthenticated } from "./api.js";
import { $, ask, brief, bytes, el, milliseconds, percent, renewTimes } from "./dom.js";
import { hasRequests, history, info, listen, live, lookAnew, watch } from "./live.js";
import { serverView } from "./server.js";
import { sessionView } from "./session.js";
import { sessionsView } from "./sessions.js";

let view = null;

function show() {
  const [, name, id] = /^#\/(?:(session|server)(?:\/(.+))?)?$/.exec(location.hash) ?? [];
  view?.stop();
  view = name === "session" && id ? sessionView(decodeURIComponent(id)) : name === "server" ? serverView() : sessionsView();
  $("main").replaceChildren(...view.nodes);
  document.title = `${view.title} · htm-service`;
  for (const [link, own] of [["to-sessions", name !== "server"], ["to-server", name === "server"]])
    if (own) $(link).setAttribute("aria-current", "page"); else $(link).removeAttribute("aria-current");
  listen(view.session);
  scrollTo(0, 0);
}

function figures({ detail: now }) {
  whoAsks();
  const budget = info.limits.memory_budget_bytes, counts = hasRequests(), last = (name) => history.findLast((sample) => sample[name] !== null)?.[name];
  const shown = [
    [counts ? "requests/s" : "attends/s", brief(counts ? now.requests : now.attends)],
    ...(counts ? [["p50", milliseconds(last("p50"))], ["p99", milliseconds(last("p99"))], ["errors/s", brief(now.errors)]] : []),
    ["batch", brief(last("batch"))], ["waiting", brief(now.waiting)], ["memory", now.device === null ? "–" : percent(now.device / budget), ` of ${bytes(budget)}`],
    ["sessions", brief(now.totals.sessions)], ["tokens", brief(now.totals.tokens)]].filter(([name, value]) => value !== "–" || name === "p50" || name === "p99");
  $("figures").replaceChildren(...shown.map(([name, value, rest]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, rest && el("small", { class: "mid" }, rest)))));
}

/** What the key may do, and where: what it may not is not offered; of all namespaces one is looked at. */
function whoAsks() {
  document.body.classList.toggle("reads", info.caller?.role === "read");
  const button = $("namespace"), all = info.caller?.opens === "*";
  button.hidden = !info.caller || (!all && info.caller.namespace === "default");
  button.disabled = !all;
  button.textContent = info.caller ? `namespace ${info.caller.namespace}` : "";
}
$("namespace").addEventListener("click", async () => {
  const form = await ask("Look at another namespace", [el("label", { class: "field" }, "Namespace", el("input", { name: "namespace", value: namespace() ?? "", placeholder: "default", autocomplete: "off" }))], "Look");
  if (!form) return;
  keepNamespace(form.elements.namespace.value.trim());
  location.hash = "#/";
  location.reload();
});

onUnauthenticated(async () => {
  const wrong = key() !== null;
  forgetKey();
  const form = await ask("Sign in", [
    el("p", { class: wrong ? "bad" : "dim" }, wrong ? "The server does not take this key." : "This server asks for a key. It is kept in this tab only, until it is closed."),
    el("label", { class: "field" }, "Key", el("input", { type: "password", name: "key", required: true, autocomplete: "off", autofocus: true }))],
  "Sign in", { cancel: false });
  keepKey(form.elements.key.value.trim());
  $("sign-out").hidden = false;
  lookAnew();
  return true;
});
$("sign-out").hidden = key() === null;
$("sign-out").addEventListener("click", () => { forgetKey(); location.reload(); });
$("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
live.addEventListener("state", ({ detail }) => { $("state").className = `state ${detail}`; $("state").textContent = detail === "live" ? "live" : "reconnecting"; });
live.addEventListener("figures", figures);
addEventListener("hashchange", () => { show(); $("title")?.focus({ preventScroll: true }); });
setInterval(renewTimes, 5000);
show();
watch();
