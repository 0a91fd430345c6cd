// @ts-check
/** All images: search, boards, stars, tags, the trash, and what can be done with many at once. */

import * as api from "../api.js";
import { attempt, changeImages, check, report, toast, trash } from "../actions.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../lib/htm-preact.js";
import { Dialog, Icon, IconButton, Menu, SelectField, TextField } from "../parts/elements.js";
import { BoardName, Boards } from "../parts/boards.js";
import { Thumbnail } from "../parts/image.js";
import { go } from "../router.js";
import { change, useStore } from "../store.js";
import { t } from "../strings.js";
import { ImageView } from "./image.js";
import { onServer } from "../paths.js";

const GAP = 10;
const SIDE = 180;
const ROWS_MORE = 3;
const SCROLL_STEP = 100;
const MOST_CELLS = 2000;
/** Pixels a millisecond from which scrolling is fast. */
const FAST = 4;
const CALM_MS = 120;
const SEARCH_AFTER = 250;
const DETAILS_AT_ONCE = 400;

/** @param {any} filter @returns {Record<string, any>} the query of a filter */
function query(filter) {
  const day = (/** @type {string} */ text, /** @type {number} */ more) => (text ? new Date(`${text}T00:00`).getTime() / 1000 + more : null);
  const { from, to, ...rest } = filter;
  return { ...rest, starred: filter.starred || null, trashed: filter.trashed || null, after: day(from, 0), before: day(to, 86_400) };
}

export function Gallery() {
  const item = useStore((state) => state.route.item);
  const filter = useStore((state) => state.filter);
  const version = useStore((state) => state.galleryVersion);
  const ids = useStore((state) => state.ids);
  const [selected, setSelected] = useState(/** @type {Set<string>} */ (new Set()));
  const [last, setLast] = useState("");

  useEffect(() => {
    let late = false;
    const timer = setTimeout(() => {
      api.get("/images/ids", query(filter)).then((found) => late || change({ ids: found.ids }), report);
    }, SEARCH_AFTER);
    return () => {
      late = true;
      clearTimeout(timer);
    };
  }, [filter, version]);

  // What was selected under another filter is not selected any more.
  useEffect(() => setSelected(new Set()), [filter]);
  useEffect(() => {
    const there = new Set(ids);
    setSelected((before) => new Set([...before].filter((id) => there.has(id))));
  }, [ids]);

  /** @param {number} at @param {any} event */
  const choose = (at, event) => {
    const next = new Set(selected);
    const from = ids.indexOf(last);
    const range = event.shiftKey && from >= 0 ? ids.slice(Math.min(from, at), Math.max(from, at) + 1) : [ids[at]];
    const add = !selected.has(ids[at]) || range.length > 1;
    for (const id of range) add ? next.add(id) : next.delete(id);
    setSelected(next);
    setLast(ids[at]);
  };

  return html`<div class="gallery">
    <${Filters} count=${ids.length} />
    ${selected.size > 0 && html`<${Bulk} ids=${[...selected]} onClear=${() => setSelected(new Set())} />`}
    <${Grid} ids=${ids} selected=${selected} onSelect=${choose} onAll=${() => setSelected(new Set(ids))} />
    ${item && html`<${ImageView} id=${item} ids=${ids} onClose=${() => go("/gallery")} />`}
  </div>`;
}

/** @param {{count: number}} props */
function Filters({ count }) {
  const filter = useStore((state) => state.filter);
  const boards = useStore((state) => state.boards);
  const version = useStore((state) => state.galleryVersion);
  const [facets, setFacets] = useState({ models: {}, loras: {}, tags: {}, programs: {} });
  const [naming, setNaming] = useState(false);
  const me = useStore((state) => state.me);
  const [people, setPeople] = useState(/** @type {string[]} */ ([]));
  useEffect(() => {
    if (me?.people && me.role === "admin") api.get("/people").then((all) => setPeople(all.map((/** @type {any} */ one) => one.name)), report);
  }, [me]);
  useEffect(() => {
    api.get("/images/facets").then(setFacets, () => undefined);
  }, [version]);
  /** @param {any} values */
  const set = (values) => change({ filter: { ...filter, ...values } });
  /** @param {Record<string, number>} counts @returns {[string, string][]} */
  const options = (counts) => [["", t("all")], ...Object.entries(counts).map(([name, n]) => /** @type {[string, string]} */ ([name, `${name} (${n})`]))];
  const board = boards.find((/** @type {any} */ one) => one.id === filter.board);
  return html`<div class="filters" role="search">
    <div class="row">
      <label class="search"><${Icon} name="search" /><input type="search" aria-label=${t("search_images")} placeholder=${t("search_images")} value=${filter.search} onInput=${(/** @type {any} */ event) => set({ search: event.currentTarget.value })} /></label>
      <button type="button" aria-pressed=${filter.starred} onClick=${() => set({ starred: !filter.starred })}><${Icon} name="star" filled=${filter.starred} /> ${t("starred")}</button>
      <button type="button" aria-pressed=${filter.trashed} onClick=${() => set({ trashed: !filter.trashed })}><${Icon} name="trash" /> ${t("trash")}</button>
      <span class="note" role="status">${t("images_count", { count })}</span>
    </div>
    ${me?.people && html`<div class="row"><${SelectField} label=${t("whose")} value=${filter.person} options=${[[me.name, t("whose_mine")], ["", t("whose_all")], ...people.filter((name) => name !== me.name).map((name) => [name, name])]} onChange=${(/** @type {string} */ person) => set({ person })} /></div>`}
    <div class="row boards">
      <button type="button" aria-pressed=${!filter.board} onClick=${() => set({ board: "" })}>${t("all_boards")}</button>
      ${boards.map((/** @type {any} */ one) => html`<button type="button" key=${one.id} aria-pressed=${filter.board === one.id} onClick=${() => set({ board: one.id, ...(one.person !== me?.name ? { person: "" } : {}) })}
        onDragOver=${(/** @type {any} */ event) => event.preventDefault()}
        onDrop=${(/** @type {any} */ event) => dropOnBoard(event, one.id)}>${one.name} <small>${one.images}${one.shared ? ` · ${one.person === me?.name ? t("shared_board") : t("shared_by", { name: one.person })}` : ""}</small></button>`)}
      <button type="button" aria-pressed=${filter.board === "none"} onClick=${() => set({ board: "none" })}>${t("no_board")}</button>
      <${IconButton} icon="plus" label=${t("new_board")} onClick=${() => setNaming(true)} />
      ${board && (board.person === me?.name || me?.role === "admin") && html`<${BoardMenu} board=${board} />`}
    </div>
    <details class="more-filters"><summary>${t("more_filters")}</summary><div class="row">
      <${SelectField} label=${t("model")} value=${filter.model} options=${options(facets.models)} onChange=${(/** @type {string} */ model) => set({ model })} />
      <${SelectField} label="LoRA" value=${filter.lora} options=${options(facets.loras)} onChange=${(/** @type {string} */ lora) => set({ lora })} />
      <${SelectField} label=${t("tag")} value=${filter.tag} options=${options(facets.tags)} onChange=${(/** @type {string} */ tag) => set({ tag })} />
      <${SelectField} label=${t("program")} value=${filter.program} options=${options(facets.programs)} onChange=${(/** @type {string} */ program) => set({ program })} />
      <${TextField} label=${t("field_seed")} type="number" value=${filter.seed} onChange=${(/** @type {string} */ seed) => set({ seed })} />
      <${TextField} label=${t("from_day")} type="date" value=${filter.from} onChange=${(/** @type {string} */ from) => set({ from })} />
      <${TextField} label=${t("to_day")} type="date" value=${filter.to} onChange=${(/** @type {string} */ to) => set({ to })} />
    </div></details>
    ${naming && html`<${BoardName} onClose=${() => setNaming(false)} onName=${async (/** @type {string} */ name) => {
      await attempt(() => api.post("/boards", { name }));
    }} />`}
  </div>`;
}

/** @param {any} event @param {string} board */
function dropOnBoard(event, board) {
  const address = event.dataTransfer.getData("text/uri-list");
  const id = address.match(/images\/([0-9a-f]{32})\/file/)?.[1];
  if (!id) return;
  event.preventDefault();
  changeImages([id], { board });
}

/** @param {{board: any}} props */
function BoardMenu({ board }) {
  const people = useStore((state) => state.me?.people);
  const [naming, setNaming] = useState(false);
  return html`<${Menu} label=${board.name}>
      <button type="button" onClick=${() => setNaming(true)}>${t("rename")}</button>
      ${people && html`<button type="button" onClick=${() => attempt(() => api.patch(`/boards/${board.id}`, { shared: !board.shared }))}>${board.shared ? t("unshare_board") : t("share_board")}</button>`}
      <button type="button" onClick=${() => attempt(() => api.remove(`/boards/${board.id}`)).then(() => change((state) => ({ filter: { ...state.filter, board: "" } })))}>${t("delete_board")}</button>
    <//>
    ${naming && html`<${BoardName} name=${board.name} onClose=${() => setNaming(false)} onName=${(/** @type {string} */ name) => attempt(() => api.patch(`/boards/${board.id}`, { name }))} />`}`;
}

/** What can be done with the selected images. @param {{ids: string[], onClear: () => void}} props */
function Bulk({ ids, onClear }) {
  const trashed = useStore((state) => state.filter.trashed);
  const [tagging, setTagging] = useState(false);
  const [tag, setTag] = useState("");
  const [deleting, setDeleting] = useState(false);
  const [checked, setChecked] = useState(-1);
  /** Make each image again in a fresh process, one after the other. */
  const checkAll = async () => {
    const answers = [];
    for (const id of ids) {
      setChecked(answers.length);
      const answer = await check(id);
      if (!answer) break;
      answers.push(answer.same);
    }
    setChecked(-1);
    const wrong = answers.filter((same) => !same).length;
    if (answers.length) toast(wrong ? t("checked_wrong", { wrong, count: answers.length }) : t("checked_right", { count: answers.length }), wrong ? "bad" : "plain");
  };
  /** @param {any} event */
  const addTag = (event) => {
    event.preventDefault();
    changeImages(ids, { add_tags: tag.split(",").map((one) => one.trim()).filter(Boolean) });
    setTagging(false);
  };
  return html`<div class="bulk row" role="toolbar" aria-label=${t("selected_images")}>
    <strong>${t("selected_count", { count: ids.length })}</strong>
    ${trashed
      ? html`<button type="button" onClick=${() => changeImages(ids, { trashed: false })}>${t("restore")}</button>
          <button type="button" onClick=${() => setDeleting(true)}>${t("delete_forever")}</button>`
      : html`<button type="button" onClick=${() => changeImages(ids, { starred: true })}>${t("star")}</button>
          <button type="button" onClick=${() => changeImages(ids, { starred: false })}>${t("unstar")}</button>
          <${Menu} label=${t("to_board")}>
            <${Boards} ids=${ids} />
          <//>
          <button type="button" onClick=${() => setTagging(true)}>${t("add_tag")}</button>
          <button type="button" onClick=${() => attempt(() => api.download("/images/export", { ids }, "safelight-images.zip"))}>${t("export")}</button>
          ${ids.length > 1 && ids.length <= 100 && html`<a class="button" href=${onServer(`/compare?images=${ids.join(",")}`)}>${t("compare")}</a>`}
          <button type="button" disabled=${checked >= 0} onClick=${checkAll}>${checked >= 0 ? t("checking_count", { done: checked, count: ids.length }) : t("same_ask")}</button>
          <button type="button" onClick=${() => trash(ids)}>${t("remove")}</button>`}
    <button type="button" class="quiet" onClick=${onClear}>${t("clear_selection")}</button>
    ${tagging && html`<${Dialog} label=${t("add_tag")} onClose=${() => setTagging(false)}><form onSubmit=${addTag}>
      <${TextField} label=${t("tags_with_commas")} value=${tag} onChange=${setTag} /><button class="primary" disabled=${!tag.trim()}>${t("save")}</button></form><//>`}
    ${deleting && html`<${Dialog} label=${t("delete_forever")} onClose=${() => setDeleting(false)}>
      <p>${t("delete_forever_ask", { count: ids.length })}</p>
      <button type="button" class="primary" onClick=${() => (attempt(() => api.post("/images/delete", { ids })), setDeleting(false), onClear())}>${t("delete_forever")}</button><//>`}
  </div>`;
}

/** The grid. Only the rows that can be seen have elements. @param {{ids: string[], selected: Set<string>, onSelect: (at: number, event: any) => void, onAll: () => void}} props */
function Grid({ ids, selected, onSelect, onAll }) {
  const details = useStore((state) => state.details);
  const place = useRef(/** @type {any} */ (null));
  const [view, setView] = useState({ top: 0, height: 800, width: 1000 });
  // While the images fly past, none is loaded: the browser keeps its time for scrolling.
  const [fast, setFast] = useState(false);
  const asked = useRef(/** @type {Set<string>} */ (new Set()));

  useLayoutEffect(() => {
    const last = { top: 0, at: 0 };
    let calm = 0;
    const measure = () => {
      if (!place.current) return;
      const box = place.current.getBoundingClientRect();
      // Rows are drawn beyond the edges, so not every pixel of scrolling draws again.
      const top = Math.floor(Math.max(0, -box.top) / SCROLL_STEP) * SCROLL_STEP;
      const now = performance.now();
      const speed = Math.abs(-box.top - last.top) / Math.max(1, now - last.at);
      Object.assign(last, { top: -box.top, at: now });
      if (speed > FAST) {
        setFast(true);
        clearTimeout(calm);
        calm = setTimeout(() => setFast(false), CALM_MS);
      }
      setView((before) => (before.top === top && before.height === innerHeight && before.width === box.width ? before : { top, height: innerHeight, width: box.width }));
    };
    measure();
    let waiting = false;
    const scrolled = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => ((waiting = false), measure()));
    };
    addEventListener("scroll", scrolled, { passive: true });
    const observer = new ResizeObserver(measure);
    observer.observe(place.current);
    return () => (removeEventListener("scroll", scrolled), observer.disconnect());
  }, []);

  const columns = Math.max(2, Math.floor((view.width + GAP) / (SIDE + GAP)));
  const side = (view.width - GAP * (columns - 1)) / columns;
  const rows = Math.ceil(ids.length / columns);
  const from = Math.max(0, Math.floor(view.top / (side + GAP)) - ROWS_MORE);
  const to = Math.min(rows, Math.ceil((view.top + view.height) / (side + GAP)) + ROWS_MORE);
  const shown = ids.slice(from * columns, to * columns);

  useEffect(() => {
    if (fast) return;
    const missing = shown.filter((id) => !details[id] && !asked.current.has(id)).slice(0, DETAILS_AT_ONCE);
    if (!missing.length) return;
    for (const id of missing) asked.current.add(id);
    const end = () => missing.forEach((id) => asked.current.delete(id));
    api.post("/images/details", { ids: missing }).then((found) => {
      change((state) => ({ details: { ...state.details, ...Object.fromEntries(found.map((/** @type {any} */ one) => [one.id, one])) } }));
      end();
    }, (error) => (end(), report(error)));
  }, [shown.join(), details, fast]);

  /** @param {any} event */
  const pressed = (event) => {
    if (event.key === "a" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      onAll();
      return;
    }
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[/** @type {string} */ (event.key)];
    const cell = event.target.closest("[data-at]");
    if (!by || !cell) return;
    event.preventDefault();
    const next = Math.min(Math.max(Number(cell.dataset.at) + by, 0), ids.length - 1);
    place.current.querySelector(`[data-at="${next}"] .thumbnail`)?.focus();
  };

  const handlers = useRef({ onSelect });
  handlers.current = { onSelect };
  const cells = useRef(/** @type {Map<string, {key: string, image: any, node: any}>} */ (new Map()));
  /** The element of an image. It is the one of before if nothing of it has changed, so that nothing is compared. @param {string} id @param {number} at */
  const cell = (id, at) => {
    const before = cells.current.get(id);
    const image = fast && !before?.image ? undefined : details[id];
    const key = `${at} ${columns} ${side} ${selected.has(id)}`;
    if (before?.key === key && before.image === image) return before.node;
    const left = (at % columns) * (side + GAP);
    const top = Math.floor(at / columns) * (side + GAP);
    const select = (/** @type {any} */ event) => handlers.current.onSelect(at, event);
    const open = (/** @type {any} */ event) => (event?.ctrlKey || event?.metaKey || event?.shiftKey ? select(event) : go(`/gallery/${id}`));
    const node = html`<div key=${id} class="cell" data-at=${at} data-selected=${selected.has(id) ? "" : undefined} style=${{ transform: `translate(${left}px, ${top}px)`, width: `${side}px`, height: `${side}px` }}>
      ${image
        ? html`<${Thumbnail} image=${image} onOpen=${open} />
            <input type="checkbox" class="select" aria-label=${t("select_image", { number: at + 1 })} checked=${selected.has(id)} onClick=${select} />`
        : html`<button type="button" class="thumbnail" aria-label=${t("loading")} onClick=${open} />`}
    </div>`;
    if (cells.current.size > MOST_CELLS) cells.current.clear();
    cells.current.set(id, { key, image, node });
    return node;
  };

  if (!ids.length) return html`<div ref=${place}><p class="empty">${t("no_images")}</p></div>`;
  return html`<div class="grid" ref=${place} style=${{ height: `${rows * (side + GAP)}px` }} onKeyDown=${pressed}>
    ${shown.map((id, number) => cell(id, from * columns + number))}
  </div>`;
}
