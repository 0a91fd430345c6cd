// @ts-check
/** The canvas: parts of a picture are drawn again, or it grows beyond its edges. */

import * as api from "../api.js";
import { attempt, modelIsChosen, queue, report, someSeed } from "../actions.js";
import { accept, addResults, boxContent, clearMask, discard, exported, fillMask, invertMask, layers, newCanvas, openOnCanvas, redo, setBox, Stroke, undo } from "../canvas/document.js";
import { chosenVariants, requests, setForm } from "../form.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../lib/htm-preact.js";
import { IconButton, NumberField, PictureDrop, SliderField } from "../parts/elements.js";
import { ModelPicker } from "../parts/models.js";
import { Prompt } from "../parts/prompt.js";
import { current, useStore } from "../store.js";
import { t } from "../strings.js";
import { Running } from "./create.js";

const TOOLS = ["brush", "eraser", "rectangle", "lasso", "fill", "box", "pan"];
const KEYS = { b: "brush", e: "eraser", r: "rectangle", l: "lasso", g: "fill", c: "box", h: "pan" };
const SNAP = 8;
const LEAST_BOX = 64;
const LEAST_SCALE = 0.05;
const MOST_SCALE = 16;
const MOST_FITTED = 6;

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
  const [layer, setLayer] = useState(/** @type {"picture" | "mask"} */ ("mask"));
  const [radius, setRadius] = useState(24);
  const [colour, setColour] = useState("#b5371f");
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
        ${["mask", "picture"].map((one) => html`<button type="button" aria-pressed=${layer === one} onClick=${() => setLayer(/** @type {any} */ (one))}>${t(`layer_${one}`)}</button>`)}
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
    <${Stage} tool=${tool} layer=${layer} radius=${radius} colour=${colour} shown=${shown} />
    <div class="canvas-side">
      <${Prompt} main=${true} field="prompt" label=${t("field_prompt")} value=${form.prompt} onChange=${(/** @type {string} */ prompt) => setForm({ prompt })} onMake=${makeFromCanvas} />
      <${ModelPicker} />
      <div class="make"><button type="button" class="primary" onClick=${makeFromCanvas}>${t("make")}</button></div>
      <${SliderField} label=${t("field_strength")} field="strength" value=${form.strength} min=${0.01} max=${1} step=${0.01} onChange=${(/** @type {number} */ strength) => setForm({ strength })} />
      <${SliderField} label=${t("feather")} field="mask_blur" value=${form.mask_blur} min=${0} max=${64} step=${1} onChange=${(/** @type {number} */ mask_blur) => setForm({ mask_blur })} />
      <div class="box-fields">${["x", "y", "width", "height"].map((side) => html`<${NumberField} key=${side} label=${t(`box_${side}`)} value=${canvas.box[side]} step=${SNAP} onChange=${(/** @type {number | null} */ value) => setBox({ ...canvas.box, [side]: side.length > 1 ? Math.max(LEAST_BOX, value ?? 0) : value ?? 0 })} />`)}</div>
      <div class="row"><button type="button" onClick=${() => setBox({ x: 0, y: 0, width: canvas.width, height: canvas.height })}>${t("box_whole")}</button>
        <button type="button" onClick=${save}>${t("export")}</button>
        <${PictureDrop} label=${t("open_picture")} onPicture=${(/** @type {Blob} */ file) => openOnCanvas(file).catch(report)} /></div>
      <${Running} />
      ${(candidates.length > 0 || waiting > 0) && html`<section class="card candidates" aria-label=${t("candidates")}>
        <h2>${t("candidates")} ${waiting > 0 && html`<small>${t("waiting_count", { count: waiting })}</small>`}</h2>
        <div class="row">${candidates.map((/** @type {any} */ image) => html`<button type="button" class="thumbnail" aria-pressed=${shown?.id === image.id} aria-label=${t("image_by", { model: image.model, seed: image.seed })} onClick=${() => setShown(shown?.id === image.id ? null : image)}><img src=${image.thumbnail} alt="" /></button>`)}</div>
        <div class="row">
          <button type="button" class="primary" disabled=${!shown && candidates.length !== 1} onClick=${() => attempt(() => accept((shown ?? candidates[0]).url, canvas.boxes[(shown ?? candidates[0]).job] ?? canvas.box)).then(() => setShown(null))}>${t("accept")}</button>
          <button type="button" onClick=${() => (setShown(null), discard())}>${t("discard")}</button>
        </div>
      </section>`}
    </div>
  </div>`;
}

/** The surface with the picture. @param {any} props */
function Stage({ tool, layer, radius, colour, shown }) {
  const canvas = useStore((state) => state.canvas);
  const stage = useRef(/** @type {any} */ (null));
  const paper = useRef(/** @type {any} */ (null));
  const cursor = useRef(/** @type {any} */ (null));
  const [view, setView] = useState({ scale: 1, x: 0, y: 0 });
  const [draft, setDraft] = useState(/** @type {[number, number][]} */ ([]));
  const work = useRef(/** @type {any} */ ({ pointers: new Map() }));
  const latest = useRef(view);
  latest.current = view;

  useLayoutEffect(() => {
    paper.current.append(layers.picture, layers.mask);
    layers.picture.className = "layer-picture";
    layers.mask.className = "layer-mask";
  }, []);
  useLayoutEffect(() => {
    // The whole picture is in view at first.
    const box = stage.current.getBoundingClientRect();
    const scale = Math.min((box.width - 40) / canvas.width, (box.height - 40) / canvas.height, MOST_FITTED);
    setView({ scale, x: (box.width - canvas.width * scale) / 2, y: (box.height - canvas.height * scale) / 2 });
  }, [canvas.width, canvas.height]);
  useEffect(() => {
    /** @param {WheelEvent} event */
    const wheel = (event) => {
      event.preventDefault();
      const box = stage.current.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - box.left, event.clientY - box.top);
    };
    stage.current.addEventListener("wheel", wheel, { passive: false });
    return () => stage.current?.removeEventListener("wheel", wheel);
  }, []);

  /** @param {number} by @param {number} x @param {number} y */
  const zoom = (by, x, y) => {
    const now = latest.current;
    const scale = Math.min(MOST_SCALE, Math.max(LEAST_SCALE, now.scale * by));
    const real = scale / now.scale;
    setView({ scale, x: x - (x - now.x) * real, y: y - (y - now.y) * real });
  };
  /** @param {any} event @returns {[number, number]} the place in the picture */
  const at = (event) => {
    const box = stage.current.getBoundingClientRect();
    const now = latest.current;
    return [(event.clientX - box.left - now.x) / now.scale, (event.clientY - box.top - now.y) / now.scale];
  };
  /** @param {any} event */
  const radiusOf = (event) => (event.pointerType === "pen" && event.pressure ? radius * event.pressure * 2 : radius);

  /** @param {any} event */
  const down = (event) => {
    stage.current.setPointerCapture(event.pointerId);
    const { current: now } = work;
    now.pointers.set(event.pointerId, event);
    if (now.pointers.size === 2) {
      now.stroke?.end();
      now.stroke = null;
      now.pinch = true;
      return;
    }
    const [x, y] = at(event);
    now.start = [x, y];
    now.view = latest.current;
    now.box = canvas.box;
    now.grip = tool === "box" ? gripOf(canvas.box, x, y, 12 / latest.current.scale) : null;
    now.panning = tool === "pan" || event.button === 1 || event.buttons === 4;
    if (now.panning) return;
    if (tool === "brush" || tool === "eraser") {
      now.stroke = new Stroke(layer, { erase: tool === "eraser", colour });
      now.stroke.to(x, y, radiusOf(event));
    } else if (tool === "rectangle" || tool === "lasso") setDraft([[x, y]]);
    else if (tool === "fill") fillMask(x, y).catch(report);
  };
  /** @param {any} event */
  const move = (event) => {
    const { current: now } = work;
    if (cursor.current) {
      const box = stage.current.getBoundingClientRect();
      cursor.current.style.transform = `translate(${event.clientX - box.left}px, ${event.clientY - box.top}px)`;
    }
    const before = now.pointers.get(event.pointerId);
    if (!before) return;
    if (now.pinch) {
      const others = [...now.pointers.values()].filter((one) => one.pointerId !== event.pointerId);
      if (others.length) {
        const box = stage.current.getBoundingClientRect();
        const distance = (/** @type {any} */ one) => Math.hypot(one.clientX - others[0].clientX, one.clientY - others[0].clientY);
        zoom(distance(event) / Math.max(1, distance(before)), (event.clientX + others[0].clientX) / 2 - box.left, (event.clientY + others[0].clientY) / 2 - box.top);
        setView((view) => ({ ...view, x: view.x + (event.clientX - before.clientX) / 2, y: view.y + (event.clientY - before.clientY) / 2 }));
      }
      now.pointers.set(event.pointerId, event);
      return;
    }
    now.pointers.set(event.pointerId, event);
    const [x, y] = at(event);
    if (now.panning) {
      setView((view) => ({ ...view, x: view.x + event.clientX - before.clientX, y: view.y + event.clientY - before.clientY }));
    } else if (now.stroke) {
      for (const one of event.getCoalescedEvents?.() ?? [event]) now.stroke.to(...at(one), radiusOf(one));
    } else if (now.grip) setBox(moved(now.box, now.grip, x - now.start[0], y - now.start[1]));
    else if (draft.length && tool === "rectangle") {
      const [[left, top]] = [now.start];
      setDraft([[left, top], [x, top], [x, y], [left, y]]);
    } else if (draft.length) setDraft([...draft, [x, y]]);
  };
  /** @param {any} event */
  const up = (event) => {
    const { current: now } = work;
    now.pointers.delete(event.pointerId);
    if (!now.pointers.size) now.pinch = false;
    now.stroke?.end();
    if (draft.length > 2) {
      const stroke = new Stroke(layer, { erase: event.altKey, colour });
      stroke.fill(draft);
      stroke.end();
    }
    setDraft([]);
    Object.assign(now, { stroke: null, grip: null, panning: false });
  };
  const { box } = canvas;
  const place = shown && (canvas.boxes[shown.job] ?? box);
  const painting = tool === "brush" || tool === "eraser";
  return html`<div class="stage" ref=${stage} data-tool=${tool} tabindex="0" aria-label=${t("canvas_surface")} role="application"
    onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onPointerCancel=${up}
    onDragOver=${(/** @type {any} */ event) => event.preventDefault()}
    onDrop=${(/** @type {any} */ event) => {
      const file = [...(event.dataTransfer?.files ?? [])].find((one) => one.type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      event.stopPropagation();
      openOnCanvas(file).catch(report);
    }}>
    <div class="paper" ref=${paper} style=${{ transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, width: `${canvas.width}px`, height: `${canvas.height}px` }} />
    <div class="paper over" style=${{ transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, width: `${canvas.width}px`, height: `${canvas.height}px` }}>
      ${shown && html`<img src=${shown.url} alt="" style=${{ left: `${place.x}px`, top: `${place.y}px`, width: `${place.width}px`, height: `${place.height}px` }} />`}
    </div>
    <svg class="overlay" aria-hidden="true"><g transform=${`translate(${view.x} ${view.y}) scale(${view.scale})`}>
      <rect class="box" x=${box.x} y=${box.y} width=${box.width} height=${box.height} />
      ${tool === "box" && grips(box).map(([x, y]) => html`<rect class="grip" x=${x - 5 / view.scale} y=${y - 5 / view.scale} width=${10 / view.scale} height=${10 / view.scale} />`)}
      ${draft.length > 1 && html`<polygon class="draft" points=${draft.map((point) => point.join()).join(" ")} />`}
    </g></svg>
    ${painting && html`<div class="cursor" ref=${cursor}><i style=${{ width: `${radius * 2 * view.scale}px`, height: `${radius * 2 * view.scale}px` }} /></div>`}
    <div class="zoom row">
      <${IconButton} icon="plus" label=${t("zoom_in")} onClick=${() => zoomMiddle(stage.current, zoom, 1.25)} />
      <span class="note">${Math.round(view.scale * 100)} %</span>
      <button type="button" class="icon-button" aria-label=${t("zoom_out")} title=${t("zoom_out")} onClick=${() => zoomMiddle(stage.current, zoom, 0.8)}>−</button>
    </div>
  </div>`;
}

/** @param {HTMLElement} stage @param {(by: number, x: number, y: number) => void} zoom @param {number} by */
function zoomMiddle(stage, zoom, by) {
  const box = stage.getBoundingClientRect();
  zoom(by, box.width / 2, box.height / 2);
}

/** @param {any} box @returns {[number, number, number, number][]} place and side of each grip: -1, 0 or 1 */
function grips({ x, y, width, height }) {
  const found = /** @type {[number, number, number, number][]} */ ([]);
  for (const across of [-1, 0, 1]) for (const down of [-1, 0, 1]) if (across || down) found.push([x + ((across + 1) * width) / 2, y + ((down + 1) * height) / 2, across, down]);
  return found;
}

/** @param {any} box @param {number} x @param {number} y @param {number} near @returns {[number, number] | null} which side is held; [0, 0] moves the box */
function gripOf(box, x, y, near) {
  const grip = grips(box).find(([gx, gy]) => Math.abs(gx - x) < near && Math.abs(gy - y) < near);
  if (grip) return [grip[2], grip[3]];
  const inside = x >= box.x && y >= box.y && x <= box.x + box.width && y <= box.y + box.height;
  return inside ? [0, 0] : null;
}

/** @param {number} value */
const snapped = (value) => Math.round(value / SNAP) * SNAP;

/** @param {any} box @param {[number, number]} grip @param {number} dx @param {number} dy */
function moved(box, [across, down], dx, dy) {
  if (!across && !down) return { ...box, x: snapped(box.x + dx), y: snapped(box.y + dy) };
  const next = { ...box };
  if (across > 0) next.width = Math.max(LEAST_BOX, snapped(box.width + dx));
  if (down > 0) next.height = Math.max(LEAST_BOX, snapped(box.height + dy));
  if (across < 0) {
    next.width = Math.max(LEAST_BOX, snapped(box.width - dx));
    next.x = box.x + box.width - next.width;
  }
  if (down < 0) {
    next.height = Math.max(LEAST_BOX, snapped(box.height - dy));
    next.y = box.y + box.height - next.height;
  }
  return next;
}
