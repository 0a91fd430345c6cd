// @ts-check
/** The form: what the next images are asked for. It survives a reload, because the browser stores it. */

import { change, current, useStore } from "./store.js";

/**
 * @typedef {{name: string, strength: number}} Lora
 * @typedef {Record<string, any>} Form
 */

const KEY = "safelight.form";

/** What the page itself adds to the fields of a request. @type {Form} */
const OWN = { models: [], seedLocked: false, loras: [], controls: [], references: [], image: "", mask: "", outpaint: [] };

/** Fields that only count with an image to start from. */
const OF_IMAGE = ["strength", "mask", "mask_blur", "mask_padding", "outpaint", "image_cfg"];

/** Fields that the form has no element for: the server fills them in. */
const NOT_SHOWN = new Set(["model", "vae_digest", "text_encoder_digest", "refiner_digest", "embeddings", "isolate"]);

/** @returns {Form} */
export function emptyForm() {
  const fields = current().fields.request.filter((/** @type {any} */ field) => !NOT_SHOWN.has(field.name));
  const values = fields.map((/** @type {any} */ field) => [field.name, field.name === "prompt" ? "" : field.default]);
  return { ...Object.fromEntries(values), ...structuredClone(OWN), seed: null };
}

/** Return a copy of some values without these. @param {Form} values @param {Iterable<string>} names @returns {Form} */
export function without(values, names) {
  const left = new Set(names);
  return Object.fromEntries(Object.entries(values).filter(([name]) => !left.has(name)));
}

/** Return the values that differ from those of an empty form. @param {Form} values @returns {Form} */
export function changed(values) {
  const empty = emptyForm();
  return Object.fromEntries(Object.entries(values).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(empty[name])));
}

/** The parts of the state that the form shows. Progress and events of others do not draw the form again. */
export function useShown() {
  for (const name of ["form", "models", "adapters", "families"]) useStore((state) => state[name]);
  return current();
}

/** How many elements show each field now. @type {Map<string, number>} */
const shown = new Map();

/** An element shows a field from now on. @param {string} field @returns {() => void} to be called when it is gone */
export function showField(field) {
  shown.set(field, (shown.get(field) ?? 0) + 1);
  return () => void shown.set(field, (shown.get(field) ?? 1) - 1);
}

/** Whether an element of the page shows a field, so that what is wrong with it can be said there. @param {string} field */
export const isShown = (field) => (shown.get(field) ?? 0) > 0;

/** Whether a stored value has the kind that the form needs. @param {any} value @param {any} like */
function fits(value, like) {
  if (like === null) return value === null || ["number", "string"].includes(typeof value);
  if (Array.isArray(like)) return Array.isArray(value);
  return typeof value === typeof like;
}

/** Restore the stored form, or begin with an empty one and the server's default model. */
export function restoreForm() {
  const form = emptyForm();
  try {
    const stored = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    for (const name of Object.keys(form)) if (name in stored && fits(stored[name], form[name])) form[name] = stored[name];
  } catch {
    // Another version wrote it. An empty form is right.
  }
  const names = new Set(current().models.map((/** @type {any} */ model) => model.name));
  form.models = form.models.filter((/** @type {string} */ name) => names.has(name));
  if (!form.models.length && current().models.length) form.models = [current().defaultModel];
  change({ form });
}

/** @param {Form} values the new values of some fields */
export function setForm(values) {
  const form = { ...current().form, ...values };
  change({ form, problem: null });
  localStorage.setItem(KEY, JSON.stringify(form));
}

/** The families of the chosen models. @param {Record<string, any>} state @returns {any[]} */
export function chosenVariants(state) {
  return state.form.models
    .map((/** @type {string} */ name) => state.models.find((/** @type {any} */ model) => model.name === name))
    .filter(Boolean)
    .map((/** @type {any} */ model) => {
      const family = state.families.families.find((/** @type {any} */ one) => one.name === model.base);
      return { model, family, variant: family?.variants[model.variant] };
    });
}

/**
 * Say why a field cannot be used with the chosen models; null if it can.
 * @param {Record<string, any>} state
 * @param {string} name
 * @returns {{model: string, feature: string} | null}
 */
export function refusal(state, name) {
  for (const { model, family, variant } of chosenVariants(state)) {
    if (variant?.refused[name]) return { model: model.name, feature: variant.refused[name] };
    if (name === "shift" && family && family.noise !== "flow") return { model: model.name, feature: "shift" };
    if (name === "guidance" && variant && variant.guidance === null) return { model: model.name, feature: "guidance" };
  }
  return null;
}

/**
 * Return one request for each chosen model. Fields that no chosen model has are left out, if they have their defaults.
 * @param {Record<string, any>} state
 * @param {Form} [more] values that replace those of the form
 */
export function requests(state, more = {}) {
  const { models, prompt, ...values } = { ...state.form, ...more };
  /** @type {Form} */
  const fields = { ...changed(without(values, ["seedLocked"])), prompt };
  if (!fields.image) for (const name of OF_IMAGE) delete fields[name];
  if (!fields.refiner) delete fields.refiner_start;
  return models.map((/** @type {string} */ model) => ({ ...fields, model }));
}

/**
 * Fill the form with the request of an image.
 * @param {Record<string, any>} request
 * @returns {string[]} what cannot be used any more
 */
export function fillForm(request) {
  const form = emptyForm();
  const missing = [];
  for (const name of Object.keys(form)) {
    if (name in request && fits(request[name], form[name])) form[name] = request[name];
  }
  form.count = 1;
  form.loras = (request.loras ?? []).map((/** @type {any} */ lora) => ({ ...lora }));
  const names = current().models.map((/** @type {any} */ model) => model.name);
  form.models = names.includes(request.model) ? [request.model] : [];
  if (!form.models.length && request.model) missing.push(request.model);
  form.seedLocked = true;
  setForm(form);
  return missing;
}
