// @ts-check
/** The settings of the server and of the page, and what says that images are right. */

import * as api from "../api.js";
import { attempt, toast } from "../actions.js";
import { html, useEffect, useMemo, useState } from "../lib/htm-preact.js";
import { HelpLink, SelectField, TextField } from "../parts/elements.js";
import { useMay } from "../me.js";
import { Account, People } from "../parts/people.js";
import { Slots } from "../parts/slots.js";
import { inWords, Trust } from "../parts/trust.js";
import { Versions } from "../parts/versions.js";
import { change, useStore } from "../store.js";
import { LANGUAGE_NAMES, languageNow, setLanguage, t } from "../strings.js";
import { setTheme, themeNow } from "../theme.js";

export function SettingsView() {
  const admin = useMay("admin");
  return html`<div class="settings"><${Account} /><${PageSettings} /><${Slots} />${admin && html`<${People} /><${Trust} /><${ServerSettings} /><${Versions} />`}</div>`;
}

function PageSettings() {
  useStore((state) => state.language);
  return html`<section class="card">
    <h2>${t("this_page")}</h2>
    <div class="row">
      <${SelectField} label=${t("language")} value=${languageNow()} options=${Object.entries(LANGUAGE_NAMES)} onChange=${(/** @type {string} */ name) => attempt(() => setLanguage(name)).then(() => change({ language: name }))} />
      <${SelectField} label=${t("theme")} value=${themeNow()} options=${[["", t("theme_system")], ["light", t("theme_light")], ["dark", t("theme_dark")]]} onChange=${(/** @type {string} */ name) => (setTheme(name), change({ theme: name }))} />
    </div>
  </section>`;
}

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
    <p class="note">${t("settings_note")} <${HelpLink} page="settings" label=${t("documentation")} /></p>
    <${TextField} label=${t("search_settings")} type="search" value=${search} onChange=${setSearch} />
    ${groups.map(([group, all]) => html`<div key=${group}><h3>${group}</h3>${all.map((one) => html`<${Setting} key=${one.name} setting=${one} onChange=${replace} />`)}</div>`)}
  </section>`;
}

/** @param {{setting: any, onChange: (changed: any) => void}} props */
function Setting({ setting, onChange }) {
  const shown = setting.stored === null ? "" : inWords(setting.stored);
  const [value, setValue] = useState(shown);
  const [problem, setProblem] = useState("");
  const note = `${setting.description} ${setting.choices.length ? "" : `${setting.allowed}. `}${t("setting_from", { origin: setting.origin === "default" ? t("origin_default") : setting.origin })} ${setting.may_change ? "" : t("on_its_machine", { name: setting.name })}`;
  /** @param {string | null} to */
  const save = async (to) => {
    const answer = await api.put(`/settings/${setting.name}`, { value: to }).catch((error) => ({ problem: error.message }));
    setProblem(answer.problem ?? "");
    if (answer.problem) return;
    const changed = answer;
    onChange(changed);
    setValue(changed.stored === null ? "" : inWords(changed.stored));
    toast(t("setting_saved", { name: setting.name }));
  };
  return html`<div class="setting">
    ${setting.choices.length && setting.may_change
      ? html`<${SelectField} label=${setting.name} value=${value} options=${setting.choices.map((/** @type {string} */ one) => [one, one])} onChange=${setValue} note=${note} />`
      : html`<${TextField} label=${setting.name} value=${setting.secret ? "" : value} readonly=${!setting.may_change} placeholder=${setting.secret ? t("secret") : setting.default} onChange=${setValue} note=${note} />`}
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    ${setting.may_change && value !== shown && html`<button type="button" onClick=${() => save(value)}>${t("save")}</button>`}
    ${setting.may_change && setting.origin !== "default" && html`<button type="button" class="quiet" onClick=${() => save(null)}>${t("to_default")}</button>`}
    ${setting.changes && html`<p class="note changed">${t("after_restart")}</p>`}
  </div>`;
}
