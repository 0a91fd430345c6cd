// @ts-check
/** The control layers of the canvas: a list with what each ControlNet gets. */

import { attempt } from "../actions.js";
import { addControl, changeControl, fillFromPicture, openInControl, removeControl, storeControl } from "../canvas/controls.js";
import { html, useState } from "../lib/htm-preact.js";
import { current, useStore } from "../store.js";
import { t } from "../strings.js";
import { IconButton, PictureDrop, Section, SelectField, SliderField, Switch } from "./elements.js";
import { controlDefaults, PreprocessorPreview } from "./controls.js";

/** @param {{onPaint: (layer: string) => void}} props */
export function ControlLayers({ onPaint }) {
  const controls = useStore((state) => state.canvas.controls);
  const adapters = useStore((state) => state.adapters);
  const nets = adapters.filter((/** @type {any} */ one) => one.kind === "controlnet");
  if (!nets.length && !controls.length) return null;
  /** @param {string} name */
  const add = (name) => name && onPaint(addControl({ ...controlDefaults(), name }));
  return html`<${Section} name="canvas-controls" title=${t("control_layers")} open=${controls.length > 0}>
    ${controls.map((/** @type {any} */ control) => html`<${ControlLayer} key=${control.id} control=${control} onPaint=${onPaint} />`)}
    <${SelectField} choose=${true} label=${t("add_control")} value="" options=${[["", t("choose")], ...nets.map((/** @type {any} */ one) => [one.name, one.name])]} onChange=${add} />
  <//>`;
}

/** @param {{control: any, onPaint: (layer: string) => void}} props */
function ControlLayer({ control, onPaint }) {
  const [digest, setDigest] = useState("");
  const { id } = control;
  const preprocessors = current().fields.control.find((/** @type {any} */ field) => field.name === "preprocessor").choices;
  const look = () => attempt(async () => setDigest(await storeControl(id, current().canvas.box)));
  return html`<fieldset>
    <legend>${control.name}</legend>
    <${IconButton} icon="close" label=${t("remove_named", { name: control.name })} onClick=${() => removeControl(id)} />
    <div class="row">
      <button type="button" onClick=${() => onPaint(id)}>${t("paint_here")}</button>
      <button type="button" onClick=${() => fillFromPicture(id)}>${t("from_canvas")}</button>
    </div>
    <${PictureDrop} label=${t("open_picture")} onPicture=${(/** @type {Blob} */ file) => attempt(() => openInControl(id, file))} />
    <${Switch} label=${t("show_layer")} value=${control.shown} onChange=${(/** @type {boolean} */ shown) => changeControl(id, { shown })} />
    <${SelectField} label=${t("control_preprocessor")} value=${control.preprocessor} options=${preprocessors.map((/** @type {string} */ one) => [one, one])} onChange=${(/** @type {string} */ preprocessor) => changeControl(id, { preprocessor })} />
    <${SliderField} label=${t("control_weight")} value=${control.weight} min=${0} max=${2} step=${0.05} onChange=${(/** @type {number} */ weight) => changeControl(id, { weight })} />
    <button type="button" onClick=${look}>${t("control_look")}</button>
    ${digest && html`<${PreprocessorPreview} control=${{ ...control, image: digest }} />`}
  </fieldset>`;
}
