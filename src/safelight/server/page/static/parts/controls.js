// @ts-check
/** ControlNets of the form, each with its picture, and what a preprocessor makes of it. */

import * as api from "../api.js";
import { attempt } from "../actions.js";
import { setForm, showField, useShown } from "../form.js";
import { html, useEffect, useRef, useState } from "../lib/htm-preact.js";
import { current, useStore } from "../store.js";
import { t } from "../strings.js";
import { IconButton, NumberField, PictureDrop, Section, SelectField, SliderField } from "./elements.js";
import { onServer } from "../paths.js";

/** Milliseconds after the last change until a preprocessor runs. */
const PREVIEW_AFTER = 300;

/** The fields of a new ControlNet, without its name and picture. @returns {Record<string, any>} */
export function controlDefaults() {
  const fields = current().fields.control.filter((/** @type {any} */ field) => field.default !== null && !["name", "image", "digest"].includes(field.name));
  return Object.fromEntries(fields.map((/** @type {any} */ field) => [field.name, field.default]));
}

/** A stored picture of the form, or a place to drop one. @param {any} props */
export function FormPicture({ label, digest, field, onChange }) {
  const problem = useStore((state) => (state.problem?.field === field ? state.problem.message : ""));
  const place = useRef(/** @type {any} */ (null));
  useEffect(() => showField(field), [field]);
  useEffect(() => {
    if (problem) place.current.scrollIntoView({ block: "center" });
  }, [problem]);
  /** @param {Blob} blob */
  const take = async (blob) => {
    const stored = await attempt(() => api.storeInput(blob, field));
    if (stored) onChange(stored.digest);
  };
  return html`<div class="form-picture" ref=${place}>
    <${PictureDrop} label=${digest ? t("replace_picture", { what: label }) : t("choose_picture", { what: label })} onPicture=${take}>
      ${digest && html`<img src=${onServer(`/api/v1/inputs/${digest}`)} alt=${label} />`}
    <//>
    ${digest && html`<${IconButton} icon="close" label=${t("remove_named", { name: label })} onClick=${() => onChange("")} />`}
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
  </div>`;
}

/** What a preprocessor makes of the picture: this is what the ControlNet gets. @param {{control: any}} props */
export function PreprocessorPreview({ control }) {
  const { image, preprocessor, low, high } = control;
  const [url, setUrl] = useState("");
  const [problem, setProblem] = useState("");
  useEffect(() => {
    let made = "";
    let late = false;
    const timer = setTimeout(() => {
      api.picture("/preprocess", { image, preprocessor, low, high }).then(
        (blob) => {
          if (late) return;
          made = URL.createObjectURL(blob);
          setUrl(made);
          setProblem("");
        },
        (error) => late || setProblem(String(error.message)),
      );
    }, PREVIEW_AFTER);
    return () => {
      late = true;
      clearTimeout(timer);
      URL.revokeObjectURL(made);
    };
  }, [image, preprocessor, low, high]);
  if (problem) return html`<p class="problem" role="alert">${problem}</p>`;
  return url ? html`<img class="control-preview" src=${url} alt=${t("control_sees", { preprocessor })} />` : html`<p class="note">${t("loading")}</p>`;
}

/** ControlNets, each with its picture. */
export function Controls() {
  const state = useShown();
  const nets = state.adapters.filter((/** @type {any} */ one) => one.kind === "controlnet");
  const { controls } = state.form;
  if (!nets.length && !controls.length) return null;
  const fields = state.fields.control;
  const of = (/** @type {string} */ name) => fields.find((/** @type {any} */ field) => field.name === name);
  // A picture takes a while to be stored: what was changed meanwhile counts.
  /** @param {number} at @param {any} values */
  const change = (at, values) => setForm({ controls: current().form.controls.map((/** @type {any} */ one, /** @type {number} */ n) => (n === at ? { ...one, ...values } : one)) });
  const choices = (/** @type {string} */ name) => of(name).choices.map((/** @type {string} */ one) => [one, one]);
  return html`<${Section} name="controls" title="ControlNet" open=${controls.length > 0}>
    ${controls.map((/** @type {any} */ control, /** @type {number} */ at) => html`<fieldset key=${at}>
      <legend>${control.name}</legend>
      <${IconButton} icon="close" label=${t("remove_named", { name: control.name })} onClick=${() => setForm({ controls: controls.filter((/** @type {any} */ _, /** @type {number} */ n) => n !== at) })} />
      <${FormPicture} label=${t("control_picture")} digest=${control.image} field="controls" onChange=${(/** @type {string} */ image) => change(at, { image })} />
      <${SelectField} label=${t("control_preprocessor")} value=${control.preprocessor} options=${choices("preprocessor")} onChange=${(/** @type {string} */ preprocessor) => change(at, { preprocessor })} />
      <${SelectField} label=${t("control_mode")} value=${control.mode} options=${choices("mode")} onChange=${(/** @type {string} */ mode) => change(at, { mode })} />
      <${SliderField} label=${t("control_weight")} value=${control.weight} min=${0} max=${2} step=${0.05} onChange=${(/** @type {number} */ weight) => change(at, { weight })} />
      <div class="row">
        <${NumberField} label=${t("control_start")} value=${control.start} min=${0} max=${1} step=${0.05} onChange=${(/** @type {number} */ start) => change(at, { start: start ?? 0 })} />
        <${NumberField} label=${t("control_end")} value=${control.end} min=${0} max=${1} step=${0.05} onChange=${(/** @type {number} */ end) => change(at, { end: end ?? 1 })} />
      </div>
      ${control.image && control.preprocessor !== "none" && html`<${PreprocessorPreview} control=${control} />`}
      ${["canny", "threshold", "blur"].includes(control.preprocessor) && html`<div class="row">
        <${NumberField} label=${t("control_low")} value=${control.low} min=${0} max=${255} onChange=${(/** @type {number} */ low) => change(at, { low: low ?? 100 })} />
        <${NumberField} label=${t("control_high")} value=${control.high} min=${1} onChange=${(/** @type {number} */ high) => change(at, { high: high ?? 200 })} />
      </div>`}
      <${SelectField} label=${t("control_resize")} value=${control.resize_mode} options=${choices("resize_mode")} onChange=${(/** @type {string} */ resize_mode) => change(at, { resize_mode })} />
    </fieldset>`)}
    <${SelectField}
      label=${t("add_control")}
      choose=${true}
      value=""
      options=${[["", t("choose")], ...nets.map((/** @type {any} */ one) => [one.name, one.name])]}
      onChange=${(/** @type {string} */ name) => name && setForm({ controls: [...controls, { ...controlDefaults(), name, image: "" }] })}
    />
  <//>`;
}
