// A session's chunks over time as a strip: the attention they received above, where they are below, and what one recall
// took. It can be zoomed and moved by wheel (with Ctrl), drag, buttons and keys, and bears any number of chunks: it draws runs of them.

import { call, of } from "./api.js";
import { counted, el, number, say } from "./dom.js";

const HEAT = 74, STATE = 12, TOP = 16;
const NARROWEST = 8;

export function strip(id, onChunk) {
  let size = 1, total = 0, length = 0, firstChunk = 0;
  let view = { first: 0, last: 0 }, data = null, taken = new Map(), near = new Set(), swaps = [], cursor = null, dragged = null, asked = 0, waiting = null, cuts = [];
  const canvas = el("canvas", { tabindex: "0", role: "application", "aria-roledescription": "strip of chunks", "aria-describedby": "strip-help" });
  const told = el("span", { "aria-live": "polite" });
  const from = el("span"), to = el("span");
  const button = (name, title, act) => el("button", { type: "button", title, "aria-label": title, onclick: act }, name);
  const node = el("div", { class: "strip" },
    el("div", { class: "between" }, el("h2", {}, "Chunks over time"),
      el("div", { class: "row" }, button("−", "Zoom out", () => zoom(2)), button("+", "Zoom in", () => zoom(0.5)), el("button", { type: "button", onclick: whole }, "Whole"))),
    canvas, el("div", { class: "ends" }, from, told, to),
    el("div", { class: "legend" },
      el("span", {}, el("i", { class: "scale" }), "attention received, least to most"), el("span", {}, el("i", { class: "taken" }), "taken by the recall shown"),
      el("span", {}, el("i", { class: "resident" }), "on the device"), el("span", {}, el("i", { class: "cold" }), "only stored"), el("span", {}, el("i", { class: "open" }), "open"), el("span", {}, el("i", { class: "cut" }), "truncated here"), el("span", { id: "swaps", hidden: true }, el("i", { class: "swap" }), "other weights from here on")),
    el("p", { class: "unseen", id: "strip-help" }, "Arrow keys go from chunk to chunk, Enter shows a chunk's tokens, plus and minus zoom, Home and End go to the first and the last."));

  function whole() { view = { first: firstChunk, last: total }; load(); }
  function zoom(by, centre = cursor ?? (view.first + view.last) / 2) {
    const width = Math.min(total - firstChunk, Math.max(NARROWEST, (view.last - view.first) * by));
    const share = (centre - view.first) / Math.max(1, view.last - view.first);
    move(centre - share * width, width);
  }
  function move(first, width = view.last - view.first) {
    first = Math.round(Math.max(firstChunk, Math.min(first, total - width)));
    view = { first, last: Math.min(total, first + Math.round(width)) };
    draw();
    load();
  }
  function show(chunk) {
    if (chunk < view.first || chunk >= view.last) move(chunk - (view.last - view.first) / 2);
  }

  /** As it is now; the session may have grown. */
  function update(session) {
    const atEnd = view.last === total, isWhole = view.first === firstChunk && atEnd;
    size = session.chunk_size;
    [length, total, firstChunk] = [session.length, session.num_chunks, Math.floor(session.first_position / size)];
    if (isWhole || !view.last) view = { first: firstChunk, last: total };
    else if (atEnd) view = { first: Math.max(firstChunk, total - (view.last - view.first)), last: total };
    load();
  }

  function load() {
    clearTimeout(waiting);
    waiting = setTimeout(async () => {
      const own = ++asked;
      if (!total) { data = null; draw(); return; }
      const bins = Math.max(1, Math.min(1200, Math.floor((canvas.clientWidth || 600) / 3)));
      try {
        const found = await call(of(id, "/heat"), { query: { first: view.first, last: view.last, bins } });
        if (own === asked) { data = found; draw(); }
      } catch { /* the session's own view says what is wrong */ }
    }, 40);
  }

  function draw() {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    context.scale(ratio, ratio);
    const scale = [0, 1, 2, 3].map((place) => colour(`heat-${place}`));
    const span = Math.max(1, view.last - view.first), x = (chunk) => ((chunk - view.first) / span) * width;
    from.textContent = total ? `position ${number(view.first * size)}` : "no tokens yet";
    to.textContent = total ? `${number(Math.min(view.last * size, length))} of ${number(length)}` : "";
    canvas.setAttribute("aria-label", total ? `Chunks ${number(view.first)} to ${number(view.last - 1)} of ${number(total)}, ${counted(taken.size, "chunk")} taken by the recall shown` : "No chunks yet");
    if (!data || !total) { context.fillStyle = scale[0]; context.fillRect(0, TOP, width, HEAT + STATE + 6); return; }
    const most = Math.max(1e-12, ...data.mass.map((mass, place) => mass / share(place)));
    const gap = width / Math.max(1, span) > 6 ? 1.5 : 0;
    data.mass.forEach((mass, place) => {
      const begin = data.first + place * data.num_chunks_each, chunks = share(place);
      const left = x(begin), wide = Math.max(0.7, x(begin + chunks) - left - gap);
      context.fillStyle = mix(scale, Math.sqrt(mass / chunks / most));
      context.fillRect(left, TOP, wide, HEAT);
      const here = data.num_resident[place] / chunks;
      context.fillStyle = colour("cold");
      context.fillRect(left, TOP + HEAT + 4, wide, STATE);
      context.fillStyle = colour("resident");
      context.fillRect(left, TOP + HEAT + 4 + STATE * (1 - here), wide, STATE * here);
    });
    if (length % size && view.last === total) { // the last chunk is not full yet
      const wide = Math.max(3, x(total) - x(total - 1) - gap);
      context.fillStyle = colour("open");
      context.fillRect(Math.min(x(total - 1), width - 3), TOP + HEAT + 4, wide, STATE);
    }
    for (const at of cuts) { // where what had come after was forgotten
      const left = Math.max(1, Math.min(width - 1, x(at / size)));
      context.strokeStyle = colour("bad");
      context.lineWidth = 2;
      context.setLineDash([4, 3]);
      context.beginPath();
      context.moveTo(left, TOP); context.lineTo(left, TOP + HEAT + STATE + 4);
      context.stroke();
      context.setLineDash([]);
    }
    context.fillStyle = context.strokeStyle = colour("hit");
    for (const chunk of near) if (chunk >= view.first && chunk < view.last) mark(chunk, 0.4, 0);
    for (const [chunk, weight] of taken) if (chunk >= view.first && chunk < view.last) mark(chunk, 1, weight);
    context.fillStyle = colour("ink");
    for (const at of swaps) if (at / size >= view.first && at / size <= view.last) context.fillRect(Math.min(width - 1, x(at / size)), TOP, 1, HEAT);
    if (cursor !== null && cursor >= view.first && cursor < view.last) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 1.5;
      context.strokeRect(x(cursor) - 0.5, TOP - 1, Math.max(3, x(cursor + 1) - x(cursor) - gap) + 1, HEAT + 2);
    }

    function mark(chunk, alpha, weight) {
      const left = x(chunk), wide = Math.max(3, x(chunk + 1) - left - gap), middle = Math.max(5, Math.min(width - 5, left + wide / 2));
      context.globalAlpha = alpha;
      if (weight) {
        context.lineWidth = 2;
        context.strokeRect(left, TOP, wide, HEAT);
        context.fillRect(left, TOP + HEAT - Math.max(3, HEAT * weight), wide, Math.max(3, HEAT * weight));
      }
      context.beginPath();
      context.moveTo(middle - 5, 3); context.lineTo(middle + 5, 3); context.lineTo(middle, TOP - 3);
      context.fill();
      context.globalAlpha = 1;
    }
  }
  const share = (place) => Math.min(data.num_chunks_each, data.num_chunks - place * data.num_chunks_each) || 1;

  const chunkAt = (event) => {
    const box = canvas.getBoundingClientRect();
    return Math.max(view.first, Math.min(view.last - 1, Math.floor(view.first + ((event.clientX - box.left) / box.width) * (view.last - view.first))));
  };
  function point(chunk) {
    cursor = chunk;
    const place = data ? Math.floor((chunk - data.first) / data.num_chunks_each) : -1;
    const each = data?.num_chunks_each ?? 1, mass = data?.mass[place];
    const what = each > 1 ? `about chunk ${number(chunk)}` : `chunk ${number(chunk)}`;
    const weight = taken.has(chunk) ? `, weight ${taken.get(chunk).toFixed(3)} in this recall` : "";
    told.textContent = mass === undefined ? what : `${what}: taken ${number(data.num_recalls[place])} ×, attention ${mass.toFixed(2)}${each > 1 ? ` in ${each} chunks` : ""}${weight}`;
    draw();
  }
  canvas.addEventListener("pointermove", (event) => {
    if (!total) return;
    if (dragged) {
      const by = ((dragged.x - event.clientX) / canvas.clientWidth) * (dragged.view.last - dragged.view.first);
      if (Math.abs(event.clientX - dragged.x) > 4) dragged.moved = true;
      if (dragged.moved) move(dragged.view.first + by, dragged.view.last - dragged.view.first);
    } else point(chunkAt(event));
  });
  canvas.addEventListener("pointerdown", (event) => { dragged = { x: event.clientX, view: { ...view }, moved: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", (event) => {
    if (dragged && !dragged.moved && total) { point(chunkAt(event)); onChunk(chunkAt(event)); }
    dragged = null;
  });
  canvas.addEventListener("pointercancel", () => { dragged = null; });
  canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) { cursor = null; told.textContent = ""; draw(); } });
  canvas.addEventListener("wheel", (event) => {
    const isSideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (!total || !(event.ctrlKey || event.metaKey || isSideways)) return; // else the page scrolls
    event.preventDefault();
    if (isSideways) move(view.first + (event.deltaX / canvas.clientWidth) * (view.last - view.first));
    else zoom(event.deltaY > 0 ? 1.25 : 0.8, chunkAt(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (!total) return;
    const at = cursor ?? view.first, jump = event.shiftKey ? 10 : 1;
    const goes = { ArrowRight: at + jump, ArrowLeft: at - jump, Home: firstChunk, End: total - 1 }[event.key];
    if (goes !== undefined) {
      const chunk = Math.max(firstChunk, Math.min(total - 1, goes));
      show(chunk);
      point(chunk);
    } else if (event.key === "Enter") onChunk(at);
    else if (event.key === "+" || event.key === "=") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else return;
    event.preventDefault();
  });
  const watcher = new ResizeObserver(() => { draw(); load(); });
  watcher.observe(canvas);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", draw);

  return {
    node, update, show, refresh: load,
    /** Mark where the session was truncated, while this page looked on; marks behind it went with the tokens. */
    cut(at) {
      cuts = [...cuts.filter((one) => one < at), at];
      draw();
    },
    /** Light up what a recall took: chunks with weights, and those that nearly took part. */
    light(weights, others = []) {
      [taken, near] = [new Map(weights), new Set(others)];
      if (taken.size) say(`${counted(taken.size, "chunk")} lit up in the strip`);
      draw();
    },
    /** The lengths that the session had when its model's weights were replaced. */
    mark(lengths) { swaps = lengths; node.querySelector("#swaps").hidden = !lengths.length; draw(); },
    stop() { watcher.disconnect(); scheme.removeEventListener("change", draw); clearTimeout(waiting); },
  };
}

/** Between the colours of a scale, all written #rrggbb. */
function mix(scale, share) {
  const place = Math.max(0, Math.min(1, share)) * (scale.length - 1), low = Math.min(scale.length - 2, Math.floor(place));
  const parts = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const [a, b] = [parts(scale[low]), parts(scale[low + 1])];
  return `rgb(${a.map((value, at) => Math.round(value + (b[at] - value) * (place - low))).join(" ")})`;
}
