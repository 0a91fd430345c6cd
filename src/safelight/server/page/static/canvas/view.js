// @ts-check
/**
 * What is seen of a layer: tiles that follow its pixels.
 *
 * A browser copies a canvas whenever its pixels change, which takes 100 ms for 4096x4096. So the layers themselves are
 * not in the document. Tiles are, and only those that changed are drawn again, a few in each frame.
 */

import { layers, shareOf, watch } from "./layers.js";

/** @typedef {import("./layers.js").Layer} Layer */

/** Pixels per side of a tile. Each also has a row and a column of the next ones, so that no line is seen between them. */
const SIDE = 512;
const OVERLAP = 1;

/** Tiles that are drawn in a frame. The browser copies each after that, so the time of drawing says little. */
const TILES_A_FRAME = 6;

/** The elements that show a layer. */
export class LayerView {
  /** @param {Layer} layer @param {string} className of the element */
  constructor(layer, className) {
    this.layer = layer;
    this.element = document.createElement("div");
    this.element.className = className;
    /** @type {{canvas: HTMLCanvasElement, x: number, y: number}[]} */
    this.tiles = [];
    /** @type {Set<number>} */
    this.stale = new Set();
    this.columns = 0;
    this.waiting = false;
    this.stop = watch(layer, this);
    this.fit();
  }

  /** The layer has another size, and other pixels. */
  fit() {
    const { width, height } = layers[this.layer];
    const share = shareOf(this.layer);
    this.element.style.width = `${width / share}px`;
    this.element.style.height = `${height / share}px`;
    this.columns = Math.ceil(width / SIDE);
    this.tiles = [];
    for (let y = 0; y < height; y += SIDE) for (let x = 0; x < width; x += SIDE) this.tiles.push({ canvas: tile(x, y, width, height, share), x, y });
    this.element.replaceChildren(...this.tiles.map((one) => one.canvas));
    this.stale = new Set(this.tiles.keys());
    this.drawSoon();
  }

  /** Pixels of the layer change. @param {number} left @param {number} top @param {number} right @param {number} bottom */
  touch(left, top, right, bottom) {
    const rows = Math.ceil(layers[this.layer].height / SIDE);
    const first = (/** @type {number} */ at) => Math.max(0, Math.floor((at - OVERLAP) / SIDE));
    for (let row = first(top); row <= Math.min(rows - 1, Math.floor(bottom / SIDE)); row++) {
      for (let column = first(left); column <= Math.min(this.columns - 1, Math.floor(right / SIDE)); column++) this.stale.add(row * this.columns + column);
    }
    this.drawSoon();
  }

  drawSoon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  /** Draw stale tiles, and the rest in the next frames. */
  draw() {
    for (const at of [...this.stale].slice(0, TILES_A_FRAME)) {
      const { canvas, x, y } = this.tiles[at];
      const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
      pen.globalCompositeOperation = "copy";
      pen.drawImage(layers[this.layer], x, y, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
      this.stale.delete(at);
    }
    if (this.stale.size) this.drawSoon();
  }
}

/** @param {number} x @param {number} y @param {number} width @param {number} height of the layer @param {number} share */
function tile(x, y, width, height, share) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(SIDE + OVERLAP, width - x);
  canvas.height = Math.min(SIDE + OVERLAP, height - y);
  Object.assign(canvas.style, { left: `${x / share}px`, top: `${y / share}px`, width: `${canvas.width / share}px`, height: `${canvas.height / share}px` });
  return canvas;
}
