// @ts-check
/**
 * The document of the canvas: a picture, a mask and control layers, with undo without end.
 *
 * The pixels are in canvas elements outside of the page's state. `state.canvas` says the rest, and `version` grows with
 * each change of the pixels.
 */

import { change, current } from "../store.js";
import { copyOfAll, dropControlLayers, layers, MASK_COLOUR, newElement, pen, resize, shareOf, touch } from "./layers.js";

/** @typedef {import("./layers.js").Layer} Layer */
/** @typedef {{x: number, y: number, width: number, height: number}} Box */
/**
 * A step that can be undone: what its tiles had before it, and after it was undone, what they had after it.
 * @typedef {{layer: Layer, tiles: Map<number, {x: number, y: number, data: ImageData}>}} Painted
 * @typedef {Painted | {layer: Layer, invert: true} | {whole: Record<Layer, OffscreenCanvas>} | {controls: any[]}} Step
 */

export const MOST_SIDE = 4096;

const FILL_MS = 12;

/** Pixels per side of a tile. A stroke stores the tiles that it touches, before it draws there. */
const TILE = 256;
const TILES_ACROSS = 1024;

/** @type {Step[]} */
let done = [];
/** @type {Step[]} */
let undone = [];

export const emptyCanvas = () => ({
  width: 0,
  height: 0,
  box: /** @type {Box} */ ({ x: 0, y: 0, width: 0, height: 0 }),
  masked: false,
  /** The ControlNets with layers of their own. */
  controls: /** @type {any[]} */ ([]),
  version: 0,
  asked: /** @type {string[]} */ ([]),
  /** The box of each job. */
  boxes: /** @type {Record<string, Box>} */ ({}),
  /** Counts the pictures that were opened: results of an earlier one do not belong to this one. */
  opened: 0,
  canUndo: false,
  canRedo: false,
});

/** @param {Record<string, any>} values */
export function set(values) {
  change((state) => ({
    canvas: { ...state.canvas, ...values, version: state.canvas.version + 1, canUndo: done.length > 0, canRedo: undone.length > 0 },
  }));
}

/** Begin a document. @param {number} width @param {number} height */
function begin(width, height) {
  dropControlLayers();
  resize(width, height);
  done = [];
  undone = [];
  return { ...emptyCanvas(), opened: current().canvas.opened + 1, width, height, box: { x: 0, y: 0, width, height } };
}

/** Put a picture on the canvas. @param {string | Blob} source an address or a file */
export async function openOnCanvas(source) {
  const blob = typeof source === "string" ? await (await fetch(source)).blob() : source;
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  const values = begin(width, height);
  pen(layers.picture).drawImage(bitmap, 0, 0, width, height);
  set(values);
}

/** Begin with an empty picture. @param {number} width @param {number} height */
export function newCanvas(width, height) {
  const values = begin(width, height);
  pen(layers.picture).fillStyle = "#ffffff";
  pen(layers.picture).fillRect(0, 0, width, height);
  set(values);
}

/** @param {Layer} layer @param {boolean} erase @param {string} colour of the picture layer */
function prepared(layer, erase, colour) {
  const context = pen(layers[layer]);
  context.globalCompositeOperation = erase && layer !== "picture" ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = layer === "mask" ? MASK_COLOUR : erase ? "#ffffff" : colour;
  context.lineCap = context.lineJoin = "round";
  return context;
}

/** A stroke that is being drawn. */
export class Stroke {
  /** @param {Layer} layer @param {{erase: boolean, colour: string}} how */
  constructor(layer, how) {
    this.layer = layer;
    this.context = prepared(layer, how.erase, how.colour);
    this.share = shareOf(layer);
    /** @type {Painted} */
    this.step = { layer, tiles: new Map() };
    /** @type {[number, number] | null} */
    this.last = null;
  }

  /** Draw to a point. @param {number} x @param {number} y @param {number} radius in pixels */
  to(x, y, radius) {
    [x, y, radius] = [x * this.share, y * this.share, radius * this.share];
    const [fromX, fromY] = this.last ?? [x, y];
    this.touch(Math.min(x, fromX) - radius - 1, Math.min(y, fromY) - radius - 1, Math.max(x, fromX) + radius + 1, Math.max(y, fromY) + radius + 1);
    this.context.lineWidth = radius * 2;
    this.context.beginPath();
    this.context.moveTo(fromX, fromY);
    this.context.lineTo(x, y + (this.last ? 0 : 0.01));
    this.context.stroke();
    this.last = [x, y];
  }

  /** Fill a shape. @param {[number, number][]} points */
  fill(points) {
    points = points.map(([x, y]) => [x * this.share, y * this.share]);
    const [across, down] = [points.map(([x]) => x), points.map(([, y]) => y)];
    this.touch(Math.min(...across) - 1, Math.min(...down) - 1, Math.max(...across) + 1, Math.max(...down) + 1);
    this.context.beginPath();
    points.forEach(([x, y], number) => (number ? this.context.lineTo(x, y) : this.context.moveTo(x, y)));
    this.context.closePath();
    this.context.fill();
  }

  /** Store the tiles of a part of the layer, in its own pixels, before it changes. @param {number} left @param {number} top @param {number} right @param {number} bottom */
  touch(left, top, right, bottom) {
    const { width, height } = this.context.canvas;
    touch(this.layer, left, top, right, bottom);
    const first = (/** @type {number} */ at) => Math.max(0, Math.floor(at / TILE));
    const end = (/** @type {number} */ at, /** @type {number} */ side) => Math.ceil(Math.min(side, Math.max(0, at)) / TILE);
    for (let row = first(top); row < end(bottom, height); row++) {
      for (let column = first(left); column < end(right, width); column++) {
        const key = row * TILES_ACROSS + column;
        if (this.step.tiles.has(key)) continue;
        const [x, y] = [column * TILE, row * TILE];
        const data = this.context.getImageData(x, y, Math.min(TILE, width - x), Math.min(TILE, height - y));
        this.step.tiles.set(key, { x, y, data });
      }
    }
  }

  /** End the stroke: it can be undone from now on. */
  end() {
    if (!this.step.tiles.size) return;
    remember(this.step);
    set(this.layer === "mask" ? { masked: true } : {});
  }
}

/** A step can be undone from now on. @param {Step} step */
export function remember(step) {
  done.push(step);
  undone = [];
}

/** Undo a step, or do it again: what it stored and the layers exchange their pixels. @param {Step} step */
function exchange(step) {
  if ("whole" in step) {
    const now = copyOfAll();
    resize(step.whole.picture.width, step.whole.picture.height);
    for (const [layer, pixels] of Object.entries(step.whole)) pen(layers[layer]).drawImage(pixels, 0, 0);
    step.whole = now;
    return;
  }
  if ("controls" in step) {
    const now = current().canvas.controls;
    set({ controls: step.controls });
    step.controls = now;
    return;
  }
  if ("invert" in step) {
    invertPixels(layers[step.layer]);
    touch(step.layer);
    return;
  }
  const context = pen(layers[step.layer]);
  for (const tile of step.tiles.values()) {
    const now = context.getImageData(tile.x, tile.y, tile.data.width, tile.data.height);
    context.putImageData(tile.data, tile.x, tile.y);
    touch(step.layer, tile.x, tile.y, tile.x + TILE, tile.y + TILE);
    tile.data = now;
  }
}

/** The size after a step; the box stays within reach. @param {Step} step */
function sizeAfter(step) {
  const { width, height } = layers.picture;
  return "whole" in step ? { width, height, box: { x: 0, y: 0, width, height } } : {};
}

export function undo() {
  const step = done.pop();
  if (!step) return;
  exchange(step);
  undone.push(step);
  set(sizeAfter(step));
}

export function redo() {
  const step = undone.pop();
  if (!step) return;
  exchange(step);
  done.push(step);
  set(sizeAfter(step));
}

/** @param {HTMLCanvasElement} canvas */
function invertPixels(canvas) {
  const context = pen(canvas);
  context.globalCompositeOperation = "xor";
  context.fillStyle = MASK_COLOUR;
  context.fillRect(0, 0, canvas.width, canvas.height);
}

export function invertMask() {
  /** @type {Step} */
  const step = { layer: "mask", invert: true };
  exchange(step);
  remember(step);
  set({ masked: true });
}

export function clearMask() {
  const { width, height } = layers.mask;
  const stroke = new Stroke("mask", { erase: true, colour: "" });
  stroke.touch(0, 0, width, height);
  pen(layers.mask).clearRect(0, 0, width, height);
  stroke.end();
}

/** Fill the part of the mask around a point that nothing bounds. It pauses, so that the page stays quick. @param {number} x @param {number} y */
export async function fillMask(x, y) {
  const { width, height } = layers.mask;
  const { version } = current().canvas;
  [x, y] = [x * shareOf("mask"), y * shareOf("mask")];
  const pixels = pen(layers.mask).getImageData(0, 0, width, height);
  const words = new Uint32Array(pixels.data.buffer);
  const start = Math.floor(y) * width + Math.floor(x);
  if (!(x >= 0 && y >= 0 && x < width && y < height) || words[start]) return;
  const sample = pen(newElement());
  sample.fillStyle = MASK_COLOUR;
  sample.fillRect(0, 0, 1, 1);
  const colour = new Uint32Array(sample.getImageData(0, 0, 1, 1).data.buffer)[0];
  const stack = [start];
  let until = performance.now() + FILL_MS;
  while (stack.length) {
    let at = /** @type {number} */ (stack.pop());
    const row = Math.floor(at / width) * width;
    while (at > row && !words[at - 1]) at--;
    let above = false;
    let below = false;
    for (; at < row + width && !words[at]; at++) {
      words[at] = colour;
      const up = at >= width && !words[at - width];
      const down = at + width < words.length && !words[at + width];
      if (up && !above) stack.push(at - width);
      if (down && !below) stack.push(at + width);
      above = up;
      below = down;
    }
    if (performance.now() > until) {
      await new Promise((resolve) => setTimeout(resolve));
      // Something else was painted or opened meanwhile: that counts.
      if (current().canvas.version !== version) return;
      until = performance.now() + FILL_MS;
    }
  }
  const stroke = new Stroke("mask", { erase: false, colour: "" });
  stroke.touch(0, 0, width, height);
  pen(layers.mask).putImageData(pixels, 0, 0);
  stroke.end();
}

/** @param {Box} box */
export const setBox = (box) => set({ box });

/** Whether the mask has any pixel in the box. @param {Box} box */
function hasMask(box) {
  const share = shareOf("mask");
  const x = Math.max(0, Math.floor(box.x * share));
  const y = Math.max(0, Math.floor(box.y * share));
  const width = Math.min(layers.mask.width, Math.ceil((box.x + box.width) * share)) - x;
  const height = Math.min(layers.mask.height, Math.ceil((box.y + box.height) * share)) - y;
  if (width <= 0 || height <= 0) return false;
  const words = new Uint32Array(pen(layers.mask).getImageData(x, y, width, height).data.buffer);
  return words.some((word) => word !== 0);
}

/**
 * Return the picture in a box, and the mask of what is drawn again: what is painted, and what is beyond the picture.
 * @param {Box} box
 * @returns {Promise<{picture: Blob, mask: Blob | null}>}
 */
export async function boxContent(box) {
  const { width, height } = current().canvas;
  const beyond = box.x < 0 || box.y < 0 || box.x + box.width > width || box.y + box.height > height;
  const out = new OffscreenCanvas(box.width, box.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (out.getContext("2d"));
  if (beyond) {
    // The edges go on, blurred, so that what is drawn there begins with fitting colours.
    context.filter = "blur(24px)";
    context.drawImage(layers.picture, 0, 0, width, height, -box.width * 0.1, -box.height * 0.1, box.width * 1.2, box.height * 1.2);
    context.filter = "none";
  }
  context.drawImage(layers.picture, -box.x, -box.y);
  const masked = hasMask(box);
  const white = new OffscreenCanvas(width, height);
  white.getContext("2d")?.drawImage(layers.mask, 0, 0, width, height);
  const picture = await out.convertToBlob({ type: "image/png" });
  if (!beyond && !masked) return { picture, mask: null };
  context.globalCompositeOperation = "copy";
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, box.width, box.height);
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "#000000";
  context.fillRect(-box.x, -box.y, width, height);
  const whitePen = /** @type {OffscreenCanvasRenderingContext2D} */ (white.getContext("2d"));
  whitePen.globalCompositeOperation = "source-in";
  whitePen.fillStyle = "#ffffff";
  whitePen.fillRect(0, 0, width, height);
  context.drawImage(white, -box.x, -box.y);
  return { picture, mask: await out.convertToBlob({ type: "image/png" }) };
}

/** Put a result into the picture, which grows if the box goes beyond it. @param {string} url @param {Box} box */
export async function accept(url, box) {
  const bitmap = await createImageBitmap(await (await fetch(url)).blob());
  const { width, height } = current().canvas;
  const left = Math.min(0, box.x);
  const top = Math.min(0, box.y);
  const right = Math.max(width, box.x + box.width);
  const bottom = Math.max(height, box.y + box.height);
  const place = { ...box, x: box.x - left, y: box.y - top };
  if (left < 0 || top < 0 || right > width || bottom > height) {
    const whole = copyOfAll();
    resize(right - left, bottom - top);
    for (const [layer, pixels] of Object.entries(whole)) {
      const share = shareOf(layer);
      pen(layers[layer]).drawImage(pixels, -left * share, -top * share, width * share, height * share);
    }
    pen(layers.picture).drawImage(bitmap, place.x, place.y, place.width, place.height);
    remember({ whole });
  } else {
    const stroke = new Stroke("picture", { erase: false, colour: "" });
    stroke.touch(place.x, place.y, place.x + place.width, place.y + place.height);
    stroke.context.drawImage(bitmap, place.x, place.y, place.width, place.height);
    stroke.end();
  }
  // What was drawn again is not drawn again with the next part.
  clearMask();
  set({ width: layers.picture.width, height: layers.picture.height, box: place, asked: [], boxes: {} });
}

/** Forget the results. */
export const discard = () => set({ asked: [], boxes: {} });

/** Jobs draw a box of this document. @param {string[]} ids @param {Box} box @param {number} opened the document they belong to */
export function addResults(ids, box, opened) {
  const { canvas } = current();
  if (canvas.opened !== opened) return;
  const fresh = ids.filter((id) => !canvas.asked.includes(id));
  set({ asked: [...canvas.asked, ...fresh], boxes: { ...canvas.boxes, ...Object.fromEntries(fresh.map((id) => [id, box])) } });
}

/** @returns {Promise<Blob>} the picture as a file */
export const exported = () => new Promise((resolve, reject) => layers.picture.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no picture"))), "image/png"));
