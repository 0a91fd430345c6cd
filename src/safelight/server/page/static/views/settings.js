// @ts-check
/** The settings of the server and of the page, and what says that images are right. */

import * as api from "../api.js";
import { attempt, loadDoctor, toast } from "../actions.js";
import { html, useEffect, useMemo, useState } from "../lib/htm-preact.js";
import { SelectField, TextField } from "../parts/elements.js";
import { change, useStore } from "../store.js";
import { LANGUAGE_NAMES, languageNow, setLanguage, t, when } from "../strings.js";
import { setTheme, themeNow } from "../theme.js";

export function SettingsView() {
  return html`<div class="settings"><${PageSettings} /><${Trust} /><${ServerSettings} /></div>`;
}

function PageSettings() {
  useStore((state) => state.language);
  return html`<section class="card">
    <h2>${t("this_page")}</h2>
    <div class="row">
      <${SelectField} label=${t("language")} value=${languageNow()} options=${Object.entries(LANGUAGE_NAMES)} onChange=${(/** @type {string} */ name) => (setLanguage(name), change({ language: name }))} />
      <${SelectField} label=${t("theme")} value=${themeNow()} options=${[["", t("theme_system")], ["light", t("theme_light")], ["dark", t("theme_dark")]]} onChange=${(/** @type {string} */ name) => (setTheme(name), change({ theme: name }))} />
    </div>
  </section>`;
}

/** What the worker computes with, and what was verified. */
function Trust() {
  const health = useStore((state) => state.health);
  const memory = useStore((state) => state.memory);
  const run = health?.run ?? {};
  const transfers = memory?.transfers ?? {};
  const verification = memory?.verification ?? "";
  return html`<section class="card">
    <h2>${t("trust")}</h2>
    <p class="note">${t("trust_note")}</p>
    <dl class="facts">
      <dt>${t("server")}</dt><dd>Safelight ${health?.version} · ${health?.status === "ok" ? t("status_ok") : health?.problem}</dd>
      <dt>${t("worker")}</dt><dd>${health?.worker === "ready" ? t("worker_ready") : t("worker_starting")} · ${t("restarts", { count: health?.restarts ?? 0 })}</dd>
      ${Object.entries(run).map(([name, value]) => html`<dt>${name.replaceAll("_", " ")}</dt><dd>${text(value)}</dd>`)}
    </dl>
    <h3>${t("copies")}</h3>
    <dl class="facts">${[...Object.entries(transfers), ["verification", verification]].map(([name, value]) => html`<dt>${name.replaceAll("_", " ")}</dt><dd>${text(value)}</dd>`)}</dl>
    <${Doctor} />
  </section>`;
}

/** The doctor: what it found, with the evidence and what to do. */
function Doctor() {
  const doctor = useStore((state) => state.doctor);
  useEffect(() => {
    attempt(loadDoctor);
  }, []);
  const running = doctor?.state === "running";
  /** @type {any[]} */
  const findings = doctor?.report?.findings ?? [];
  const wrong = findings.filter((one) => !one.ok);
  const report = doctor?.report && `data:application/json,${encodeURIComponent(JSON.stringify(doctor.report, null, 1))}`;
  return html`<h3>${t("doctor")}</h3>
    <p class="note">${t("doctor_note")}</p>
    <div class="row">
      <button type="button" onClick=${() => attempt(() => api.post("/doctor"))} disabled=${running}>${running ? t("examining") : t("examine")}</button>
      ${report && html`<a class="button" href=${report} download="safelight-doctor.json">${t("save_report")}</a>`}
      <span role="status" class="note">${running ? t("examining_since", { time: when(doctor.started) }) : doctor?.state === "done" ? (wrong.length ? t("findings_wrong", { count: wrong.length }) : t("findings_right", { count: findings.length })) : ""}</span>
    </div>
    ${doctor?.problem && html`<p class="problem">${doctor.problem}</p>`}
    ${wrong.map((one) => html`<div class="finding"><p class="problem"><strong>${one.what}</strong>: ${one.evidence}</p><p>${one.todo}</p></div>`)}
    ${findings.length > 0 && html`<details><summary class="note">${t("all_findings")}</summary><dl class="facts">${findings.map((one) => html`<dt>${one.suspect}</dt><dd>${one.what}: ${one.evidence}</dd>`)}</dl></details>`}`;
}

/** @type {(value: any) => string} */
const text = (value) => {
  if (value === null || typeof value !== "object") return String(value);
  if (Array.isArray(value)) return value.map(text).join(", ");
  return Object.entries(value)
    .map(([name, one]) => `${name} ${text(one)}`)
    .join(", ");
};

function ServerSettings() {
  const [settings, setSettings] = useState(/** @type {any[]} */ ([]));
  const [search, setSearch] = useState("");
  useEffect(() => {
    attempt(() => api.get("/settings")).then((found) => found && setSettings(found));
  }, []);
  const groups = useMemo(() => {
    const words = search.toLowerCase();
    /** @type {Map<string, any[]>} */
    const found = new Map();
    for (const one of settings) {
      if (`${one.name} ${one.description}`.toLowerCase().includes(words)) found.set(one.group, [...(found.get(one.group) ?? []), one]);
    }
    return [...found];
  }, [settings, search]);
  /** @param {any} changed */
  const replace = (changed) => setSettings(settings.map((one) => (one.name === changed.name ? changed : one)));
  return html`<section class="card">
    <h2>${t("server_settings")}</h2>
    <p class="note">${t("settings_note")}</p>
    <${TextField} label=${t("search_settings")} type="search" value=${search} onChange=${setSearch} />
    ${groups.map(([group, all]) => html`<div key=${group}><h3>${group}</h3>${all.map((one) => html`<${Setting} key=${one.name} setting=${one} onChange=${replace} />`)}</div>`)}
  </section>`;
}

/** @param {{setting: any, onChange: (changed: any) => void}} props */
function Setting({ setting, onChange }) {
  const shown = setting.stored === null ? "" : text(setting.stored);
  const [value, setValue] = useState(shown);
  /** @param {string | null} to */
  const save = async (to) => {
    const changed = await attempt(() => api.put(`/settings/${setting.name}`, { value: to }));
    if (!changed) return;
    onChange(changed);
    setValue(changed.stored === null ? "" : text(changed.stored));
    toast(t("setting_saved", { name: setting.name }));
  };
  return html`<div class="setting">
    <${TextField} label=${setting.name} help=${setting.allowed} value=${setting.secret ? "" : value} readonly=${!setting.may_change} placeholder=${setting.secret ? t("secret") : setting.default} onChange=${setValue} note=${`${setting.description} ${setting.allowed}. ${t("setting_from", { origin: setting.origin })} ${setting.may_change ? "" : t("on_its_machine")}`} />
    ${setting.may_change && value !== shown && html`<button type="button" onClick=${() => save(value)}>${t("save")}</button>`}
    ${setting.may_change && setting.origin !== "default" && html`<button type="button" class="quiet" onClick=${() => save(null)}>${t("to_default")}</button>`}
    ${setting.changes && html`<p class="note changed">${t("after_restart")}</p>`}
  </div>`;
}
