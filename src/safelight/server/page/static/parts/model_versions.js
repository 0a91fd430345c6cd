// @ts-check
/** Other forms of a model: a compact file made from it, and its earlier contents. */

import * as api from "../api.js";
import { attempt, loadModels, toast } from "../actions.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { useStore } from "../store.js";
import { size, t } from "../strings.js";
import { HelpLink, SelectField } from "./elements.js";

const FORMS = ["q8_0", "q5_0", "q4_0", "fp8"];

/** Write a smaller file of a model. @param {{model: any}} props */
export function Compact({ model }) {
  const state = useStore((now) => now.compacting);
  const [form, setForm] = useState(FORMS[0]);
  const mine = state?.about.model === model.name;
  const running = state?.state === "running";
  const ask = () => attempt(() => api.post(`/models/${api.part(model.name)}/compact`, { form }));
  return html`<h3>${t("compact")}</h3>
    <p class="note">${t("compact_note")} <${HelpLink} page="forms" label=${t("documentation")} /></p>
    <div class="row">
      <${SelectField} label=${t("compact_form")} value=${form} options=${FORMS.map((one) => [one, one])} onChange=${setForm} />
      <button type="button" onClick=${ask} disabled=${running}>${running ? t("compact_running", { name: state.about.model }) : t("compact_make")}</button>
    </div>
    ${mine && state.state === "failed" && html`<p class="problem" role="alert">${state.problem}</p>`}
    ${mine && state.state === "done" && html`<p class="note" role="status">${t("added", { name: state.report.name })} · ${t("compact_error", { share: (100 * state.report.error).toFixed(2) })}${state.report.difference ? ` · ${state.report.difference}` : ""}</p>`}`;
}

/** The contents that a model had before. @param {{model: any}} props */
export function EarlierContents({ model }) {
  const [found, setFound] = useState(/** @type {any[]} */ ([]));
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    attempt(() => api.get(`/models/${api.part(model.name)}/earlier`)).then((answer) => answer && setFound(answer));
  }, [model.name, model.digest]);
  if (!found.length) return null;
  /** @param {string} digest */
  const goBack = async (digest) => {
    setBusy(true);
    const done = await attempt(() => api.post(`/models/${api.part(model.name)}/rollback`, { digest }));
    setBusy(false);
    if (done) {
      toast(t("rolled_back", { name: model.name, digest: done.digest.slice(0, 10) }));
      loadModels();
    }
  };
  return html`<h3>${t("earlier_contents")}</h3>
    <ul class="plain">${found.map((one) => html`<li key=${one.digest} class="row spread"><span><code>${one.digest.slice(0, 10)}</code> ${one.path} <small>${size(one.bytes)}</small></span>
      <button type="button" disabled=${busy} onClick=${() => goBack(one.digest)}>${busy ? t("reading") : t("roll_back")}</button></li>`)}</ul>`;
}
