// @ts-check
/** Images beside one another: two with a slider, in turns, or by their difference; and a grid along any two fields. */

import * as api from "../api.js";
import { attempt, makeGrid } from "../actions.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib/htm-preact.js";
import { SelectField, TextField } from "../parts/elements.js";
import { Thumbnail } from "../parts/image.js";
import { go } from "../router.js";
import { change, useStore } from "../store.js";
import { t } from "../strings.js";
import { onServer } from "../paths.js";

const FLICKER_MS = 600;

export function Compare() {
  const asked = useStore((state) => state.route.query.images);
  const compared = useStore((state) => state.compared);
  useEffect(() => {
    if (asked) change({ compared: asked });
  }, [asked]);
  const query = { images: asked ?? compared };
  const ids = useMemo(() => (query.images ?? "").split(",").filter((/** @type {string} */ id) => /^[0-9a-f]{32}$/.test(id)), [query.images]);
  const [images, setImages] = useState(/** @type {any[]} */ ([]));
  const [pair, setPair] = useState([0, 1]);
  const [next, setNext] = useState(0);
  useEffect(() => {
    if (ids.length) attempt(() => api.post("/images/details", { ids })).then((found) => found && setImages(found));
    else setImages([]);
  }, [ids]);
  /** @param {number} at */
  const choose = (at) => {
    setPair(next === 0 ? [at, pair[1]] : [pair[0], at]);
    setNext(1 - next);
  };
  const [first, second] = pair.map((at) => images[at]);
  return html`<div class="compare">
    ${images.length > 1 && first && second ? html`<${Pair} first=${first} second=${second} />` : html`<p class="empty">${t("compare_empty")}</p>`}
    <div class="sheet">
      ${images.map((image, at) => html`<figure key=${image.id} data-pair=${pair.includes(at) ? "" : undefined}>
        <${Thumbnail} image=${image} selected=${pair.includes(at)} onOpen=${() => choose(at)} />
        <figcaption>${image.model} <small>${image.seed}</small> <a href=${onServer(`/gallery/${image.id}`)}>${t("open")}</a></figcaption></figure>`)}
    </div>
    <${Grid} />
  </div>`;
}

/** Two images in one place. @param {{first: any, second: any}} props */
function Pair({ first, second }) {
  const [way, setWay] = useState("slider");
  const [share, setShare] = useState(50);
  const [shown, setShown] = useState(false);
  const [difference, setDifference] = useState(/** @type {any} */ (null));
  const canvas = useRef(/** @type {any} */ (null));
  useEffect(() => {
    if (way !== "flicker" || matchMedia("(prefers-reduced-motion: reduce)").matches) return undefined;
    const timer = setInterval(() => setShown((now) => !now), FLICKER_MS);
    return () => clearInterval(timer);
  }, [way]);
  useEffect(() => {
    if (way !== "difference") return;
    setDifference(null);
    subtract(onServer(first.url), onServer(second.url), canvas.current).then(setDifference, () => setDifference({ problem: t("cannot_compare") }));
  }, [way, first.id, second.id]);
  /** The line between the images is where the pointer is. @param {any} event */
  const follow = (event) => {
    if (way !== "slider") return;
    const box = event.currentTarget.getBoundingClientRect();
    event.currentTarget.setPointerCapture(event.pointerId);
    setShare(Math.min(100, Math.max(0, ((event.clientX - box.left) / box.width) * 100)));
  };
  const same = first.pixels_sha256 && first.pixels_sha256 === second.pixels_sha256;
  return html`<section class="card pair" aria-label=${t("compare")}>
    <div class="row" role="group" aria-label=${t("way_of_comparing")}>
      ${["slider", "flicker", "difference"].map((one) => html`<button type="button" aria-pressed=${way === one} onClick=${() => setWay(one)}>${t(`compare_${one}`)}</button>`)}
      <span class="note" role="status">${same ? t("pixels_equal") : difference?.text ?? ""}${difference?.problem ?? ""}</span>
    </div>
    <div class="pair-stage" onPointerDown=${follow} onPointerMove=${(/** @type {any} */ event) => event.buttons && follow(event)} style=${{ aspectRatio: `${first.width} / ${first.height}` }}>
      ${way === "difference"
        ? html`<canvas ref=${canvas} aria-label=${t("compare_difference")} />`
        : html`<img src=${onServer(first.url)} alt=${first.model} draggable=${false} />
            <img src=${onServer(second.url)} alt=${second.model} draggable=${false} style=${{ clipPath: way === "slider" ? `inset(0 0 0 ${share}%)` : "none", visibility: way === "flicker" && !shown ? "hidden" : "visible" }} />`}
    </div>
    ${way === "slider" && html`<input type="range" min="0" max="100" value=${share} aria-label=${t("compare_slider")} onInput=${(/** @type {any} */ event) => setShare(Number(event.currentTarget.value))} />`}
    ${way === "flicker" && html`<button type="button" onClick=${() => setShown(!shown)}>${t("other_image")}</button>`}
    <p class="note">${first.model}, ${first.seed} · ${second.model}, ${second.seed}</p>
  </section>`;
}

/** Draw the difference of two images, eight times as strong. @param {string} one @param {string} other @param {HTMLCanvasElement} canvas */
async function subtract(one, other, canvas) {
  const [a, b] = await Promise.all([one, other].map(async (url) => createImageBitmap(await (await fetch(url)).blob())));
  const [width, height] = [a.width, a.height];
  if (b.width !== width || b.height !== height) return { problem: t("sizes_differ") };
  const pixels = [a, b].map((bitmap) => {
    const drawn = new OffscreenCanvas(width, height).getContext("2d");
    drawn?.drawImage(bitmap, 0, 0);
    return /** @type {ImageData} */ (drawn?.getImageData(0, 0, width, height)).data;
  });
  const out = new ImageData(width, height);
  let different = 0;
  let most = 0;
  for (let at = 0; at < out.data.length; at += 4) {
    let here = 0;
    for (let channel = 0; channel < 3; channel++) {
      const by = Math.abs(pixels[0][at + channel] - pixels[1][at + channel]);
      here = Math.max(here, by);
      out.data[at + channel] = Math.min(255, by * 8);
    }
    out.data[at + 3] = 255;
    different += here > 0 ? 1 : 0;
    most = Math.max(most, here);
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d")?.putImageData(out, 0, 0);
  const share = ((different / (width * height)) * 100).toFixed(1);
  return { text: different ? t("difference_is", { share, most }) : t("pixels_equal") };
}

/** The form's request, varied along two fields: a table that fills while it is drawn. */
function Grid() {
  const models = useStore((state) => state.models);
  const jobs = useStore((state) => state.jobs);
  const sheet = useStore((state) => state.sheet);
  const form = useStore((state) => state.form);
  const grid = useStore((state) => state.grid);
  const [names, setNames] = useState(/** @type {string[]} */ ([]));
  const [x, setX] = useState("seed");
  const [y, setY] = useState("model");
  const [xValues, setXValues] = useState("1..3");
  const [yValues, setYValues] = useState(() => form.models.join(","));
  useEffect(() => {
    attempt(() => api.get("/grid/fields")).then((found) => found && setNames(found));
  }, []);
  const options = names.map((one) => [one, one]);
  /** What a field starts with. @param {string} name */
  const suggested = (name) => (name === "model" ? models.slice(0, 3).map((/** @type {any} */ one) => one.name).join(",") : (SUGGESTED[name] ?? ""));
  const start = () => makeGrid(`${x}=${xValues}`, y ? `${y}=${yValues}` : "");
  return html`<section class="card">
    <h2>${t("grid")}</h2>
    <p class="note">${t("grid_note", { prompt: form.prompt || t("no_prompt") })}</p>
    <div class="row"><${SelectField} label=${t("grid_columns")} value=${x} options=${options} onChange=${(/** @type {string} */ name) => (setX(name), setXValues(suggested(name)))} />
      <${TextField} label=${t("grid_values")} value=${xValues} placeholder="1..4" onChange=${setXValues} /></div>
    <div class="row"><${SelectField} label=${t("grid_rows")} value=${y} options=${[["", t("none")], ...options]} onChange=${(/** @type {string} */ name) => (setY(name), setYValues(suggested(name)))} />
      ${y && html`<${TextField} label=${t("grid_row_values")} value=${yValues} placeholder="1..4" onChange=${setYValues} />`}</div>
    <div class="row"><button type="button" class="primary" onClick=${start} disabled=${!xValues.trim() || (y && !yValues.trim())}>${t("make")}</button></div>
    ${grid && html`<div class="table-scroll"><table class="grid-table">
      <thead><tr><td>${grid.y}</td>${grid.columns.map((/** @type {string} */ value) => html`<th scope="col">${grid.x} ${value}</th>`)}</tr></thead>
      <tbody>${(grid.rows.length ? grid.rows : [""]).map((/** @type {string} */ value, /** @type {number} */ row) => html`<tr key=${row}><th scope="row">${value}</th>${grid.columns.map((/** @type {string} */ _, /** @type {number} */ column) => {
        const cell = grid.cells.find((/** @type {any} */ one) => one.row === row && one.column === column);
        const job = jobs[cell.job];
        const image = (sheet[cell.job] ?? [])[0];
        return html`<td>${image ? html`<${Thumbnail} image=${image} onOpen=${() => go(`/gallery/${image.id}`)} />` : html`<div class="no-image">${job?.state === "failed" ? job.reason : t(job?.state === "running" ? "running" : "waiting")}</div>`}</td>`;
      })}</tr>`)}</tbody>
    </table></div>`}
  </section>`;
}

/** Values to begin with. @type {Record<string, string>} */
const SUGGESTED = { seed: "1..3", steps: "10,20,30", cfg: "3,5,7", sampler: "euler,dpmpp_2m", schedule: "default,karras", guidance: "2.5,3.5", shift: "1,3", strength: "0.4,0.6,0.8", "clip-skip": "1,2", "lora-strength": "0.5,1" };
