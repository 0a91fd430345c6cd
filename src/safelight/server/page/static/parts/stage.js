// @ts-check
/** The surface of the canvas: pan, zoom, strokes, shapes and the box, by mouse, touch and pen. */

import { report } from "../actions.js";
import { fillMask, openOnCanvas, setBox, Stroke } from "../canvas/document.js";
import { gripOf, grips, moved } from "../canvas/geometry.js";
import { LayerView } from "../canvas/view.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../lib/htm-preact.js";
import { useStore } from "../store.js";
import { t } from "../strings.js";
import { IconButton, pictureFrom } from "./elements.js";
import { onServer } from "../paths.js";

const LEAST_SCALE = 0.05;
const MOST_SCALE = 16;
const MOST_FITTED = 6;

/** The surface with the picture. @param {any} props */
export function Stage({ tool, layer, radius, colour, shown }) {
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
    const controls = canvas.controls.filter((/** @type {any} */ one) => one.shown).map((/** @type {any} */ one) => new LayerView(one.id, "layer-control"));
    const views = [new LayerView("picture", "layer-picture"), ...controls, new LayerView("mask", "layer-mask")];
    paper.current.replaceChildren(...views.map((one) => one.element));
    return () => views.forEach((one) => one.stop());
  }, [canvas.controls]);
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
      event.preventDefault();
      event.stopPropagation();
      pictureFrom(event.dataTransfer).then((picture) => picture && openOnCanvas(picture)).catch(report);
    }}>
    <div class="paper" ref=${paper} style=${{ transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, width: `${canvas.width}px`, height: `${canvas.height}px` }} />
    <div class="paper over" style=${{ transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, width: `${canvas.width}px`, height: `${canvas.height}px` }}>
      ${shown && html`<img src=${onServer(shown.url)} alt="" style=${{ left: `${place.x}px`, top: `${place.y}px`, width: `${place.width}px`, height: `${place.height}px` }} />`}
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
