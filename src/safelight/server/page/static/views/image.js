// @ts-check
/** One image in full: its settings, and what can be done with it. */

import * as api from "../api.js";
import { attempt, changeImages, check, report, toast, trash } from "../actions.js";
import { fillForm, setForm } from "../form.js";
import { html, useEffect, useState } from "../lib/htm-preact.js";
import { Boards } from "../parts/boards.js";
import { Dialog, Icon, IconButton, Menu } from "../parts/elements.js";
import { openOnCanvas } from "../canvas/document.js";
import { go } from "../router.js";
import { current, useStore } from "../store.js";
import { t, when } from "../strings.js";
import { onServer } from "../paths.js";

const SHOWN = ["model", "seed", "steps", "cfg", "guidance", "sampler", "schedule", "width", "height", "strength", "vae", "clip_skip"];

/** @param {{id: string, ids: string[], onClose: () => void}} props */
export function ImageView({ id, ids, onClose }) {
  const [image, setImage] = useState(/** @type {any} */ (null));
  const [made, setMade] = useState(/** @type {any} */ (null));
  const [checking, setChecking] = useState(false);
  const [zoomed, setZoomed] = useState(false);
  const version = useStore((state) => state.galleryVersion);
  const at = ids.indexOf(id);

  useEffect(() => {
    let here = true;
    setImage((/** @type {any} */ before) => (before?.id === id ? before : null));
    api.get(`/images/${id}`).then((found) => here && setImage(found), (error) => (report(error), onClose()));
    return () => void (here = false);
  }, [id, version]);
  useEffect(() => {
    let here = true;
    setMade(null);
    api.get(`/images/${id}/generation-data`).then((found) => here && setMade(found), () => undefined);
    return () => void (here = false);
  }, [id]);

  /** @param {number} by */
  const move = (by) => ids[at + by] && go(`/gallery/${ids[at + by]}`, { replace: true });

  useEffect(() => {
    /** @param {KeyboardEvent} event */
    const pressed = (event) => {
      const typing = /** @type {Element} */ (event.target).closest("input, textarea, select");
      if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "ArrowLeft") move(-1);
      else if (event.key === "ArrowRight") move(1);
      else if (event.key === "s" && image) changeImages([id], { starred: !image.starred });
      else if (event.key === "Delete") removeImage();
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [id, ids, image]);

  const removeImage = () => {
    const next = ids[at + 1] ?? ids[at - 1];
    trash([id]);
    if (next) go(`/gallery/${next}`, { replace: true });
    else onClose();
  };

  const verify = async () => {
    setChecking(true);
    const answer = await check(id);
    setChecking(false);
    if (answer) toast(answer.same ? t("same_yes") : t("same_no"), answer.same ? "plain" : "bad");
  };

  const useSettings = () => {
    const request = image.metadata?.request ?? made?.use.request;
    const missing = fillForm({ ...request, model: request.model ?? "" });
    const left = image.metadata?.request ? [] : (made?.use.not_carried_over ?? []);
    const said = [...left, ...missing.map((/** @type {string} */ name) => t("not_there", { name }))];
    toast([t("seed_is_locked"), ...said].join(" · "), "plain", { label: t("free_seed"), run: () => setForm({ seedLocked: false, seed: null }) });
    go("/");
  };

  const startFrom = async () => {
    const stored = await attempt(async () => api.storeInput(await (await fetch(onServer(image.url))).blob(), "image"));
    if (!stored) return;
    setForm({ image: stored.digest, mask: "" });
    go("/");
  };

  const asPreview = () =>
    attempt(() => api.put(`/models/${api.part(image.model)}/preview`, { image: id })).then((done) => done && toast(t("preview_set", { name: image.model })));

  // The dialog stays while the next image is loaded, so that keys and focus stay in it.
  if (!image) return html`<${Dialog} label=${t("loading")} onClose=${onClose} className="image-view"><p class="empty">${t("loading")}</p><//>`;
  const request = image.metadata?.request ?? made ?? {};
  const board = current().boards.find((/** @type {any} */ one) => one.id === image.board);
  const known = current().models.some((/** @type {any} */ model) => model.name === image.model);
  return html`<${Dialog} label=${t("image_by", { model: image.model || image.program, seed: image.seed ?? "?" })} onClose=${onClose} className="image-view">
    <div class="image-stage" data-zoomed=${zoomed ? "" : undefined}>
      <button type="button" class="image-button" aria-label=${zoomed ? t("fit") : t("full_size")} onClick=${() => setZoomed(!zoomed)}><img src=${onServer(image.url)} alt=${image.prompt} width=${image.width} height=${image.height} /></button>
      <${IconButton} icon="left" label=${t("previous")} disabled=${at <= 0} onClick=${() => move(-1)} />
      <${IconButton} icon="right" label=${t("next")} disabled=${at < 0 || at >= ids.length - 1} onClick=${() => move(1)} />
    </div>
    <div class="image-facts">
      <p class="image-prompt">${image.prompt || t("no_prompt")}</p>
      ${image.negative && html`<p class="note">${t("field_negative")}: ${image.negative}</p>`}
      <div class="row">
        <button type="button" class="primary" onClick=${useSettings} disabled=${!image.metadata?.request && !made}>${t("use_settings")}</button>
        <button type="button" onClick=${startFrom}>${t("start_from")}</button>
        <button type="button" onClick=${() => openOnCanvas(onServer(image.url)).then(() => go("/canvas"), report)}>${t("edit")}</button>
      </div>
      <div class="row">
        <button type="button" aria-pressed=${image.starred} onClick=${() => changeImages([id], { starred: !image.starred })}><${Icon} name="star" filled=${image.starred} /> ${t("star")}</button>
        <${Menu} label=${t("download")} icon="download">
          <a class="button" href=${onServer(image.url)} download=${image.file_name}>${t("as_stored")}</a>
          ${image.program === "Safelight" && ["png", "jpeg", "webp"].map((form) => html`<a class="button" href=${`${onServer(image.url)}?format=${form}&quality=95`} download=${`${id}.${form === "jpeg" ? "jpg" : form}`}>${form.toUpperCase()}</a>`)}
        <//>
        <${Menu} label=${t("to_board")}>
          <${Boards} ids=${[id]} />
        <//>
        ${image.trashed
          ? html`<button type="button" onClick=${() => changeImages([id], { trashed: false })}>${t("restore")}</button>`
          : html`<button type="button" onClick=${removeImage}><${Icon} name="trash" /> ${t("remove")}</button>`}
      </div>
      ${image.marks.length > 0 && html`<p class="problem">${t("suspicious")}: ${image.marks.join("; ")}</p>`}
      ${(image.metadata?.repairs ?? []).length > 0 && html`<p class="note">${t("repaired")}: ${image.metadata.repairs.map((/** @type {any} */ one) => `${one.wrong} (${one.helped})`).join("; ")}</p>`}
      ${image.program === "Safelight" && html`<p>
        <button type="button" onClick=${verify} disabled=${checking}>${checking ? t("checking") : t("same_ask")}</button>
        <span role="status" class=${image.same === false ? "problem" : "note"}> ${image.same === true ? t("same_yes") : image.same === false ? t("same_no") : ""}</span>
      </p>`}
      <dl class="facts">
        ${SHOWN.filter((name) => name !== "strength" || request.image).filter((name) => request[name] !== null && request[name] !== undefined && request[name] !== "").map((name) => html`<dt>${t(`field_${name}`)}</dt><dd>${String(name === "model" ? image.model : request[name])}</dd>`)}
        ${image.loras.length > 0 && html`<dt>${t("loras")}</dt><dd>${image.loras.join(", ")}</dd>`}
        <dt>${t("program")}</dt><dd>${image.program}</dd>
        ${board && html`<dt>${t("board")}</dt><dd>${board.name}</dd>`}
        <dt>${t("created")}</dt><dd>${when(image.created)}</dd>
        ${image.tags.length > 0 && html`<dt>${t("tag")}</dt><dd class="chips">${image.tags.map((/** @type {string} */ tag) => html`<button type="button" title=${t("remove_named", { name: tag })} onClick=${() => changeImages([id], { remove_tags: [tag] })}>${tag} ×</button>`)}</dd>`}
        ${image.pixels_sha256 && html`<dt>${t("pixels")}</dt><dd><code>${image.pixels_sha256.slice(0, 16)}</code></dd>`}
      </dl>
      ${known && html`<button type="button" class="quiet" onClick=${asPreview}>${t("as_preview", { name: image.model })}</button>`}
      <details><summary class="note">${t("all_metadata")}</summary><pre>${JSON.stringify(image.metadata, null, 1)}</pre></details>
    </div>
  <//>`;
}
