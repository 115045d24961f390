// The server: device and why, memory against its budget, and what it does, as small plots that go on.

import { brief, bytes, el, milliseconds, number, percent } from "./dom.js";
import { hasRequests, history, info, live } from "./live.js";
import { plot } from "./plot.js";

export function serverView() {
  const facts = el("dl", { class: "facts" }), memory = el("div", { class: "gauge" }), limits = el("dl", { class: "facts" });
  const plots = {
    rate: plot("Requests per second", (value) => brief(value)),
    latency: plot("Latency", milliseconds, { names: ["p50", "p99"] }),
    batch: plot("Queries per batch", (value) => brief(value)),
    waiting: plot("Waiting", (value) => brief(value)),
    device: plot("Device memory", bytes),
    errors: plot("Failed requests per second", (value) => brief(value)),
  };
  const hint = el("p", { class: "dim small" });
  const nodes = [
    el("section", { class: "card", "aria-labelledby": "title" }, el("h1", { id: "title", tabindex: "-1" }, "Server"), facts, memory),
    el("section", { class: "card", "aria-label": "Figures" }, el("h2", {}, "What it does"), hint, el("div", { class: "plots" }, Object.values(plots).map(({ figure }) => figure))),
    el("section", { class: "card", "aria-label": "Limits and totals" }, el("h2", {}, "Limits and totals"), limits)];
  const fact = (name, value, why) => el("div", {}, el("dt", {}, name), el("dd", {}, value, why && el("div", { class: "dim small" }, why)));

  function show() {
    if (!info) return;
    const { totals } = info, budget = info.limits.memory_budget_bytes;
    facts.replaceChildren(fact("Version", info.version), fact("Device", info.device, info.device_reason), fact("Kernel", info.kernel, info.kernel_reason), fact("Tokens are kept as", info.dtype, info.dtype_reason),
      fact("Models", info.models.join(", ")), fact("Sessions", number(totals.sessions), totals.resident_sessions !== undefined && `${number(totals.resident_sessions)} on the device`), fact("Tokens", number(totals.tokens)), fact("On disk", bytes(totals.disk_bytes || totals.stored_bytes)));
    memory.hidden = plots.waiting.figure.hidden = plots.device.figure.hidden = plots.batch.figure.hidden = plots.rate.figure.hidden = totals.device_bytes === undefined; // a key of one namespace sees that alone
    const used = totals.device_bytes / budget, keys = totals.device_key_bytes / budget;
    if (!memory.hidden) memory.replaceChildren(el("div", { class: "between small" }, el("span", {}, "Device memory"), el("span", { class: "dim" }, `${bytes(totals.device_bytes)} of ${bytes(budget)} (${percent(used)}), ${bytes(totals.device_key_bytes)} of it summary keys`)),
      el("div", { class: "track", role: "img", "aria-label": `${percent(used)} of the device's budget is in use` }, el("i", { class: "keys", share: keys }), el("i", { share: used - keys })));
    const line = (name) => history.map((sample) => [sample.at, sample[name]]);
    const counts = hasRequests();
    plots.rate.figure.querySelector("figcaption span").textContent = counts ? "Requests per second" : "Attends per second";
    plots.rate.draw([line(counts ? "requests" : "attends")]);
    plots.latency.draw([line("p50"), line("p99")]);
    plots.batch.draw([line("batch")]);
    plots.waiting.draw([line("waiting")]);
    plots.device.draw([line("device")], { bound: budget <= totals.device_bytes * 4 ? budget : null });
    plots.errors.draw([line("errors")]);
    hint.textContent = counts ? "" : "Rates of requests, latency and errors come from /metrics, which this server or this key does not show.";
    hint.hidden = counts;
    plots.latency.figure.hidden = plots.errors.figure.hidden = !counts;
    limits.replaceChildren(...Object.entries({ ...info.limits, ...totals }).map(([name, value]) => fact(name.replaceAll("_", " ").replace(/ bytes$/, ""), name.endsWith("_bytes") ? bytes(value) : number(value))));
  }
  live.addEventListener("figures", show);
  show();
  return { title: "Server", session: null, nodes, stop() { live.removeEventListener("figures", show); } };
}
