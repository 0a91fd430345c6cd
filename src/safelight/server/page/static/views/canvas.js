// @ts-check
/** The canvas: parts of a picture are drawn again, or it grows beyond its edges. */

import * as api from "../api.js";
import { attempt, modelIsChosen, queue, report, someSeed } from "../actions.js";
import { controlsOf } from "../canvas/controls.js";
import { onServer } from "../paths.js";
import { accept, addResults, boxContent, clearMask, discard, exported, invertMask, newCanvas, openOnCanvas, redo, setBox, undo } from "../canvas/document.js";
import { LEAST_BOX, SNAP } from "../canvas/geometry.js";
import { chosenVariants, requests, setForm } from "../form.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { ControlLayers } from "../parts/control_layers.js";
import { NumberField, PictureDrop, SliderField } from "../parts/elements.js";
import { ModelPicker } from "../parts/models.js";
import { Seed } from "../parts/form.js";
import { Prompt } from "../parts/prompt.js";
import { Stage } from "../parts/stage.js";
import { current, useStore } from "../store.js";
import { t } from "../strings.js";
import { Running } from "./create.js";

const TOOLS = ["brush", "eraser", "rectangle", "lasso", "fill", "box", "pan"];
/** ControlNets for scribbles and lines read white on black. */
const CONTROL_COLOUR = "#ffffff";
const KEYS = { b: "brush", e: "eraser", r: "rectangle", l: "lasso", g: "fill", c: "box", h: "pan" };

export function CanvasView() {
  const canvas = useStore((state) => state.canvas);
  if (!canvas.width) return html`<${Empty} />`;
  return html`<${Editor} />`;
}

function Empty() {
  const state = useStore((now) => now);
  const side = chosenVariants(state)[0]?.model.resolution ?? 512;
  useEffect(() => {
    /** @param {ClipboardEvent} event */
    const pasted = (event) => {
      const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
      if (file) openOnCanvas(file).catch(report);
    };
    addEventListener("paste", pasted);
    return () => removeEventListener("paste", pasted);
  }, []);
  return html`<section class="card canvas-empty">
    <h2>${t("view_canvas")}</h2>
    <p>${t("canvas_empty")}</p>
    <${PictureDrop} label=${t("open_picture")} onPicture=${(/** @type {Blob} */ file) => openOnCanvas(file).catch(report)} />
    <div class="row"><button type="button" onClick=${() => newCanvas(state.form.width ?? side, state.form.height ?? side)}>${t("new_picture")}</button><a class="button" href="/gallery">${t("from_gallery")}</a></div>
  </section>`;
}

/**
 * The size in which a box is drawn: its shape, with as many pixels as the form says, else with its own.
 * @param {any} box @param {any} state
 */
function drawnSize(box, state) {
  const multiple = Math.max(8, ...chosenVariants(state).map(({ family }) => family?.multiple ?? 8));
  const { width, height } = state.form;
  const scale = width && height ? Math.sqrt((width * height) / (box.width * box.height)) : 1;
  const fit = (/** @type {number} */ side) => Math.max(multiple, Math.round((side * scale) / multiple) * multiple);
  return { width: fit(box.width), height: fit(box.height) };
}

/** Queue the box of the canvas. */
async function makeFromCanvas() {
  if (!modelIsChosen()) return;
  const state = current();
  const { box, opened } = state.canvas;
  await attempt(async () => {
    const { picture, mask } = await boxContent(box);
    const stored = await api.storeInput(picture, "image");
    const storedMask = mask && (await api.storeInput(mask, "mask"));
    const more = {
      image: stored.digest,
      mask: storedMask ? storedMask.digest : "",
      outpaint: [],
      controls: [...state.form.controls, ...(await controlsOf(box))],
      ...drawnSize(box, state),
      seed: state.form.seed ?? someSeed(),
    };
    await queue(requests(state, more), (ids) => addResults(ids, box, opened));
  });
}

function Editor() {
  const form = useStore((state) => state.form);
  const canvas = useStore((state) => state.canvas);
  const [tool, setTool] = useState("brush");
  const [chosen, setLayer] = useState("mask");
  const [radius, setRadius] = useState(() => Math.max(2, Math.min(24, Math.round(Math.max(canvas.width, canvas.height) / 16))));
  const [colour, setColour] = useState("#b5371f");
  // A layer that was removed is not painted any more.
  const layer = ["mask", "picture"].includes(chosen) || canvas.controls.some((/** @type {any} */ one) => one.id === chosen) ? chosen : "mask";
  const [shown, setShown] = useState(/** @type {any} */ (null));
  const sheet = useStore((state) => state.sheet);
  const jobs = useStore((state) => state.jobs);
  const candidates = canvas.asked.flatMap((/** @type {string} */ id) => sheet[id] ?? []);
  const waiting = canvas.asked.filter((/** @type {string} */ id) => jobs[id] && !jobs[id].ended).length;

  useEffect(() => {
    /** @param {KeyboardEvent} event */
    const pressed = (event) => {
      if (/** @type {Element} */ (event.target).closest("input:not([type=range]):not([type=radio]), textarea, select")) return;
      const control = event.ctrlKey || event.metaKey;
      if (control && event.key.toLowerCase() === "z") (event.preventDefault(), event.shiftKey ? redo() : undo());
      else if (control && event.key.toLowerCase() === "y") (event.preventDefault(), redo());
      else if (control && event.key === "Enter") makeFromCanvas();
      else if (control) return;
      else if (event.key === "[") setRadius((now) => Math.max(1, Math.round(now * 0.8)));
      else if (event.key === "]") setRadius((now) => Math.min(512, Math.round(now * 1.25) + 1));
      else if (event.key in KEYS) setTool(KEYS[/** @type {keyof typeof KEYS} */ (event.key)]);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
  useEffect(() => {
    if (shown && !candidates.some((/** @type {any} */ one) => one.id === shown.id)) setShown(null);
  }, [candidates.length]);

  const save = () => attempt(async () => api.saveFile(await exported(), "canvas.png"));
  return html`<div class="canvas-view">
    <div class="tools" role="toolbar" aria-label=${t("tools")}>
      <div role="group" aria-label=${t("tools")} class="row">
        ${TOOLS.map((one) => html`<button type="button" aria-pressed=${tool === one} title=${`${t(`tool_${one}`)} (${Object.entries(KEYS).find(([, name]) => name === one)?.[0].toUpperCase()})`} onClick=${() => setTool(one)}>${t(`tool_${one}`)}</button>`)}
      </div>
      <div role="group" aria-label=${t("layer")} class="row">
        ${["mask", "picture"].map((one) => html`<button type="button" aria-pressed=${layer === one} onClick=${() => setLayer(one)}>${t(`layer_${one}`)}</button>`)}
        ${canvas.controls.map((/** @type {any} */ one) => html`<button type="button" aria-pressed=${layer === one.id} onClick=${() => setLayer(one.id)}>${one.name}</button>`)}
        ${layer === "picture" && html`<input type="color" aria-label=${t("colour")} value=${colour} onInput=${(/** @type {any} */ event) => setColour(event.currentTarget.value)} />`}
      </div>
      <${SliderField} label=${t("brush_size")} value=${radius} min=${1} max=${512} step=${1} onChange=${setRadius} />
      <div class="row">
        <button type="button" onClick=${undo} disabled=${!canvas.canUndo}>${t("undo")}</button>
        <button type="button" onClick=${redo} disabled=${!canvas.canRedo}>${t("redo")}</button>
        <button type="button" onClick=${invertMask}>${t("invert_mask")}</button>
        <button type="button" onClick=${clearMask}>${t("clear_mask")}</button>
      </div>
    </div>
    <p class="hint note">${t(`hint_${tool}`)}</p>
    <${Stage} tool=${tool} layer=${layer} radius=${radius} colour=${layer === "picture" ? colour : CONTROL_COLOUR} shown=${shown} />
    <div class="canvas-side">
      <${Prompt} main=${true} field="prompt" label=${t("field_prompt")} value=${form.prompt} onChange=${(/** @type {string} */ prompt) => setForm({ prompt })} onMake=${makeFromCanvas} />
      <${ModelPicker} />
      <div class="make"><button type="button" class="primary" onClick=${makeFromCanvas}>${t("make")}</button></div>
      <${Running} />
      ${(candidates.length > 0 || waiting > 0) && html`<section class="card candidates" aria-label=${t("candidates")}>
        <h2>${t("candidates")} ${waiting > 0 && html`<small>${t("waiting_count", { count: waiting })}</small>`}</h2>
        <div class="row">${candidates.map((/** @type {any} */ image) => html`<button type="button" class="thumbnail" aria-pressed=${shown?.id === image.id} aria-label=${t("image_by", { model: image.model, seed: image.seed })} onClick=${() => setShown(shown?.id === image.id ? null : image)}><img src=${onServer(image.thumbnail)} alt="" /></button>`)}</div>
        <div class="row">
          <button type="button" class="primary" disabled=${!shown && candidates.length !== 1} onClick=${() => attempt(() => accept(onServer((shown ?? candidates[0]).url), canvas.boxes[(shown ?? candidates[0]).job] ?? canvas.box)).then(() => setShown(null))}>${t("accept")}</button>
          <button type="button" onClick=${() => (setShown(null), discard())}>${t("discard")}</button>
        </div>
      </section>`}
      <${Seed} />
      <${SliderField} label=${t("field_strength")} field="strength" value=${form.strength} min=${0.01} max=${1} step=${0.01} onChange=${(/** @type {number} */ strength) => setForm({ strength })} />
      <${SliderField} label=${t("feather")} field="mask_blur" value=${form.mask_blur} min=${0} max=${64} step=${1} onChange=${(/** @type {number} */ mask_blur) => setForm({ mask_blur })} />
      <div class="box-fields">${["x", "y", "width", "height"].map((side) => html`<${NumberField} key=${side} label=${t(`box_${side}`)} value=${canvas.box[side]} step=${SNAP} onChange=${(/** @type {number | null} */ value) => setBox({ ...canvas.box, [side]: side.length > 1 ? Math.max(LEAST_BOX, value ?? 0) : value ?? 0 })} />`)}</div>
      <div class="row"><button type="button" onClick=${() => setBox({ x: 0, y: 0, width: canvas.width, height: canvas.height })}>${t("box_whole")}</button>
        <button type="button" onClick=${save}>${t("export")}</button>
        <${PictureDrop} label=${t("open_picture")} onPicture=${(/** @type {Blob} */ file) => openOnCanvas(file).catch(report)} /></div>
      <${ControlLayers} onPaint=${setLayer} />
    </div>
  </div>`;
}
