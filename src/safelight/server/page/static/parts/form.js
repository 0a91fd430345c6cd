// @ts-check
/** The form for new images. */

import * as api from "../api.js";
import { attempt, make, report, toast } from "../actions.js";
import { changed, chosenVariants, emptyForm, fillForm, refusal, requests, setForm, useShown, without } from "../form.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { current, useStore } from "../store.js";
import { duration, t } from "../strings.js";
import { Dialog, Icon, IconButton, NumberField, Section, SelectField, SliderField, Switch, TextField } from "./elements.js";
import { Controls, FormPicture } from "./controls.js";
import { ModelPicker, residence } from "./models.js";
import { Prompt } from "./prompt.js";
import { onServer } from "../paths.js";

const ASPECTS = [
  ["1:1", 1],
  ["4:3", 4 / 3],
  ["3:2", 3 / 2],
  ["16:9", 16 / 9],
  ["3:4", 3 / 4],
  ["2:3", 2 / 3],
  ["9:16", 9 / 16],
];

const WEIGHT_KINDS_LEFT_OUT = new Set(["vae", "controlnet", "textual_inversion", "text_encoder"]);

/** The declaration of a field. @param {string} name */
const declared = (name) => current().fields.request.find((/** @type {any} */ field) => field.name === name);

/** What all elements of a field have: label, help, why it cannot be used. @param {string} name @param {any} state */
function common(name, state) {
  const refused = refusal(state, name);
  const field = declared(name);
  const empty = JSON.stringify(state.form[name]) === JSON.stringify(emptyForm()[name]);
  return {
    label: t(`field_${name}`),
    help: field?.help,
    field: name,
    note: refused ? t("not_for", { model: refused.model }) : "",
    disabled: Boolean(refused) && empty,
  };
}

/** A field for a number, with the bounds that its declaration has. @param {{name: string, placeholder?: string, step?: any}} props */
function Value({ name, placeholder, step }) {
  const state = useShown();
  const field = declared(name);
  return html`<${NumberField}
    ...${common(name, state)}
    value=${state.form[name]}
    min=${field.minimum}
    max=${field.maximum}
    step=${step ?? (field.kind === "whole" ? field.multiple : "any")}
    placeholder=${placeholder}
    onChange=${(/** @type {any} */ value) => setForm({ [name]: value ?? emptyForm()[name] })}
  />`;
}

/** @param {{name: string, step?: number}} props */
function Slide({ name, step = 0.05 }) {
  const state = useShown();
  const field = declared(name);
  return html`<${SliderField}
    ...${common(name, state)}
    value=${state.form[name]}
    min=${field.minimum}
    max=${field.maximum}
    step=${step}
    onChange=${(/** @type {number} */ value) => setForm({ [name]: value })}
  />`;
}

/** @param {{name: string, options?: [string, string][]}} props */
function Choice({ name, options }) {
  const state = useShown();
  const field = declared(name);
  const given = options ?? field.choices.map((/** @type {string} */ one) => [one, one || t("none")]);
  const own = field.optional ? [["", t("models_own")]] : [];
  return html`<${SelectField}
    ...${common(name, state)}
    value=${state.form[name] ?? ""}
    options=${[...own, ...given]}
    onChange=${(/** @type {string} */ value) => setForm({ [name]: value === "" && field.optional ? null : value })}
  />`;
}

/** Width and height, and common shapes. */
function Size() {
  const state = useShown();
  const [first] = chosenVariants(state);
  const side = first?.model.defaults.width ?? first?.model.resolution ?? 512;
  const multiple = Math.max(8, ...chosenVariants(state).map(({ family }) => family?.multiple ?? 8));
  /** @param {number} ratio */
  const choose = (ratio) => {
    const pixels = (first?.model.resolution ?? side) ** 2;
    const width = Math.max(multiple, Math.round(Math.sqrt(pixels * ratio) / multiple) * multiple);
    const height = Math.max(multiple, Math.round(Math.sqrt(pixels / ratio) / multiple) * multiple);
    setForm({ width, height });
  };
  return html`<fieldset class="size">
    <legend>${t("size")}</legend>
    <div class="row">
      <${Value} name="width" placeholder=${String(side)} step=${multiple} />
      <${IconButton} icon="swap" label=${t("swap_sides")} onClick=${() => setForm({ width: state.form.height, height: state.form.width })} />
      <${Value} name="height" placeholder=${String(first?.model.defaults.height ?? side)} step=${multiple} />
    </div>
    <div class="chips">
      <button type="button" aria-pressed=${state.form.width === null && state.form.height === null} onClick=${() => setForm({ width: null, height: null })}>${t("models_own")}</button>
      ${ASPECTS.map(([name, ratio]) => html`<button type="button" onClick=${() => choose(Number(ratio))}>${name}</button>`)}
    </div>
  </fieldset>`;
}

/** The seed: any, or a fixed one. */
export function Seed() {
  const form = useStore((state) => state.form);
  return html`<div class="row seed">
    <${Value} name="seed" placeholder=${t("any_seed")} step=${1} />
    <${IconButton}
      icon=${form.seedLocked ? "lock" : "unlock"}
      label=${form.seedLocked ? t("seed_locked") : t("seed_free")}
      aria-pressed=${form.seedLocked}
      onClick=${() => setForm(form.seedLocked ? { seedLocked: false, seed: null } : { seedLocked: true })}
    />
    <${IconButton} icon="dice" label=${t("new_seed")} onClick=${() => setForm({ seed: Math.floor(Math.random() * 2 ** 32) })} />
    <${Value} name="count" step=${1} />
  </div>`;
}

/** The LoRAs of the request, each with its strength and trigger words. */
function Loras() {
  const state = useShown();
  const bases = new Set(chosenVariants(state).map(({ model }) => model.base));
  const usable = state.adapters.filter((/** @type {any} */ one) => !WEIGHT_KINDS_LEFT_OUT.has(one.kind));
  if (!usable.length) return null;
  const used = state.form.loras;
  const names = new Set(used.map((/** @type {any} */ lora) => lora.name));
  const fits = (/** @type {any} */ one) => !one.base || !bases.size || bases.has(one.base);
  const options = usable.filter((/** @type {any} */ one) => !names.has(one.name) && fits(one)).map((/** @type {any} */ one) => [one.name, one.name]);
  /** @param {number} at @param {any} values */
  const change = (at, values) => setForm({ loras: used.map((/** @type {any} */ lora, /** @type {number} */ n) => (n === at ? { ...lora, ...values } : lora)) });
  /** @param {string} word */
  const addWord = (word) => setForm({ prompt: [state.form.prompt.trim(), word].filter(Boolean).join(", ") });
  return html`<${Section} name="loras" title=${used.length ? t("loras_used", { count: used.length }) : t("loras")} open=${used.length > 0}>
    ${used.map((/** @type {any} */ lora, /** @type {number} */ at) => {
      const adapter = usable.find((/** @type {any} */ one) => one.name === lora.name);
      return html`<div class="lora" key=${lora.name}>
        <div class="row">
          <${SliderField} label=${lora.name} value=${lora.strength} min=${-1} max=${2} step=${0.05} field="loras" onChange=${(/** @type {number} */ strength) => change(at, { strength })} />
          <${IconButton} icon="close" label=${t("remove_named", { name: lora.name })} onClick=${() => setForm({ loras: used.filter((/** @type {any} */ _, /** @type {number} */ n) => n !== at) })} />
        </div>
        ${adapter && !fits(adapter) && html`<p class="problem">${t("lora_for", { base: adapter.base })}</p>`}
        ${!adapter && html`<p class="problem">${t("not_there", { name: lora.name })}</p>`}
        <div class="chips">${(adapter?.trigger_words ?? []).slice(0, 12).map((/** @type {string} */ word) => html`<button type="button" onClick=${() => addWord(word)}>${word}</button>`)}</div>
      </div>`;
    })}
    <${SelectField} choose=${true} label=${t("add_lora")} value="" options=${[["", t("choose")], ...options]} onChange=${(/** @type {string} */ name) => name && setForm({ loras: [...used, { name, strength: 1 }] })} />
  <//>`;
}

/** @param {number} at @param {string} digest of the picture; empty to remove it */
function changeReference(at, digest) {
  const { references } = current().form;
  setForm({ references: digest ? references.with(at, digest) : references.filter((/** @type {any} */ _, /** @type {number} */ n) => n !== at) });
}

/** Image to image, inpainting, reference images. */
function FromPicture() {
  const state = useShown();
  const { form } = state;
  const most = Math.max(0, ...chosenVariants(state).map(({ variant }) => variant?.most_references ?? 0));
  const needs = chosenVariants(state).flatMap(({ variant }) => variant?.needs ?? []);
  return html`<${Section} name="picture" title=${t("from_picture")} open=${Boolean(form.image) || form.references.length > 0 || needs.length > 0}>
    <${FormPicture} label=${t("start_picture")} digest=${form.image} field="image" onChange=${(/** @type {string} */ image) => setForm({ image, mask: image ? current().form.mask : "" })} />
    ${form.image && html`
      <${Slide} name="strength" />
      <p class="note"><a href=${onServer("/canvas")}>${t("paint_mask")}</a></p>
      <${FormPicture} label=${t("mask")} digest=${form.mask} field="mask" onChange=${(/** @type {string} */ mask) => setForm({ mask })} />
      ${form.mask && html`<div class="row"><${Value} name="mask_blur" /><${Value} name="mask_padding" placeholder=${t("whole_picture")} /></div>`}
      ${form.outpaint.length > 0 && html`<div class="row spread"><p class="note">${t("outpaint", { sides: form.outpaint.join(", ") })}</p><${IconButton} icon="close" label=${t("remove_named", { name: t("outpaint", { sides: form.outpaint.join(", ") }) })} onClick=${() => setForm({ outpaint: [] })} /></div>`}
      <${Value} name="image_cfg" />
    `}
    ${(most > 0 || form.references.length > 0) && html`
      <p class="note">${t("references_note", { most })}</p>
      ${form.references.map((/** @type {string} */ digest, /** @type {number} */ at) => html`<${FormPicture} key=${digest} label=${t("reference", { number: at + 1 })} digest=${digest} field="references" onChange=${(/** @type {string} */ one) => changeReference(at, one)} />`)}
      ${form.references.length < most && html`<${FormPicture} label=${t("reference", { number: form.references.length + 1 })} digest="" field="references" onChange=${(/** @type {string} */ one) => setForm({ references: [...current().form.references, one] })} />`}
    `}
  <//>`;
}

const NOT_IN_PRESETS = ["models", "seedLocked", "prompt", "seed", "image", "mask", "controls", "references"];

/** Presets: fields that people save under a name. */
function Presets() {
  const presets = useStore((state) => state.presets);
  const [naming, setNaming] = useState(false);
  const [name, setName] = useState("");
  /** @param {any} event */
  const save = async (event) => {
    event.preventDefault();
    const fields = changed(without(current().form, NOT_IN_PRESETS));
    if (await attempt(() => api.put(`/presets/${api.part(name.trim())}`, { fields }))) setNaming(false);
  };
  /** @param {string} chosen */
  const use = (chosen) => {
    setForm({ ...without(emptyForm(), NOT_IN_PRESETS), ...presets[chosen].fields });
  };
  const options = Object.keys(presets).map((one) => [one, one]);
  return html`<div class="row presets">
    <${SelectField} choose=${true} label=${t("preset")} value="" options=${[["", t("choose")], ...options]} onChange=${(/** @type {string} */ chosen) => chosen && use(chosen)} />
    <button type="button" onClick=${() => setNaming(true)}>${t("save_preset")}</button>
    ${naming && html`<${Dialog} label=${t("save_preset")} onClose=${() => setNaming(false)}>
      <h2>${t("save_preset")}</h2>
      <p class="note">${t("preset_note")}</p>
      <form onSubmit=${save}>
        <${TextField} label=${t("name")} value=${name} onChange=${setName} />
        <div class="row"><button class="primary" disabled=${!name.trim()}>${t("save")}</button>
        ${name.trim() in presets && html`<button type="button" onClick=${() => attempt(() => api.remove(`/presets/${api.part(name.trim())}`)).then(() => setNaming(false))}>${t("delete")}</button>`}</div>
      </form>
    <//>`}
  </div>`;
}

/** Read the settings of a picture that was dropped on the page. @param {Blob} file */
export async function readPicture(file) {
  try {
    const found = await api.post("/pictures/read", { image: await api.dataUrl(file) });
    if (!found) {
      toast(t("picture_says_nothing"));
      return;
    }
    const request = { ...found.use.request };
    const before = current().form;
    const missing = fillForm({ ...emptyForm(), ...request, model: request.model ?? "" });
    const said = [t("settings_of", { program: found.program }), ...found.use.not_carried_over, ...missing.map((name) => t("not_there", { name }))];
    toast(said.join(" · "), "plain", { label: t("undo"), run: () => setForm(before) });
  } catch (error) {
    report(error);
  }
}

export function GenerationForm() {
  const state = useShown();
  const online = useStore((now) => now.online);
  const { form } = state;
  const others = state.models.map((/** @type {any} */ model) => [model.name, model.name]);
  const vaes = state.adapters.filter((/** @type {any} */ one) => one.kind === "vae").map((/** @type {any} */ one) => [one.name, one.name]);
  const samplers = samplerOptions(state);
  const schedules = scheduleOptions(state);
  /** @param {any} event */
  const submit = (event) => {
    event.preventDefault();
    make();
  };
  return html`<form class="form" novalidate onSubmit=${submit} aria-label=${t("form")}>
    <${Prompt} main=${true} field="prompt" label=${t("field_prompt")} value=${form.prompt} onChange=${(/** @type {string} */ prompt) => setForm({ prompt })} onMake=${make} />
    <${NegativePrompt} />
    <${ModelPicker} />
    <div class="make">
      <button class="primary" disabled=${!online}><${Icon} name="plus" /> ${t("make")}</button>
      <${Cost} />
    </div>
    <${Size} />
    <div class="row"><${Value} name="steps" placeholder=${ownValue(state, "steps")} step=${1} /><${Value} name="cfg" placeholder=${ownValue(state, "cfg")} step=${0.5} /></div>
    <${Seed} />
    <${Loras} />
    <${FromPicture} />
    <${Controls} />
    <${Section} name="sampling" title=${t("sampling")}>
      <div class="row"><${Choice} name="sampler" options=${samplers} /><${Choice} name="schedule" options=${schedules} /></div>
      <div class="row"><${Value} name="guidance" placeholder=${ownValue(state, "guidance")} step=${0.5} /><${Value} name="shift" placeholder=${t("models_own")} step=${0.5} /></div>
      <div class="row"><${Value} name="clip_skip" placeholder=${t("models_own")} step=${1} /><${Value} name="first_block_cache" step=${0.01} /></div>
      <div class="row"><${Value} name="variation_seed" step=${1} /><${Value} name="variation_strength" step=${0.05} /></div>
      <${Choice} name="precision" />
    <//>
    <${Section} name="hires" title=${t("hires")}>
      <${Slide} name="hires_scale" step=${0.25} />
      ${form.hires_scale > 1 && html`<${Slide} name="hires_strength" /><div class="row"><${Value} name="hires_steps" step=${1} /><${Choice} name="hires_upscaler" /></div>`}
      <div class="row"><${Value} name="tile" placeholder=${t("none")} step=${64} /><${Choice} name="seamless" /></div>
    <//>
    <${Section} name="components" title=${t("components")}>
      <${Choice} name="vae" options=${[["", t("models_own")], ...vaes, ...others]} />
      <${Choice} name="text_encoder" options=${[["", t("models_own")], ...others]} />
      <div class="row"><${Choice} name="refiner" options=${[["", t("none")], ...others]} />${form.refiner && html`<${Value} name="refiner_start" step=${0.05} />`}</div>
      <${Choice} name="prompt_syntax" />
      <${Switch} label=${t("field_lenient")} help=${declared("lenient").help} value=${form.lenient} onChange=${(/** @type {boolean} */ lenient) => setForm({ lenient })} />
    <//>
    <${Presets} />
    <button type="button" class="quiet" onClick=${() => setForm({ ...emptyForm(), models: form.models })}>${t("reset_form")}</button>
  </form>`;
}

/** The negative prompt, if a chosen model reads one. */
function NegativePrompt() {
  const state = useShown();
  const refused = refusal(state, "negative");
  if (refused && !state.form.negative) return html`<p class="note">${t("no_negative", { model: refused.model })}</p>`;
  return html`<${Prompt} field="negative" label=${t("field_negative")} rows=${1} value=${state.form.negative} onChange=${(/** @type {string} */ negative) => setForm({ negative })} onMake=${make} />`;
}

/** What a field is if nobody says anything. @param {any} state @param {string} name */
function ownValue(state, name) {
  const [first] = chosenVariants(state);
  const value = first?.model.defaults[name] ?? first?.variant?.[name];
  return value == null ? t("models_own") : String(value);
}

/** @param {any} state @returns {[string, string][]} the samplers that all chosen models have */
function samplerOptions(state) {
  const families = chosenVariants(state).map(({ family }) => family).filter(Boolean);
  return state.families.samplers
    .filter((/** @type {any} */ one) => families.every((family) => one.name in family.samplers))
    .map((/** @type {any} */ one) => [one.name, one.label]);
}

/** @param {any} state @returns {[string, string][]} */
function scheduleOptions(state) {
  const families = chosenVariants(state).map(({ family }) => family).filter(Boolean);
  const { sampler } = state.form;
  return declared("schedule")
    .choices.filter((/** @type {string} */ one) => families.every((family) => (sampler ? family.samplers[sampler] ?? [] : Object.values(family.samplers).flat()).includes(one)))
    .map((/** @type {string} */ one) => [one, one]);
}

const COST_AFTER = 400;

/** What the request will take, as the server predicts it: the time of switches and images, and whether it fits. */
function Cost() {
  const state = useShown();
  const [found, setFound] = useState(/** @type {any[]} */ ([]));
  const resident = useStore((now) => now.models.filter((/** @type {any} */ one) => now.form.models.includes(one.name)).map((/** @type {any} */ one) => residence(one, now.memory)).join());
  const asked = JSON.stringify(requests(state, { prompt: "", negative: "", loras: [], controls: [], references: [] }));
  useEffect(() => {
    let late = false;
    const timer = setTimeout(() => {
      Promise.all(JSON.parse(asked).map((/** @type {any} */ one) => api.post("/estimate", one))).then(
        (answers) => late || setFound(answers),
        // What is wrong with the request is said when it is made.
        () => late || setFound([]),
      );
    }, COST_AFTER);
    return () => {
      late = true;
      clearTimeout(timer);
    };
  }, [asked, resident]);
  if (!found.length) return null;
  const count = found.reduce((sum, one) => sum + one.count, 0);
  const unknown = found.filter((one) => one.seconds === null);
  const total = found.reduce((sum, one) => sum + (one.seconds ?? 0), 0);
  const switching = found.reduce((sum, one) => sum + (one.switch_seconds ?? 0), 0);
  const tight = found.filter((one) => one.fits === false || one.memory.some((/** @type {any} */ part) => part.streamed > 0));
  return html`<div class="cost note">
    ${unknown.length ? t("cost_unknown") : t("cost", { time: duration(total), count })}
    ${switching >= 0.05 && ` · ${t("cost_switch", { time: duration(switching) })}`}
    ${!unknown.length && found.some((one) => one.basis !== "this model") && ` · ${t("cost_derived")}`}
    ${tight.map((one) => html`<div class=${one.fits ? "" : "problem"}>${one.model}: ${one.summary}</div>`)}
  </div>`;
}
