// @ts-check
/** What says that images are right: the worker's state, the doctor, canaries, repairs, soaks. */

import * as api from "../api.js";
import { attempt, loadDoctor } from "../actions.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { useStore } from "../store.js";
import { labelOf, t, when } from "../strings.js";
import { HelpLink, NumberField } from "./elements.js";
import { onServer } from "../paths.js";

/** What the worker computes with, and what was verified. */
export function Trust() {
  const health = useStore((state) => state.health);
  const memory = useStore((state) => state.memory);
  const run = health?.run ?? {};
  const transfers = memory?.transfers ?? {};
  const verification = memory?.verification ?? "";
  return html`<section class="card">
    <h2>${t("trust")}</h2>
    <p class="note">${t("trust_note")} <${HelpLink} page="troubleshooting" label=${t("troubleshooting")} /></p>
    <dl class="facts">
      <dt>${t("server")}</dt><dd>Safelight ${health?.version} · ${health?.status === "ok" ? t("status_ok") : health?.problem}</dd>
      <dt>${t("worker")}</dt><dd>${health?.worker === "ready" ? t("worker_ready") : t("worker_starting")} · ${t("restarts", { count: health?.restarts ?? 0 })}</dd>
      ${Object.entries(run).map(([name, value]) => html`<dt>${labelOf(name)}</dt><dd>${inWords(value)}</dd>`)}
    </dl>
    <h3>${t("copies")}</h3>
    <dl class="facts">${[...Object.entries(transfers), ["verification", verification]].map(([name, value]) => html`<dt>${labelOf(name)}</dt><dd>${inWords(value)}</dd>`)}</dl>
    <${Doctor} />
    <${Evidence} />
  </section>`;
}

/** The doctor: what it found, with the evidence and what to do. */
function Doctor() {
  const doctor = useStore((state) => state.doctor);
  useEffect(() => {
    attempt(loadDoctor);
  }, []);
  const [soak, setSoak] = useState(0);
  const running = doctor?.state === "running";
  /** @type {any[]} */
  const findings = doctor?.report?.findings ?? [];
  const wrong = findings.filter((one) => !one.ok);
  const report = doctor?.report && `data:application/json,${encodeURIComponent(JSON.stringify(doctor.report, null, 1))}`;
  return html`<h3>${t("doctor")}</h3>
    <p class="note">${t("doctor_note")}</p>
    <div class="row">
      <${NumberField} label=${t("soak_images")} help=${t("soak_help")} value=${soak} min=${0} step=${100} onChange=${(/** @type {number | null} */ value) => setSoak(value ?? 0)} />
      <button type="button" onClick=${() => attempt(() => api.post("/doctor", { soak_images: soak }))} disabled=${running}>${running ? t("examining") : t("examine")}</button>
      ${report && html`<a class="button" href=${report} download="safelight-doctor.json">${t("save_report")}</a>`}
      <span role="status" class="note">${running ? t("examining_since", { time: when(doctor.started) }) : doctor?.state === "done" ? (wrong.length ? t("findings_wrong", { count: wrong.length }) : t("findings_right", { count: findings.length })) : ""}</span>
    </div>
    ${doctor?.problem && html`<p class="problem">${doctor.problem}</p>`}
    ${wrong.map((one) => html`<div class="finding"><p class="problem"><strong>${one.what}</strong>: ${one.evidence}</p><p>${one.todo}</p></div>`)}
    ${findings.length > 0 && html`<details><summary class="note">${t("all_findings")}</summary><dl class="facts">${findings.map((one) => html`<dt>${one.suspect}</dt><dd>${one.what}: ${one.evidence}</dd>`)}</dl></details>`}`;
}

/** The canaries of the models, the repairs so far, and the diagram of the last soak. */
function Evidence() {
  const ended = useStore((state) => state.doctor?.ended);
  const [found, setFound] = useState(/** @type {any} */ (null));
  useEffect(() => {
    attempt(() => api.get("/trust")).then((answer) => answer && setFound(answer));
  }, [ended]);
  if (!found) return null;
  const repairs = Object.entries(found.repairs);
  return html`<h3>${t("canaries")}</h3>
    <p class="note">${t("canaries_note")}</p>
    ${found.canaries.length > 0 && html`<ul class="canaries">${found.canaries.map((/** @type {any} */ one) => html`<li key=${one.model}>
      <img src=${one.picture} alt="" /><span><strong>${one.model}</strong><small>${t("canary_made", { count: one.count, time: when(one.last) })}</small>
      <small class=${one.same ? "" : "problem"}>${one.same ? t("canary_same", { time: when(one.first) }) : t("canary_differs")}</small></span>
    </li>`)}</ul>`}
    <h3>${t("repairs")}</h3>
    ${repairs.length ? html`<dl class="facts">${repairs.map(([helped, one]) => html`<dt>${t("times", { count: one.times })}</dt><dd>${helped} (${one.suspect}): ${one.last}</dd>`)}</dl>` : html`<p class="note">${t("no_repairs")}</p>`}
    ${found.soak_plot && html`<h3>${t("soak_plot")}</h3><a href=${onServer(found.soak_plot)} target="_blank" rel="noreferrer"><img class="soak-plot" src=${`${onServer(found.soak_plot)}?${ended ?? 0}`} alt=${t("soak_plot")} /></a>`}`;
}

/** @type {(value: any) => string} */
export const inWords = (value) => {
  if (value === null || typeof value !== "object") return String(value);
  if (Array.isArray(value)) return value.map(inWords).join(", ");
  return Object.entries(value)
    .map(([name, one]) => `${name} ${inWords(one)}`)
    .join(", ");
};
