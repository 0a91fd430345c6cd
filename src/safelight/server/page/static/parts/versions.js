// @ts-check
/** The installed versions of Safelight, and going back to one. */

import * as api from "../api.js";
import { attempt } from "../actions.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { t, when } from "../strings.js";

export function Versions() {
  const [found, setFound] = useState(/** @type {any[]} */ ([]));
  const load = () => attempt(() => api.get("/versions")).then((answer) => answer && setFound(answer));
  useEffect(() => void load(), []);
  if (!found.length) return null;
  const waits = found.some((one) => one.active && !one.running);
  return html`<section class="card">
    <h2>${t("versions")}</h2>
    <p class="note">${t("versions_note")} <code>safelight upgrade</code></p>
    <ul class="plain">${found.map((one) => html`<li key=${one.name} class="row spread">
      <span>${Object.entries(one.versions).map(([name, version]) => `${name} ${version}`).join(", ")}<br /><small>${one.name}${one.made ? ` · ${when(one.made)}` : ""}${one.running ? ` · ${t("version_running")}` : ""}</small></span>
      <button type="button" disabled=${one.active} onClick=${() => attempt(() => api.post(`/versions/${api.part(one.name)}/activate`)).then(load)}>${one.active ? t("version_active") : t("version_use")}</button>
    </li>`)}</ul>
    ${waits && html`<p class="note changed" role="status">${t("after_restart")}</p>`}
  </section>`;
}
