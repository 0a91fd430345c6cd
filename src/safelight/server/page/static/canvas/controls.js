// @ts-check
/** Control layers: pictures for ControlNets, which lie over the canvas and are painted there. */

import * as api from "../api.js";
import { without } from "../form.js";
import { current } from "../store.js";
import { remember, set, Stroke } from "./document.js";
import { addLayer, layers, pen, shareOf } from "./layers.js";

/** @typedef {import("./document.js").Box} Box */

let numbers = 0;

/** Change the list of control layers, so that it can be undone. @param {any[]} controls */
function setControls(controls) {
  remember({ controls: current().canvas.controls });
  set({ controls });
}

/**
 * Add a layer for a ControlNet.
 * @param {Record<string, any>} control its fields in a request, without the picture
 * @returns {string} the layer
 */
export function addControl(control) {
  const id = `control${++numbers}`;
  addLayer(id);
  setControls([...current().canvas.controls, { ...control, id, shown: true }]);
  return id;
}

/** @param {string} id @param {Record<string, any>} values */
export const changeControl = (id, values) => set({ controls: current().canvas.controls.map((/** @type {any} */ one) => (one.id === id ? { ...one, ...values } : one)) });

/** @param {string} id */
export const removeControl = (id) => setControls(current().canvas.controls.filter((/** @type {any} */ one) => one.id !== id));

/**
 * Put a picture into a layer. It fills the layer.
 * @param {string} id @param {CanvasImageSource} picture
 */
export function fillControl(id, picture) {
  const { width, height } = layers[id];
  const stroke = new Stroke(id, { erase: false, colour: "" });
  stroke.touch(0, 0, width, height);
  stroke.context.drawImage(picture, 0, 0, width, height);
  stroke.end();
}

/** Put the picture of the canvas into a layer, for a preprocessor. @param {string} id */
export const fillFromPicture = (id) => fillControl(id, layers.picture);

/** @param {string} id @param {Blob} file */
export async function openInControl(id, file) {
  fillControl(id, await createImageBitmap(file));
}

/** The part of a layer in a box, on black, as ControlNets read it. @param {string} id @param {Box} box @returns {Promise<Blob>} */
function contentOf(id, box) {
  const share = shareOf(id);
  const out = new OffscreenCanvas(box.width, box.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (out.getContext("2d"));
  context.fillStyle = "#000000";
  context.fillRect(0, 0, box.width, box.height);
  const { width, height } = layers[id];
  context.drawImage(layers[id], -box.x, -box.y, width / share, height / share);
  return out.convertToBlob({ type: "image/png" });
}

/** Whether anything was painted in a layer. @param {string} id */
function hasPixels(id) {
  const { width, height } = layers[id];
  return new Uint32Array(pen(layers[id]).getImageData(0, 0, width, height).data.buffer).some((word) => word !== 0);
}

/**
 * Store the part of a layer in a box as an input image.
 * @param {string} id @param {Box} box
 * @returns {Promise<string>} its digest
 */
export const storeControl = async (id, box) => (await api.storeInput(await contentOf(id, box), "controls")).digest;

/** The ControlNets of a request for a box: those of the layers that have pixels. @param {Box} box @returns {Promise<any[]>} */
export async function controlsOf(box) {
  const used = current().canvas.controls.filter((/** @type {any} */ one) => hasPixels(one.id));
  return Promise.all(
    used.map(async (/** @type {any} */ one) => ({ ...without(one, ["id", "shown"]), image: await storeControl(one.id, box) })),
  );
}
