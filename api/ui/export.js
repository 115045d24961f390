// A session as a file. Without a key that is a plain link: the browser writes what comes, however much. A link cannot carry
// the key of this tab, and an answer that a script has asked for would be kept in memory whole. So with a key the file is
// written as it comes where the browser lets a page do that (showSaveFilePicker); elsewhere it is the command line's to do.

import { key, namespace, of, stream } from "./api.js";
import { ask, bytes, el, failure, say } from "./dom.js";

export function exportButton(id) {
  return el("button", { type: "button", onclick: (event) => save(event.currentTarget, id, of(id, "/export"), `${id}.safetensors`) }, "Export");
}

async function save(button, id, path, name) {
  if (!key() && !namespace()) {
    el("a", { href: path, download: name }).click();
    return;
  }
  if (!window.showSaveFilePicker) {
    const where = namespace() ? ` --namespace ${namespace()}` : "";
    await ask(`Export ${id}`, [el("p", {}, "This browser cannot write a file as it comes, and a session may be larger than memory. With the key in HTM_API_KEY:"),
      el("pre", {}, `htm-service export DIR --url ${location.origin}${where} --prefix ${id}`)], "Close", { cancel: false });
    return;
  }
  let file = null;
  button.disabled = true;
  try {
    const target = await window.showSaveFilePicker({ suggestedName: name });
    const answer = await stream(path);
    const size = Number(answer.headers.get("Content-Length"));
    let done = 0;
    const counted = new TransformStream({ transform(part, controller) { done += part.byteLength; button.textContent = `${bytes(done)} of ${bytes(size)}`; controller.enqueue(part); } });
    file = await target.createWritable();
    await answer.body.pipeThrough(counted).pipeTo(file);
    say(`${name} is written.`);
  } catch (error) {
    if (error.name !== "AbortError") await ask(`Export ${id}`, [failure(error)], "Close", { cancel: false });
  } finally {
    button.disabled = false;
    button.textContent = "Export";
  }
}
