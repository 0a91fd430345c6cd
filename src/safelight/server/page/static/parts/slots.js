// @ts-check
/** The slots of the server, each a device with its worker: what each holds and does. */

import * as api from "../api.js";
import { attempt, loadHealth } from "../actions.js";
import { html } from "../lib/htm-preact.js";
import { useMay } from "../me.js";
import { useStore } from "../store.js";
import { t } from "../strings.js";

/** @param {string} path what to do with a slot or the queue */
const ask = (path) => attempt(() => api.post(path)).then(loadHealth);

export function Slots() {
  const health = useStore((state) => state.health);
  const running = useStore((state) => state.queue.running);
  /** @type {any[]} */
  const slots = useStore((state) => state.slots);
  const admin = useMay("admin");
  return html`<section class="card" aria-label=${t("slots")}>
    <div class="row spread"><h2>${t("slots")}</h2>
      ${admin && html`<button type="button" aria-pressed=${health?.paused} onClick=${() => ask(health?.paused ? "/queue/resume" : "/queue/pause")}>${health?.paused ? t("queue_resume") : t("queue_pause")}</button>`}</div>
    <ul class="plain">${slots.map((one) => {
      const now = running.find((/** @type {any} */ job) => job.slot === one.name);
      const state = one.problem || (one.draining ? t("slot_draining") : one.worker === "starting" ? t("worker_starting") : one.busy ? t("running") : t("worker_ready"));
      return html`<li key=${one.name} class="slot">
        <div><strong>${one.name}</strong> <span class="note">${state}${now ? ` · ${now.job.model}: ${now.job.request.prompt || t("no_prompt")}` : one.busy && one.person ? ` · ${t("other_person", { name: one.person })}` : ""}</span>
          <small>${[one.run?.hardware, one.resident.length && t("slot_holds", { names: one.resident.join(", ") }), t("slot_counts", { switches: one.switches, restarts: one.restarts })].filter(Boolean).join(" · ")}</small></div>
        ${admin && html`<div class="row">
          <button type="button" aria-pressed=${one.draining} onClick=${() => ask(`/slots/${api.part(one.name)}/${one.draining ? "resume" : "drain"}`)}>${one.draining ? t("slot_resume") : t("slot_drain")}</button>
          <button type="button" onClick=${() => ask(`/slots/${api.part(one.name)}/restart`)}>${t("slot_restart")}</button>
        </div>`}</li>`;
    })}</ul>
  </section>`;
}
