// @ts-check
/** The elements with the pixels of the canvas: a picture, a mask over it, and a layer for each ControlNet. */

/** @typedef {string} Layer `picture`, `mask`, or the identifier of a control layer */

/** The mask of a larger picture has fewer pixels than the picture, so that painting stays quick. So have control layers. */
const MOST_MASK_SIDE = 2048;

export const MASK_COLOUR = "#e0593c";

/** @type {Record<Layer, HTMLCanvasElement>} */
export const layers = { picture: newElement(), mask: newElement() };

export function newElement() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  return canvas;
}

/** @param {HTMLCanvasElement} canvas */
export const pen = (canvas) => /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));

/** Who shows each layer. @typedef {{fit: () => void, touch: (left: number, top: number, right: number, bottom: number) => void}} Watcher */

/** @type {Map<Layer, Watcher>} */
const watchers = new Map();

/** Be told of changes of a layer. @param {Layer} layer @param {Watcher} watcher @returns {() => void} to be called at the end */
export function watch(layer, watcher) {
  watchers.set(layer, watcher);
  return () => {
    if (watchers.get(layer) === watcher) watchers.delete(layer);
  };
}

/** Pixels of a layer change now; by default all. @param {Layer} layer @param {number} left @param {number} top @param {number} right @param {number} bottom */
export const touch = (layer, left = 0, top = 0, right = Infinity, bottom = Infinity) => watchers.get(layer)?.touch(left, top, right, bottom);

/** Give all layers the size of a picture, and clear them. @param {number} width @param {number} height */
export function resize(width, height) {
  for (const layer of Object.keys(layers)) fit(layer, width, height);
  for (const watcher of watchers.values()) watcher.fit();
}

/** @param {Layer} layer @param {number} width @param {number} height of the picture */
function fit(layer, width, height) {
  const share = layer === "picture" ? 1 : Math.min(1, MOST_MASK_SIDE / Math.max(width, height));
  const canvas = layers[layer];
  canvas.width = Math.max(1, Math.round(width * share));
  canvas.height = Math.max(1, Math.round(height * share));
}

/** Add a layer without pixels. @param {Layer} layer */
export function addLayer(layer) {
  layers[layer] = newElement();
  fit(layer, layers.picture.width, layers.picture.height);
}

/** Remove all layers but picture and mask. */
export function dropControlLayers() {
  for (const layer of Object.keys(layers)) if (layer !== "picture" && layer !== "mask") delete layers[layer];
}

/** Pixels of a layer for each pixel of the picture. @param {Layer} layer */
export const shareOf = (layer) => layers[layer].width / layers.picture.width;

/** @returns {Record<Layer, OffscreenCanvas>} a copy of the pixels of all layers */
export function copyOfAll() {
  return Object.fromEntries(
    Object.entries(layers).map(([layer, canvas]) => {
      const copy = new OffscreenCanvas(canvas.width, canvas.height);
      copy.getContext("2d")?.drawImage(canvas, 0, 0);
      return [layer, copy];
    }),
  );
}
