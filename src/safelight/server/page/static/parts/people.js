// @ts-check
/** People: log-in, one's own password and keys, who there is, and who changed what. */

import * as api from "../api.js";
import { attempt, logOut, start, toast } from "../actions.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { useMay } from "../me.js";
import { useStore } from "../store.js";
import { size, t, when } from "../strings.js";
import { Dialog, SelectField, TextField } from "./elements.js";

const ROLES = ["admin", "member", "guest"];
const ENTRIES = 50;

/** @returns {[string, string][]} */
const roles = () => ROLES.map((role) => [role, t(`role_${role}`)]);

/** @param {number | null} seconds since 1970 */
const day = (seconds) => (seconds ? when(seconds) : "–");

/** What is shown until somebody has logged in. */
export function LogIn() {
  const [name, setName] = useState("");
  const [password, setPassword] = useState("");
  const [problem, setProblem] = useState("");
  /** @param {any} event */
  const submit = async (event) => {
    event.preventDefault();
    try {
      await api.post("/login", { name: name.trim(), password });
      setProblem("");
      await start();
    } catch (error) {
      setPassword("");
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };
  return html`<form class="card log-in" onSubmit=${submit}>
    <h1>${t("log_in")}</h1>
    <${TextField} label=${t("name")} value=${name} autocomplete="username" onChange=${setName} />
    <${TextField} label=${t("password")} type="password" value=${password} autocomplete="current-password" onChange=${setPassword} />
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    <button class="primary" disabled=${!name.trim() || !password}>${t("log_in")}</button>
    <p class="note">${t("log_in_note")}</p>
  </form>`;
}

/** One's own account. */
export function Account() {
  const me = useStore((state) => state.me);
  if (!me?.people) return null;
  const limits = [
    me.max_pixels && t("limit_pixels", { count: me.max_pixels.toLocaleString() }),
    me.max_steps && t("limit_steps", { count: me.max_steps }),
    me.max_waiting && t("limit_waiting", { count: me.max_waiting }),
    me.max_disk && t("limit_disk", { used: size(me.disk), most: size(me.max_disk) }),
  ].filter(Boolean);
  return html`<section class="card" aria-label=${t("account")}>
    <div class="row spread"><h2>${me.name} <small class="note">${t(`role_${me.role}`)}</small></h2><button type="button" onClick=${logOut}>${t("log_out")}</button></div>
    <p class="note">${limits.join(" · ")}</p>
    <${OwnPassword} />
    <${Keys} />
  </section>`;
}

function OwnPassword() {
  const [old, setOld] = useState("");
  const [fresh, setFresh] = useState("");
  /** @param {any} event */
  const submit = async (event) => {
    event.preventDefault();
    if ((await attempt(() => api.put("/me/password", { old, new: fresh }))) === undefined) return;
    toast(t("password_changed"));
    setOld("");
    setFresh("");
  };
  return html`<form class="row" onSubmit=${submit}>
    <${TextField} label=${t("password_old")} type="password" value=${old} autocomplete="current-password" onChange=${setOld} />
    <${TextField} label=${t("password_new")} type="password" value=${fresh} autocomplete="new-password" onChange=${setFresh} />
    <button disabled=${!old || !fresh}>${t("password_change")}</button>
  </form>`;
}

/** API keys, for programs. A key is shown once. */
function Keys() {
  const [keys, setKeys] = useState(/** @type {any[]} */ ([]));
  const [name, setName] = useState("");
  const [made, setMade] = useState(/** @type {any} */ (null));
  const load = () => attempt(() => api.get("/me/keys")).then((found) => found && setKeys(found));
  useEffect(() => void load(), []);
  /** @param {any} event */
  const add = async (event) => {
    event.preventDefault();
    const key = await attempt(() => api.post("/me/keys", { name: name.trim() }));
    if (!key) return;
    setMade(key);
    setName("");
    load();
  };
  return html`<div>
    <h3>${t("keys")}</h3><p class="note">${t("keys_note")}</p>
    <ul class="plain">${keys.map((one) => html`<li key=${one.id} class="row spread">
      <span>${one.name} <small class="note">${t("key_times", { created: day(one.created), used: day(one.used) })}</small></span>
      <button type="button" onClick=${() => attempt(() => api.remove(`/me/keys/${one.id}`)).then(load)}>${t("revoke")}</button></li>`)}</ul>
    <form class="row" onSubmit=${add}><${TextField} label=${t("key_name")} value=${name} onChange=${setName} /><button disabled=${!name.trim()}>${t("key_add")}</button></form>
    ${made && html`<${Dialog} label=${made.name} onClose=${() => setMade(null)}><h2>${made.name}</h2><p>${t("key_once")}</p><p><code class="key-text">${made.key}</code></p>
      <button type="button" class="primary" onClick=${() => navigator.clipboard.writeText(made.key).then(() => toast(t("copied")))}>${t("copy")}</button><//>`}
  </div>`;
}

/** Who there is, for administrators. */
export function People() {
  const people = useStore((state) => state.me?.people);
  const admin = useMay("admin");
  if (!admin) return null;
  return people ? html`<${KnownPeople} /><${Audit} />` : html`<section class="card"><h2>${t("people")}</h2><p class="note">${t("no_people")} <code>safelight users add NAME --role admin</code></p></section>`;
}

function KnownPeople() {
  const me = useStore((state) => state.me);
  const [all, setAll] = useState(/** @type {any[]} */ ([]));
  const [removing, setRemoving] = useState("");
  const [resetting, setResetting] = useState("");
  const load = () => attempt(() => api.get("/people")).then((found) => found && setAll(found));
  useEffect(() => void load(), []);
  /** @param {string} name @param {any} values */
  const set = (name, values) => attempt(() => api.patch(`/people/${api.part(name)}`, values)).then(load);
  return html`<section class="card" aria-label=${t("people")}>
    <h2>${t("people")}</h2>
    <ul class="plain">${all.map((one) => html`<li key=${one.name} class="slot"><div><strong>${one.name}</strong> <small>${t("person_since", { day: day(one.created) })}</small></div>
      <div class="row">
        <${SelectField} label=${t("role")} value=${one.role} options=${roles()} onChange=${(/** @type {string} */ role) => set(one.name, { role })} />
        <button type="button" onClick=${() => setResetting(one.name)}>${t("password_new")}</button>
        <button type="button" disabled=${one.name === me.name} onClick=${() => setRemoving(one.name)}>${t("remove")}</button>
      </div></li>`)}</ul>
    <${AddPerson} onAdded=${load} />
    ${removing && html`<${RemovePerson} name=${removing} others=${all.map((one) => one.name).filter((one) => one !== removing)} onClose=${() => (setRemoving(""), load())} />`}
    ${resetting && html`<${NewPassword} name=${resetting} onClose=${() => setResetting("")} />`}
  </section>`;
}

/** @param {{onAdded: () => unknown}} props */
function AddPerson({ onAdded }) {
  const [name, setName] = useState("");
  const [password, setPassword] = useState("");
  const [role, setRole] = useState("member");
  /** @param {any} event */
  const add = async (event) => {
    event.preventDefault();
    if (!(await attempt(() => api.post("/people", { name: name.trim(), password, role })))) return;
    setName("");
    setPassword("");
    onAdded();
  };
  return html`<form class="row" onSubmit=${add} aria-label=${t("person_add")}>
    <${TextField} label=${t("name")} value=${name} autocomplete="off" onChange=${setName} />
    <${TextField} label=${t("password")} type="password" value=${password} autocomplete="new-password" onChange=${setPassword} />
    <${SelectField} label=${t("role")} value=${role} options=${roles()} onChange=${setRole} />
    <button disabled=${!name.trim() || !password}>${t("person_add")}</button>
  </form>`;
}

/** @param {{name: string, others: string[], onClose: () => void}} props */
function RemovePerson({ name, others, onClose }) {
  const [heir, setHeir] = useState("");
  const remove = () => attempt(() => api.remove(`/people/${api.part(name)}${heir ? `?heir=${api.part(heir)}` : ""}`)).then(onClose);
  return html`<${Dialog} label=${t("remove")} onClose=${onClose}><p>${t("person_remove_ask", { name })}</p>
    <${SelectField} label=${t("heir")} value=${heir} options=${[["", t("heir_nobody")], ...others.map((one) => [one, one])]} onChange=${setHeir} />
    <button type="button" class="primary" onClick=${remove}>${t("remove")}</button><//>`;
}

/** @param {{name: string, onClose: () => void}} props */
function NewPassword({ name, onClose }) {
  const [password, setPassword] = useState("");
  /** @param {any} event */
  const save = async (event) => {
    event.preventDefault();
    if (await attempt(() => api.patch(`/people/${api.part(name)}`, { password }))) onClose();
  };
  return html`<${Dialog} label=${t("password_new")} onClose=${onClose}><form onSubmit=${save}><h2>${name}</h2>
    <${TextField} label=${t("password_new")} type="password" value=${password} autocomplete="new-password" onChange=${setPassword} />
    <button class="primary" disabled=${!password}>${t("save")}</button></form><//>`;
}

/** Who changed what, the newest first. */
function Audit() {
  const [entries, setEntries] = useState(/** @type {any[]} */ ([]));
  const [more, setMore] = useState(true);
  /** @param {number | null} before */
  const load = async (before) => {
    const found = await attempt(() => api.get("/audit", { limit: ENTRIES, before }));
    if (!found) return;
    setEntries(before === null ? found : [...entries, ...found]);
    setMore(found.length === ENTRIES);
  };
  return html`<details class="card" onToggle=${(/** @type {any} */ event) => event.currentTarget.open && !entries.length && load(null)}>
    <summary><h2>${t("audit")}</h2></summary>
    <div class="table-scroll"><table><thead><tr><th>${t("when_column")}</th><th>${t("who")}</th><th>${t("what")}</th><th /></tr></thead><tbody>
      ${entries.map((one) => html`<tr key=${one.number}><td>${day(one.at)}</td><td>${one.person || t("on_machine")}</td><td><code>${one.action}</code></td><td>${[one.subject, one.detail].filter(Boolean).join(": ")}</td></tr>`)}
    </tbody></table></div>
    ${more && entries.length > 0 && html`<button type="button" onClick=${() => load(entries[entries.length - 1].number)}>${t("more")}</button>`}
  </details>`;
}
