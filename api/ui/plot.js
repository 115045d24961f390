// Small plots over time, drawn as SVG; each says in words what it shows.

import { el } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const W = 300, H = 60;

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function marked(x, words) {
  const line = shape("path", { class: "mark", d: `M${x.toFixed(1)} 0L${x.toFixed(1)} ${H}` }), name = shape("title", {});
  name.textContent = words;
  line.append(name);
  return line;
}

/** One plot. `draw(lines, {bound, marks})` with lines of [time, value], of several the second in another colour; marks of [time, words]. */
export function plot(title, write, { names = [], steps = false } = {}) {
  const svg = shape("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img" });
  const now = el("b"), from = el("span"), most = el("span");
  const figure = el("figure", {}, el("figcaption", {}, el("span", {}, title), now), svg, el("div", { class: "ends" }, from, most));

  function draw(lines, { bound = null, since = null, marks = [] } = {}) {
    lines = lines.map((line) => line.filter(([, value]) => value !== null && value !== undefined));
    const points = lines.flat();
    if (!points.length) {
      svg.replaceChildren();
      now.textContent = "–";
      from.textContent = "nothing yet";
      most.textContent = "";
      svg.setAttribute("aria-label", `${title}: nothing yet`);
      return;
    }
    const times = points.map(([at]) => at);
    const first = since ?? Math.min(...times), last = Math.max(...times, first + 1);
    const top = Math.max(...points.map(([, value]) => value), bound ?? 0) * 1.08 || 1;
    const x = (at) => ((at - first) / (last - first)) * W;
    const y = (value) => H - (value / top) * H;
    const path = (line) => line.map(([at, value], place) => {
      const step = steps && place ? `L${x(at).toFixed(1)} ${y(line[place - 1][1]).toFixed(1)}` : "";
      return `${step}${place ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    }).join("");
    const drawn = lines.filter((line) => line.length).map((line) => [line, path(line)]);
    const [main, mainPath] = drawn[0];
    svg.replaceChildren(
      shape("path", { class: "area", d: `${mainPath}L${x(main.at(-1)[0]).toFixed(1)} ${H}L${x(main[0][0]).toFixed(1)} ${H}Z` }),
      ...drawn.map(([, d], place) => shape("path", { d, class: place ? "second" : "first" })),
      ...(bound === null ? [] : [shape("path", { class: "bound", d: `M0 ${y(bound)}L${W} ${y(bound)}` })]),
      ...marks.filter(([at]) => at >= first).map(([at, words]) => marked(x(Math.min(at, last)), words)));  // the newest may be later than the last count
    now.textContent = lines.filter((line) => line.length).map((line, place) => `${names[place] ? `${names[place]} ` : ""}${write(line.at(-1)[1])}`).join(", ");
    const highest = write(Math.max(...points.map(([, value]) => value)));
    from.textContent = `since ${new Date(first).toLocaleTimeString()}`;
    most.textContent = `most ${highest}`;
    svg.setAttribute("aria-label", [`${title}: ${now.textContent} now, at most ${highest}`, ...marks.map(([, words]) => words)].join("; "));
  }
  draw([[]]);
  return { figure, draw };
}
