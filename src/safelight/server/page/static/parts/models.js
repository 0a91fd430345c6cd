// @ts-check
/** The choice of models, and where each is now. */

import { html, useEffect, useMemo, useRef, useState } from "../lib/htm-preact.js";
import { setForm, showField } from "../form.js";
import { useStore } from "../store.js";
import { duration, size, t } from "../strings.js";
import { Icon, IconButton } from "./elements.js";
import { onServer } from "../paths.js";

/** @typedef {"whole" | "part" | "none"} Residence */

/** How much of a model is in memory. @param {any} model @param {any} memory the worker's last report @returns {Residence} */
export function residence(model, memory) {
  /** @type {any[]} */
  const resident = Object.values(memory?.places ?? {}).flatMap((/** @type {any} */ place) => place.resident);
  const components = Object.entries(model.components ?? {});
  const held = components.map(([role, digest]) =>
    resident.filter((one) => {
      const [name, start] = one.component.split(" ");
      return name === role && String(digest).startsWith(start);
    }),
  );
  if (components.length && held.every((found) => found.some((one) => one.nbytes >= one.total))) return "whole";
  return held.some((found) => found.length) ? "part" : "none";
}

/** The picture of a model, or its initials. @param {{model: any}} props */
export function ModelPicture({ model }) {
  if (model.preview) return html`<img class="model-picture" src=${onServer(model.preview)} alt="" loading="lazy" />`;
  return html`<span class="model-picture" aria-hidden="true">${[...model.name].slice(0, 2).join("")}</span>`;
}

/** The models of the next images. */
export function ModelPicker() {
  const models = useStore((state) => state.models);
  const chosen = useStore((state) => state.form.models);
  const memory = useStore((state) => state.memory);
  const problem = useStore((state) => (["models", "model"].includes(state.problem?.field) ? state.problem.message : ""));
  useEffect(() => {
    const ends = [showField("models"), showField("model")];
    return () => ends.forEach((end) => end());
  }, []);
  const [open, setOpen] = useState(false);
  const [search, setSearch] = useState("");
  const place = useRef(/** @type {any} */ (null));
  const found = useMemo(() => {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    return models.filter((/** @type {any} */ one) => words.every((word) => `${one.name} ${one.base} ${one.variant}`.toLowerCase().includes(word)));
  }, [models, search]);
  useEffect(() => {
    if (!open) return undefined;
    /** @param {any} event */
    const away = (event) => !place.current?.contains(event.target) && setOpen(false);
    document.addEventListener("pointerdown", away);
    return () => document.removeEventListener("pointerdown", away);
  }, [open]);
  /** @param {string} name */
  const toggle = (name) => setForm({ models: chosen.includes(name) ? chosen.filter((/** @type {string} */ one) => one !== name) : [...chosen, name] });
  return html`<div class="models" ref=${place} onKeyDown=${(/** @type {any} */ event) => event.key === "Escape" && open && (event.stopPropagation(), setOpen(false))}>
    <span class="label" id="models-label">${t("models")}</span>
    <div class="chosen-models">
      ${chosen.map((/** @type {string} */ name) => {
        const model = models.find((/** @type {any} */ one) => one.name === name);
        return html`<span class="chip" key=${name}>
          ${model && html`<${ModelPicture} model=${model} />`}
          <span class="chip-text">${name}<small>${model ? `${model.base} · ${where(model, residence(model, memory))}` : t("not_in_library")}</small></span>
          <${IconButton} icon="close" label=${t("remove_named", { name })} onClick=${() => toggle(name)} />
        </span>`;
      })}
      <button type="button" aria-expanded=${open} onClick=${() => setOpen(!open)}><${Icon} name="plus" /> ${chosen.length ? t("more_models") : t("choose_models")}</button>
    </div>
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    ${open &&
    html`<div class="model-list">
      <input type="search" placeholder=${t("search_models")} aria-label=${t("search_models")} value=${search} autofocus onInput=${(/** @type {any} */ event) => setSearch(event.currentTarget.value)} />
      <ul role="listbox" aria-multiselectable="true" aria-labelledby="models-label">
        ${found.map((/** @type {any} */ model, /** @type {number} */ number) => {
          const now = residence(model, memory);
          return html`<li key=${model.name} role="option" aria-selected=${chosen.includes(model.name)} tabindex=${number ? -1 : 0}
              onClick=${() => toggle(model.name)}
              onKeyDown=${(/** @type {any} */ event) => {
                if (["Enter", " "].includes(event.key)) toggle(model.name);
                else if (event.key === "ArrowDown") event.currentTarget.nextElementSibling?.focus();
                else if (event.key === "ArrowUp") event.currentTarget.previousElementSibling?.focus();
                else return;
                event.preventDefault();
              }}>
            <${ModelPicture} model=${model} />
            <span class="model-text">${model.name}<small>${[model.base, model.variant, size(model.bytes)].filter(Boolean).join(" · ")}</small></span>
            <span class="where" data-where=${now}>${where(model, now)}</span>
          </li>`;
        })}
      </ul>
      ${!found.length && html`<p class="note">${models.length ? t("no_model_found") : t("no_models")} <a href=${onServer("/models")}>${t("get_models")}</a></p>`}
    </div>`}
  </div>`;
}

/**
 * Say where a model is, and how long a switch to it takes.
 * @param {any} model @param {Residence} now
 */
export function where(model, now) {
  const text = t(`where_${now}`);
  return now === "whole" || model.switch_seconds == null ? text : `${text} · ${t("switch_takes", { time: duration(Math.max(0.1, model.switch_seconds)) })}`;
}
