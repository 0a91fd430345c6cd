// @ts-check
/** The first view: the form, what is drawn now, the queue, and the images of the last request. */

import { cancel, cancelWaiting, setOrder } from "../actions.js";
import { html, useState } from "../lib/htm-preact.js";
import { setForm } from "../form.js";
import { GenerationForm } from "../parts/form.js";
import { Thumbnail } from "../parts/image.js";
import { HelpLink, IconButton, Section } from "../parts/elements.js";
import { Memory } from "../parts/memory.js";
import { go } from "../router.js";
import { useStore } from "../store.js";
import { duration, t } from "../strings.js";
import { onServer } from "../paths.js";

export function Create() {
  return html`<div class="create">
    <div class="side"><${GenerationForm} /></div>
    <div class="work">
      <${Running} />
      <${Sheet} />
      <${Earlier} />
      <${Waiting} />
      <${Section} name="memory" title=${t("memory")}><${Memory} /><//>
    </div>
  </div>`;
}

/** The jobs that are computed now, one for each busy slot. */
export function Running() {
  const running = useStore((state) => state.queue.running);
  return running.map((/** @type {any} */ one) => html`<${RunningJob} key=${one.job.id} job=${one.job} known=${one.progress} slot=${running.length > 1 ? one.slot : ""} />`);
}

/** @param {{job: any, known: any, slot: string}} props */
function RunningJob({ job, known, slot }) {
  const progress = useStore((state) => state.progress[job.id]) ?? known;
  const stage = progress ? (progress.stage === "denoise" ? t("stage_step", { step: progress.step, steps: progress.steps }) : t(`stage_${progress.stage}`)) : t("stage_waiting");
  const within = !progress ? 0 : progress.stage === "denoise" ? progress.step / Math.max(1, progress.steps) : progress.stage === "decode" ? 1 : 0;
  const share = progress ? (progress.image + within) / job.request.count : 0;
  const elapsed = job.started ? Date.now() / 1000 - job.started : 0;
  const left = share > 0.08 && elapsed > 1 ? t("time_left", { time: duration((elapsed / share) * (1 - share)) }) : "";
  return html`<section class="card running" aria-label=${t("now")}>
    ${progress?.preview ? html`<img src=${progress.preview} alt=${t("unfinished")} />` : html`<div class="no-preview" />`}
    <div class="running-text">
      <p class="running-prompt">${job.request.prompt || t("no_prompt")}</p>
      <p class="note">${slot && `${slot} · `}${job.model}: ${stage} ${left && `· ${left}`}</p>
      <p class="note">${job.reason}</p>
      <progress max="1" value=${share} aria-label=${t("progress")} />
    </div>
    <button type="button" onClick=${() => cancel(job.id)}>${t("cancel")}</button>
  </section>`;
}

/** The jobs that wait, in their order with the reasons. Own ones can be moved. */
export function Waiting() {
  const waiting = useStore((state) => state.queue.waiting);
  const [dragged, setDragged] = useState("");
  const others = useStore((state) => state.queue.others_running + state.queue.others_waiting);
  const me = useStore((state) => state.me);
  const othersNote = others > 0 && html`<p class="note">${t("others_waiting", { count: others })}</p>`;
  if (!waiting.length) return othersNote || null;
  const ids = waiting.map((/** @type {any} */ place) => place.job.id);
  /** Put a job at another place. @param {string} id @param {number} at */
  const move = (id, at) => {
    const others = ids.filter((/** @type {string} */ one) => one !== id);
    setOrder([...others.slice(0, at), id, ...others.slice(at)]);
  };
  return html`<section class="card" aria-label=${t("queue")}>
    <div class="row spread"><h2>${t("queue_count", { count: waiting.length })}</h2><span class="row">${me?.people && me.role === "admin" && html`<button type="button" onClick=${() => cancelWaiting(true)}>${t("cancel_everybody")}</button>`}<button type="button" onClick=${() => cancelWaiting()}>${t("cancel_all")}</button></span></div>
    ${othersNote}
    <ol class="queue">
      ${waiting.map(
        (/** @type {any} */ place, /** @type {number} */ at) => html`<li key=${place.job.id} draggable=${true}
          onDragStart=${() => setDragged(place.job.id)} onDragOver=${(/** @type {any} */ event) => event.preventDefault()} onDrop=${() => (dragged && move(dragged, at), setDragged(""))}>
          <span class="queue-text">${place.place + 1}. ${place.job.person && place.job.person !== me?.name ? `${place.job.person} · ` : ""}${place.job.model}: ${place.job.request.prompt || t("no_prompt")} <small>${place.job.request.seed}</small></span>
          <span class="note">${place.reason}</span>
          <${IconButton} icon="up" label=${t("sooner")} disabled=${at === 0} onClick=${() => move(place.job.id, at - 1)} />
          <${IconButton} icon="down" label=${t("later")} disabled=${at === waiting.length - 1} onClick=${() => move(place.job.id, at + 1)} />
          <${IconButton} icon="close" label=${t("cancel")} onClick=${() => cancel(place.job.id)} />
        </li>`,
      )}
    </ol>
  </section>`;
}

/** The images of the last request: one row of places for each job. */
function Sheet() {
  const asked = useStore((state) => state.asked);
  const jobs = useStore((state) => state.jobs);
  const sheet = useStore((state) => state.sheet);
  const there = asked.map((/** @type {string} */ id) => jobs[id]).filter(Boolean);
  if (!there.length) return html`<${Welcome} />`;
  const images = there.flatMap((/** @type {any} */ job) => sheet[job.id] ?? []);
  return html`<section aria-label=${t("last_request")}>
    <div class="row spread">
      <h2>${there[0].request.prompt || t("no_prompt")}</h2>
      ${images.length > 1 && html`<a class="button" href=${onServer(`/compare?images=${images.map((/** @type {any} */ image) => image.id).join(",")}`)}>${t("compare")}</a>`}
    </div>
    <div class="sheet">
      ${there.map((/** @type {any} */ job) => [...Array(job.request.count).keys()].map((place) => html`<${Cell} key=${`${job.id}${place}`} job=${job} image=${(sheet[job.id] ?? []).find((/** @type {any} */ one) => one.place === place)} />`))}
    </div>
  </section>`;
}

/** @param {{job: any, image: any}} props */
function Cell({ job, image }) {
  const words = { queued: t("waiting"), running: t("running"), failed: job.reason, cancelled: t("cancelled"), done: t("removed") };
  return html`<figure>
    ${image
      ? html`<${Thumbnail} image=${image} onOpen=${() => go(`/gallery/${image.id}`)} />`
      : html`<div class="no-image" data-state=${job.state}>${words[/** @type {keyof typeof words} */ (job.state)]}</div>`}
    <figcaption>${job.model}${image ? html` <small>${image.seed}</small>` : ""}</figcaption>
  </figure>`;
}

/** The images of this tab's earlier requests. */
function Earlier() {
  const earlier = useStore((state) => state.earlier);
  const asked = useStore((state) => state.asked);
  const sheet = useStore((state) => state.sheet);
  const images = earlier.filter((/** @type {string} */ id) => !asked.includes(id)).flatMap((/** @type {string} */ id) => sheet[id] ?? []);
  if (!images.length) return null;
  return html`<section aria-label=${t("earlier")}>
    <div class="row spread"><h2>${t("earlier")}</h2><a href=${onServer("/gallery")}>${t("all_images")}</a></div>
    <div class="earlier">${images.map((/** @type {any} */ image) => html`<${Thumbnail} key=${image.id} image=${image} onOpen=${() => go(`/gallery/${image.id}`)} />`)}</div>
  </section>`;
}

const EXAMPLES = ["red apple", "octopus", "blue butterfly", "castle", "pizza"];

/** What a new user reads first. */
function Welcome() {
  const models = useStore((state) => state.models);
  const starters = models.some((/** @type {any} */ one) => one.origin === "starter");
  return html`<section class="card welcome">
    <h2>${t("welcome")}</h2>
    <p>${models.length ? t("welcome_models") : t("welcome_no_models")}</p>
    ${starters && html`<div class="chips" role="group" aria-label=${t("examples")}>${EXAMPLES.map((prompt) => html`<button type="button" onClick=${() => setForm({ prompt })}>${prompt}</button>`)}</div>`}
    <p class="note">${t("welcome_keys")}</p>
    <p><a class="button" href=${onServer("/models")}>${t("get_models")}</a> <${HelpLink} page="tutorial" label=${t("tutorial")} /></p>
  </section>`;
}
