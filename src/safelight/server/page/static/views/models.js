// @ts-check
/** The library: models and adapters, where each is now, downloads, and the catalogue. */

import * as api from "../api.js";
import { attempt, loadModels, toast } from "../actions.js";
import { setForm } from "../form.js";
import { html, useEffect, useMemo, useState } from "../lib/htm-preact.js";
import { Dialog, IconButton, NumberField, Section, SelectField, TextField } from "../parts/elements.js";
import { Memory, Plot } from "../parts/memory.js";
import { Compact, EarlierContents } from "../parts/model_versions.js";
import { ModelPicture, residence, where } from "../parts/models.js";
import { go } from "../router.js";
import { current, useStore } from "../store.js";
import { duration, labelOf, size, t } from "../strings.js";
import { useMay } from "../me.js";
import { onServer } from "../paths.js";

export function Models() {
  const models = useStore((state) => state.models);
  const adapters = useStore((state) => state.adapters);
  const memory = useStore((state) => state.memory);
  const item = useStore((state) => state.route.item);
  const admin = useMay("admin");
  const [search, setSearch] = useState("");
  const found = useMemo(() => {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (/** @type {any} */ one) => words.every((word) => `${one.name} ${one.base} ${one.kind} ${one.variant ?? ""}`.toLowerCase().includes(word));
    return { models: models.filter(matches), adapters: adapters.filter(matches) };
  }, [models, adapters, search]);
  const chosen = models.find((/** @type {any} */ one) => one.name === item);
  return html`<div class="library">
    <div class="library-list">
      <div class="row"><label class="search"><input type="search" aria-label=${t("search_models")} placeholder=${t("search_models")} value=${search} onInput=${(/** @type {any} */ event) => setSearch(event.currentTarget.value)} /></label></div>
      <h2>${t("models_count", { count: found.models.length })}</h2>
      <ul class="cards">
        ${found.models.map((/** @type {any} */ model) => {
          const now = residence(model, memory);
          return html`<li key=${model.name}><a class="model-card" href=${onServer(`/models/${api.part(model.name)}`)} aria-current=${item === model.name ? "true" : undefined}>
            <${ModelPicture} model=${model} />
            <span class="model-text">${model.name}<small>${[model.base, model.variant, model.dtype, size(model.bytes)].filter(Boolean).join(" · ")}</small>
              <span class="where" data-where=${now}>${where(model, now)}${model.pinned ? ` · ${t("pinned")}` : ""}</span></span>
          </a></li>`;
        })}
      </ul>
      ${!models.length && html`<p class="empty">${t("no_models")}</p>`}
      ${adapters.length > 0 && html`<h2>${t("adapters_count", { count: found.adapters.length })}</h2>
      <ul class="cards">
        ${found.adapters.map((/** @type {any} */ one) => html`<li key=${one.name} class="model-card">
          <${ModelPicture} model=${one} />
          <span class="model-text">${one.name}<small>${[one.kind, one.base, size(one.bytes)].filter(Boolean).join(" · ")}</small>
            ${one.trigger_words.length > 0 && html`<small>${one.trigger_words.slice(0, 6).join(", ")}</small>`}</span>
          ${admin && html`<${IconButton} icon="trash" label=${t("remove_named", { name: one.name })} onClick=${() => attempt(() => api.remove(`/adapters/${api.part(one.name)}`))} />`}
        </li>`)}
      </ul>`}
    </div>
    <div class="library-side">
      <${Adding} />
      <${Downloads} />
      <${Section} name="library-memory" title=${t("memory")} open=${true}><${Memory} /><${Speeds} /><//>
      <${Section} name="catalogue" title=${t("catalogue")} open=${!models.length}><${Catalogue} /><//>
    </div>
    ${chosen && html`<${ModelView} key=${chosen.name} model=${chosen} onClose=${() => go("/models")} />`}
  </div>`;
}

/** How long the jobs of the last hour took. */
function Speeds() {
  const history = useStore((state) => state.switchHistory);
  if (history.length < 2) return null;
  return html`<${Plot} label=${t("jobs_hour")} points=${history.map((/** @type {any} */ one) => [one.at, one.seconds])} top=${Math.max(...history.map((/** @type {any} */ one) => one.seconds))} />`;
}

/** Add a file of the server's disk, or download one. */
function Adding() {
  const member = useMay("member");
  const [path, setPath] = useState("");
  const [source, setSource] = useState("");
  const [busy, setBusy] = useState(false);
  /** @param {any} event */
  const add = async (event) => {
    event.preventDefault();
    setBusy(true);
    const added = await attempt(() => api.post("/models", { path: path.trim() }));
    setBusy(false);
    if (added) {
      toast(t("added", { name: added.name }));
      setPath("");
      loadModels();
    }
  };
  /** @param {any} event */
  const get = async (event) => {
    event.preventDefault();
    if (await attempt(() => api.post("/downloads", { source: source.trim() }))) setSource("");
  };
  if (!member) return null;
  return html`<section class="card">
    <h2>${t("add_models")}</h2>
    <form class="row" onSubmit=${get}><${TextField} label=${t("download_source")} value=${source} placeholder="OWNER/NAME · https://… · civitai:…" onChange=${setSource} /><button disabled=${!source.trim()}>${t("download")}</button></form>
    <form class="row" onSubmit=${add}><${TextField} label=${t("path_on_server")} value=${path} placeholder="/models/file.safetensors" onChange=${setPath} /><button disabled=${!path.trim() || busy}>${busy ? t("reading") : t("add")}</button></form>
    <p class="note">${t("import_note")} <code>safelight import ~/ComfyUI</code></p>
  </section>`;
}

function Downloads() {
  const downloads = useStore((state) => state.downloads);
  if (!downloads.length) return null;
  return html`<section class="card" aria-label=${t("downloads")}>
    <h2>${t("downloads")}</h2>
    <ul class="plain">
      ${downloads.slice(0, 20).map((/** @type {any} */ one) => html`<li key=${one.id}>
        <div class="row spread"><span>${one.title || one.source}</span><span class="note">${t(`download_${one.state}`)}</span></div>
        ${one.state === "running" && html`<progress max=${one.total ?? 1} value=${one.total ? one.done : undefined} aria-label=${one.title || one.source} />
          <p class="note">${size(one.done)}${one.total ? ` / ${size(one.total)}` : ""} · ${size(one.rate)}/s ${one.seconds_left != null ? `· ${t("time_left", { time: duration(one.seconds_left) })}` : ""}</p>`}
        ${one.problem && html`<p class="problem">${one.problem}</p>`}
        ${one.added.length > 0 && html`<p class="note">${t("added", { name: one.added.join(", ") })}</p>`}
        ${["queued", "running"].includes(one.state) && html`<button type="button" onClick=${() => attempt(() => api.post(`/downloads/${one.id}/cancel`))}>${t("cancel")}</button>`}
      </li>`)}
    </ul>
  </section>`;
}

/** Well-known models that fit this machine. */
function Catalogue() {
  const [found, setFound] = useState(/** @type {any} */ (null));
  const [memory, setMemory] = useState(/** @type {number | null} */ (null));
  useEffect(() => {
    attempt(() => api.get("/catalogue")).then((answer) => {
      if (!answer) return;
      setFound(answer);
      setMemory(Math.floor(answer.memory_gb));
    });
  }, []);
  if (!found) return html`<p class="note">${t("loading")}</p>`;
  const fitting = found.bundles.filter((/** @type {any} */ one) => memory === null || one.memory_gb <= memory);
  return html`<div>
    <${NumberField} label=${t("memory_gb")} value=${memory} min=${1} step=${1} onChange=${setMemory} />
    ${!found.may_download && html`<p class="note">${t("downloads_off")}</p>`}
    <ul class="plain catalogue">
      ${fitting.map((/** @type {any} */ one) => html`<li key=${one.name}>
        <div class="row spread"><span><strong>${one.title}</strong><br /><small>${one.family} · ${t("fits_memory", { size: one.memory_gb })} · ${[...new Set(one.files.map((/** @type {any} */ file) => file.license ?? t("license_unknown")))].join(", ")}</small></span>
          <button type="button" disabled=${!found.may_download} onClick=${() => attempt(() => api.post("/downloads", { source: one.name }))}>${t("download")}</button></div>
        ${[...new Set(one.files.map((/** @type {any} */ file) => file.todo).filter(Boolean))].map((todo) => html`<p class="note">${todo}</p>`)}
        <details><summary class="note">${t("files_count", { count: one.files.length })}</summary><ul class="plain note">${one.files.map((/** @type {any} */ file) => html`<li>${file.title} (${file.form || file.kind}${file.gigabytes ? `, ${file.gigabytes} GB` : ""})</li>`)}</ul></details>
      </li>`)}
    </ul>
  </div>`;
}

const DEFAULTS = ["width", "height", "steps", "cfg", "guidance", "shift", "clip_skip"];

/** Everything about a model. @param {{model: any, onClose: () => void}} props */
function ModelView({ model, onClose }) {
  const memory = useStore((state) => state.memory);
  const models = useStore((state) => state.models);
  const samplers = useStore((state) => state.families.samplers);
  const [defaults, setDefaults] = useState(model.defaults);
  const [verified, setVerified] = useState("");
  const [removing, setRemoving] = useState(false);
  const [member, admin] = [useMay("member"), useMay("admin")];
  const now = residence(model, memory);
  const path = `/models/${api.part(model.name)}`;
  /** @param {string} what */
  const ask = (what) => attempt(() => api.post(`${path}/${what}`)).then(loadModels);
  const verify = async () => {
    setVerified(t("checking"));
    const answer = await attempt(() => api.post(`${path}/verify`));
    setVerified(answer ? (answer.ok ? t("verified") : answer.problem) : "");
  };
  const shares = Object.entries(model.components).map(([role, digest]) => {
    const others = models.filter((/** @type {any} */ one) => one.name !== model.name && one.components[role] === digest).map((/** @type {any} */ one) => one.name);
    return { role, digest: String(digest), others };
  });
  return html`<${Dialog} label=${model.name} onClose=${onClose} className="model-view">
    <div class="row"><${ModelPicture} model=${model} /><div><h2>${model.name}</h2><p class="note">${[model.base, model.variant, model.prediction_type, model.dtype, size(model.bytes)].filter(Boolean).join(" · ")}</p></div></div>
    <p><span class="where" data-where=${now}>${where(model, now)}</span></p>
    <div class="row">
      <button type="button" class="primary" onClick=${() => (setForm({ models: [model.name] }), go("/"))}>${t("use_model")}</button>
      ${member && html`<button type="button" onClick=${() => ask("load")}>${t("load")}</button>`}
      ${admin && html`<button type="button" onClick=${() => ask("unload")}>${t("unload")}</button>
        <button type="button" aria-pressed=${model.pinned} onClick=${() => ask(model.pinned ? "unpin" : "pin")}>${model.pinned ? t("unpin") : t("pin")}</button>`}
      ${member && html`<button type="button" onClick=${verify}>${t("verify")}</button>`}
      ${admin && model.origin !== "starter" && html`<button type="button" onClick=${() => setRemoving(true)}>${t("remove")}</button>`}
    </div>
    ${verified && html`<p role="status" class="note">${verified}</p>`}
    ${removing && html`<p class="problem">${t("remove_model_ask", { name: model.name })} <button type="button" onClick=${() => attempt(() => api.remove(path)).then(() => (loadModels(), onClose()))}>${t("remove")}</button></p>`}
    <dl class="facts">
      <dt>${t("recognised_by")}</dt><dd>${model.rule}</dd>
      <dt>${t("format")}</dt><dd>${model.format}</dd>
      <dt>${t("digest")}</dt><dd><code>${model.digest ? model.digest.slice(0, 16) : t("not_read_yet")}</code></dd>
      ${shares.map(({ role, digest, others }) => html`<dt>${labelOf(role)}</dt><dd><code>${digest.slice(0, 12)}</code> ${others.length > 0 && html`<small>${t("shared_with", { names: others.slice(0, 4).join(", ") + (others.length > 4 ? ` +${others.length - 4}` : "") })}</small>`}</dd>`)}
    </dl>
    ${admin && html`<${Compact} model=${model} /><${EarlierContents} model=${model} />
    <h3>${t("model_defaults")}</h3>
    <div class="defaults">
      ${DEFAULTS.map((name) => html`<${NumberField} key=${name} label=${t(`field_${name}`)} value=${defaults[name] ?? null} placeholder=${t("familys_own")} onChange=${(/** @type {number | null} */ value) => setDefaults({ ...defaults, [name]: value })} />`)}
      <${SelectField} label=${t("field_sampler")} value=${defaults.sampler ?? ""} options=${[["", t("familys_own")], ...samplers.map((/** @type {any} */ one) => [one.name, one.label])]} onChange=${(/** @type {string} */ sampler) => setDefaults({ ...defaults, sampler: sampler || null })} />
      <${SelectField} label=${t("field_schedule")} value=${defaults.schedule ?? ""} options=${[["", t("familys_own")], ...schedules().map((one) => [one, one])]} onChange=${(/** @type {string} */ schedule) => setDefaults({ ...defaults, schedule: schedule || null })} />
    </div>
    <button type="button" onClick=${() => attempt(() => api.put(`${path}/defaults`, Object.fromEntries(Object.entries(defaults).filter(([, value]) => value !== null)))).then((done) => done && (toast(t("saved")), loadModels()))}>${t("save_defaults")}</button>`}
  <//>`;
}

/** @returns {string[]} */
const schedules = () => current().fields.request.find((/** @type {any} */ field) => field.name === "schedule").choices;
