// @ts-check
/** The one state of the page. Views read parts of it and are drawn again when these change. */

import { useEffect, useReducer, useRef } from "./lib/htm-preact.js";

/** @typedef {Record<string, any>} State */

/** @type {State} */
let state = {};

/** @type {Set<() => void>} */
const listeners = new Set();

/** @returns {State} */
export const current = () => state;

/**
 * Change parts of the state.
 * @param {State | ((state: State) => State)} change the new values of some parts, or a function that returns them
 */
export function change(change) {
  const values = typeof change === "function" ? change(state) : change;
  state = { ...state, ...values };
  for (const listener of listeners) listener();
}

/**
 * Read a part of the state in a view.
 * @template T
 * @param {(state: State) => T} select returns a part; equal parts (`===`) do not draw the view again
 * @returns {T}
 */
export function useStore(select) {
  const [, draw] = useReducer((/** @type {number} */ count) => count + 1, 0);
  const selected = select(state);
  const last = useRef({ select, selected });
  last.current = { select, selected };
  useEffect(() => {
    const listener = () => {
      if (last.current.select(state) !== last.current.selected) draw(0);
    };
    listeners.add(listener);
    listener();
    return () => void listeners.delete(listener);
  }, []);
  return selected;
}

/** Remove a message. @param {number} id */
export const removeToast = (id) => change((now) => ({ toasts: now.toasts.filter((/** @type {any} */ one) => one.id !== id) }));
