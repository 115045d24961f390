// The page of the API: shows openapi.json with nothing from elsewhere, so that it also works without a network.

import { call } from "./api.js";

function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) node.setAttribute(name, value);
  for (const child of children.flat()) if (child !== null) node.append(child instanceof Node ? child : String(child));
  return node;
}
const json = (value) => el("pre", {}, JSON.stringify(value, null, 2));
let doc;
const deref = (schema) => (schema && schema.$ref ? doc.components.schemas[schema.$ref.split("/").pop()] : schema || {});
function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" | ");
  if (schema.type === "array") return kind(schema.items) + "[]";
  if (schema.additionalProperties?.type) return "object of " + schema.additionalProperties.type;
  return schema.format ? schema.type + " (" + schema.format + ")" : schema.type || "any";
}
const table = (heads, rows) => el("table", {}, el("thead", {}, el("tr", {}, heads.map((head) => el("th", {}, head)))),
  el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) => el("td", {}, cell))))));
function fields(schema) {
  const object = deref(schema), required = new Set(object.required || []);
  return table(["field", "type", "meaning"], Object.entries(object.properties || {}).map(([name, field]) => [
    el("code", {}, name), kind(field), [required.has(name) ? "required. " : "", field.description || "",
      field.default === undefined || field.default === null ? "" : " Default: " + JSON.stringify(field.default) + "."]
      .join("")]));
}
function body(content) {
  const main = content["application/json"];
  const example = main?.example ?? Object.values(main?.examples || {})[0]?.value;
  return el("div", {}, el("p", { class: "dim" }, Object.keys(content).join(", ")), main ? fields(main.schema) : null,
    example === undefined ? null : json(example));
}
function operationOf(path, method, operation) {
  const parts = [el("p", {}, operation.description || "")];
  if (operation.parameters?.length)
    parts.push(el("h3", {}, "Parameters"), table(["name", "in", "type", "meaning"], operation.parameters.map((parameter) => [
      el("code", {}, parameter.name), parameter.in, kind(parameter.schema),
      parameter.description || parameter.schema?.description || ""])));
  if (operation.requestBody) parts.push(el("h3", {}, "Body"), body(operation.requestBody.content));
  const responses = Object.entries(operation.responses);
  for (const [status, response] of responses.filter(([status]) => status < 300))
    parts.push(el("h3", {}, status + " " + response.description), response.content ? body(response.content) : "No body.");
  const errors = responses.filter(([status]) => status >= 300).flatMap(([status, response]) =>
    Object.entries(response.content?.["application/problem+json"]?.examples || {}).map(([code, example]) =>
      [status, el("code", {}, code), example.value.detail]));
  if (errors.length) parts.push(el("h3", {}, "Errors"), table(["status", "code", "such as"], errors));
  return el("details", { class: "call", id: operation.operationId }, el("summary", {},
    el("span", { class: "method" }, method.toUpperCase()), el("code", {}, path),
    el("span", { class: "dim" }, operation.summary || "")),
    el("div", { tabindex: 0, role: "region", "aria-label": `${method.toUpperCase()} ${path}` }, parts));
}
call("/openapi.json").then((found) => {
  doc = found;
  document.getElementById("title").textContent = doc.info.title + " " + doc.info.version;
  document.getElementById("about").textContent = doc.info.description || "";
  const groups = new Map();
  for (const [path, item] of Object.entries(doc.paths))
    for (const [method, operation] of Object.entries(item)) {
      const tag = operation.tags?.[0] || "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operationOf(path, method, operation));
    }
  document.getElementById("calls").replaceChildren(...[...groups].flatMap(([tag, calls]) => [el("h2", {}, tag), ...calls]));
  if (location.hash) { const target = document.getElementById(location.hash.slice(1)); if (target) target.open = true; }
}).catch((error) => { document.getElementById("calls").textContent = "openapi.json cannot be read: " + error.message; });
