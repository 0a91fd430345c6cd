// @ts-check
/** Where weights are now: a bar for each place, and why. */

import { html } from "../lib/htm-preact.js";
import { useStore } from "../store.js";
import { labelOf, size, t } from "../strings.js";

const COLOURS = 8;

/** The bytes of each model in a place. @param {any} place @param {any[]} models */
function byModel(place, models) {
  /** @type {Map<string, number>} */
  const found = new Map();
  for (const held of place.resident) {
    const [role, digest] = held.component.split(" ");
    const owners = models.filter((model) => String(model.components?.[role] ?? "").startsWith(digest)).map((model) => model.name);
    const name = owners.join(", ") || labelOf(role);
    found.set(name, (found.get(name) ?? 0) + held.nbytes);
  }
  return [...found];
}

export function Memory() {
  const memory = useStore((state) => state.memory);
  const models = useStore((state) => state.models);
  const history = useStore((state) => state.memoryHistory);
  const places = Object.entries(memory?.places ?? {});
  if (!places.length) return html`<p class="note">${t("memory_empty")}</p>`;
  return html`<div class="memory">
    ${places.map(([name, /** @type {any} */ place]) => {
      const held = byModel(place, models);
      const budget = Math.max(1, place.budget);
      return html`<div key=${name}>
        <p>${t("memory_of", { place: name, stored: size(place.stored), budget: size(budget) })}</p>
        <svg class="bar" viewBox="0 0 1000 12" preserveAspectRatio="none" role="img" aria-label=${t("memory_of", { place: name, stored: size(place.stored), budget: size(budget) })}>
          ${bars([...held.map(([, bytes]) => bytes), place.promised], budget)}
        </svg>
        <ul class="plain">
          ${held.map(([model, bytes], number) => html`<li class="row spread"><span><i class="key" data-colour=${number % COLOURS} />${model}</span><span class="note">${size(bytes)}</span></li>`)}
          ${place.promised > 0 && html`<li class="row spread"><span><i class="key" data-colour="x" />${t("memory_computing")}</span><span class="note">${size(place.promised)}</span></li>`}
        </ul>
        <p class="note">${t("budget_from", { source: place.set_by })}</p>
        <details><summary class="note">${t("why")}</summary><ul class="plain note">${reasons(place.last_plan).map(([reason, bytes]) => html`<li>${size(bytes)} ${reason}</li>`)}</ul></details>
      </div>`;
    })}
    ${history.length > 1 && html`<${Plot} label=${t("memory_hour")} points=${history.map((/** @type {any} */ one) => [one.at, one.stored])} top=${Math.max(...history.map((/** @type {any} */ one) => one.budget))} />`}
  </div>`;
}

/** @param {number[]} sizes @param {number} whole */
function bars(sizes, whole) {
  let at = 0;
  return sizes.map((bytes, number) => {
    const width = (bytes / whole) * 1000;
    const bar = html`<rect x=${at} y="0" width=${width} height="12" class="fill" data-colour=${number === sizes.length - 1 ? "x" : number % COLOURS} />`;
    at += width;
    return bar;
  });
}

/** @param {any[]} plan @returns {[string, number][]} */
function reasons(plan) {
  /** @type {Map<string, number>} */
  const found = new Map();
  for (const step of plan) {
    const reason = `${step.action}: ${step.reason}`;
    found.set(reason, (found.get(reason) ?? 0) + step.nbytes);
  }
  return [...found];
}

/** A line over time. @param {{label: string, points: [number, number][], top: number}} props */
export function Plot({ label, points, top }) {
  const first = points[0][0];
  const span = Math.max(1, points[points.length - 1][0] - first);
  const line = points.map(([at, value]) => `${((at - first) / span) * 300},${60 - (value / Math.max(1, top)) * 58}`).join(" ");
  return html`<figure class="plot">
    <svg viewBox="0 0 300 60" preserveAspectRatio="none" role="img" aria-label=${label}><polyline points=${line} /></svg>
    <figcaption class="note">${label}</figcaption>
  </figure>`;
}
