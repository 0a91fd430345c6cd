// @ts-check
/** The box of the canvas: its grips, and how it moves when one is pulled. */

/** @typedef {import("./document.js").Box} Box */

/** Sides and places of the box are multiples of this, in pixels. */
export const SNAP = 8;
export const LEAST_BOX = 64;

/** @param {Box} box @returns {[number, number, number, number][]} place and side of each grip: -1, 0 or 1 */
export function grips({ x, y, width, height }) {
  const found = /** @type {[number, number, number, number][]} */ ([]);
  for (const across of [-1, 0, 1]) for (const down of [-1, 0, 1]) if (across || down) found.push([x + ((across + 1) * width) / 2, y + ((down + 1) * height) / 2, across, down]);
  return found;
}

/** @param {Box} box @param {number} x @param {number} y @param {number} near @returns {[number, number] | null} which side is held; [0, 0] moves the box */
export function gripOf(box, x, y, near) {
  const grip = grips(box).find(([gx, gy]) => Math.abs(gx - x) < near && Math.abs(gy - y) < near);
  if (grip) return [grip[2], grip[3]];
  const inside = x >= box.x && y >= box.y && x <= box.x + box.width && y <= box.y + box.height;
  return inside ? [0, 0] : null;
}

/** @param {number} value */
const snapped = (value) => Math.round(value / SNAP) * SNAP;

/** @param {Box} box @param {[number, number]} grip @param {number} dx @param {number} dy */
export function moved(box, [across, down], dx, dy) {
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
