// @ts-check
/** Small elements that all views use. */

import { html, useEffect, useRef, useState } from "../lib/htm-preact.js";
import { showField } from "../form.js";
import { change, removeToast, useStore } from "../store.js";
import { languageNow, t } from "../strings.js";
import { onServer } from "../paths.js";

const PATHS = {
  close: "M6 6l12 12M18 6L6 18",
  star: "M12 3l2.7 5.8 6.3.7-4.7 4.3 1.3 6.2L12 16.9 6.4 20l1.3-6.2L3 9.5l6.3-.7z",
  dice: "M5 5h14v14H5zM9 9h.01M15 15h.01M12 12h.01M9 15h.01M15 9h.01",
  lock: "M7 11V8a5 5 0 0110 0v3M5 11h14v9H5z",
  unlock: "M7 11V8a5 5 0 019.6-2M5 11h14v9H5z",
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  plus: "M12 5v14M5 12h14",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  swap: "M7 4L4 7l3 3M4 7h13M17 14l3 3-3 3M20 17H7",
  check: "M5 13l4 4L19 7",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  search: "M11 18a7 7 0 100-14 7 7 0 000 14zM16 16l4 4",
  contrast: "M12 3a9 9 0 100 18 9 9 0 000-18zM12 3v18",
};

/** @param {{name: keyof typeof PATHS, filled?: boolean}} props */
export function Icon({ name, filled }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" data-filled=${filled ? "" : undefined}>
    <path d=${PATHS[name]} />
  </svg>`;
}

/** The pages of the documentation that there are in Chinese, too. */
const TRANSLATED = ["index", "tutorial", "troubleshooting"];

/** A link into the documentation, if this server has it. @param {{page: string, label: string}} props */
export function HelpLink({ page, label }) {
  const there = useStore((state) => state.documentation);
  if (!there) return null;
  const folder = languageNow() === "zh" && TRANSLATED.includes(page) ? "zh/" : "";
  return html`<a class="help-link" href=${onServer(`/help/${folder}${page}.html`)} target="_blank" rel="noreferrer">${label}</a>`;
}

/** A button with an icon. @param {any} props `icon`, `label`, and what a button has */
export function IconButton({ icon, label, filled, ...rest }) {
  return html`<button type="button" class="icon-button" aria-label=${label} title=${label} ...${rest}>
    <${Icon} name=${icon} filled=${filled} />
  </button>`;
}

let ids = 0;
/** @returns {string} an identifier for an element and its label */
export function useId() {
  return useState(() => `id${++ids}`)[0];
}

/** A label with an element, and what is wrong with its value. @param {any} props */
export function Labelled({ label, help, field, children, id, note }) {
  const problem = useStore((state) => (state.problem?.field === field && field ? state.problem.message : ""));
  const [explained, setExplained] = useState(false);
  useEffect(() => (field ? showField(field) : undefined), [field]);
  useEffect(() => {
    const element = document.getElementById(id);
    element?.toggleAttribute("aria-invalid", Boolean(problem));
    if (problem) {
      element?.setAttribute("aria-invalid", "true");
      element?.scrollIntoView({ block: "center" });
    }
    if (problem || note) element?.setAttribute("aria-describedby", problem ? `${id}-problem` : `${id}-note`);
    else element?.removeAttribute("aria-describedby");
  }, [id, problem, note]);
  return html`<div class="field" data-wrong=${problem ? "" : undefined}>
    <div class="field-label"><label for=${id}>${label}</label>${help && html`<button type="button" class="help-button" aria-label=${t("help")} aria-expanded=${explained} aria-controls=${`${id}-help`} onClick=${() => setExplained(!explained)}>?</button>`}</div>
    ${explained && html`<p class="note" id=${`${id}-help`} role="status">${help}</p>`}
    ${children}
    ${note && html`<p class="note" id=${`${id}-note`}>${note}</p>`}
    ${problem && html`<p class="problem" id=${`${id}-problem`} role="alert">${problem}</p>`}
  </div>`;
}

/** A field for a number. `null` is shown as empty. @param {any} props */
export function NumberField({ label, value, onChange, help, field, min, max, step = "any", placeholder, note, disabled }) {
  const id = useId();
  // What is being typed stays as it is typed, whatever is drawn again meanwhile.
  const [typed, setTyped] = useState(/** @type {string | null} */ (null));
  /** @param {any} event */
  const read = (event) => {
    const text = event.currentTarget.value;
    setTyped(text);
    if (!event.currentTarget.validity.badInput) onChange(text === "" ? null : Number(text));
  };
  return html`<${Labelled} ...${{ label, help, field, id, note }}>
    <input id=${id} type="number" inputmode="decimal" value=${typed ?? value ?? ""} ...${{ min, max, step, placeholder, disabled }} onInput=${read} onBlur=${() => setTyped(null)} />
  <//>`;
}

/** A field for a number with a slider. @param {any} props */
export function SliderField({ label, value, onChange, help, field, min, max, step, note, disabled }) {
  const id = useId();
  return html`<${Labelled} ...${{ label, help, field, id, note }}>
    <div class="slider">
      <input id=${id} type="range" ...${{ min, max, step, disabled }} value=${value} onInput=${(/** @type {any} */ event) => onChange(Number(event.currentTarget.value))} />
      <input type="number" aria-label=${label} ...${{ min, max, step, disabled }} value=${value} onInput=${(/** @type {any} */ event) => event.currentTarget.value !== "" && onChange(Number(event.currentTarget.value))} />
    </div>
  <//>`;
}

/** A choice. `options`: [value, text] pairs. @param {any} props */
export function SelectField({ label, value, onChange, options, help, field, note, disabled, choose = false }) {
  const id = useId();
  const now = value ?? "";
  const known = options.some((/** @type {[string, string]} */ [one]) => one === now);
  // What is chosen stays visible, also if it cannot be chosen any more.
  const shown = known ? options : [...options, [now, t("not_available", { name: now })]];
  /** @param {any} event */
  const changed = (event) => {
    onChange(event.currentTarget.value);
    if (choose) event.currentTarget.value = "";
  };
  return html`<${Labelled} ...${{ label, help, field, id, note }}>
    <select id=${id} disabled=${disabled} onChange=${changed}>
      ${shown.map((/** @type {[string, string]} */ [one, text]) => html`<option key=${one} value=${one} selected=${one === now}>${text}</option>`)}
    </select>
  <//>`;
}

/** @param {any} props */
export function TextField({ label, value, onChange, help, field, placeholder, type = "text", note, readonly = false, autocomplete }) {
  const id = useId();
  return html`<${Labelled} ...${{ label, help, field, id, note }}>
    <input id=${id} type=${type} value=${value} placeholder=${placeholder} readonly=${readonly} autocomplete=${autocomplete} onInput=${(/** @type {any} */ event) => onChange(event.currentTarget.value)} />
  <//>`;
}

/** @param {any} props */
export function Switch({ label, value, onChange, help }) {
  const id = useId();
  return html`<div class="switch">
    <input id=${id} type="checkbox" checked=${value} onChange=${(/** @type {any} */ event) => onChange(event.currentTarget.checked)} />
    <label for=${id} title=${help}>${label}</label>
  </div>`;
}

/** A part that the user can open. It stays as it was left. @param {any} props */
export function Section({ name, title, children, open }) {
  const key = `safelight.open.${name}`;
  const [shown, setShown] = useState(() => (localStorage.getItem(key) ?? (open ? "1" : "0")) === "1");
  useEffect(() => {
    if (open) setShown(true);
  }, [open]);
  /** @param {any} event */
  const toggled = (event) => {
    setShown(event.currentTarget.open);
    localStorage.setItem(key, event.currentTarget.open ? "1" : "0");
  };
  return html`<details class="section" open=${shown} onToggle=${toggled}>
    <summary>${title}</summary>
    ${shown && html`<div class="section-body">${children}</div>`}
  </details>`;
}

/** Messages. While a dialog is open, they are in it, because nothing beside it can be clicked. @param {{inDialog: boolean}} props */
export function Toasts({ inDialog }) {
  const toasts = useStore((state) => state.toasts);
  const dialogs = useStore((state) => state.dialogs);
  if (inDialog !== dialogs > 0) return null;
  return html`<div class="toasts">
    ${toasts.map((/** @type {any} */ one) => html`<div key=${one.id} class="toast" data-kind=${one.kind} role=${one.kind === "bad" ? "alert" : "status"}>
      <span>${one.text}</span>
      ${one.action && html`<button type="button" onClick=${() => (one.action.run(), removeToast(one.id))}>${one.action.label}</button>`}
      <${IconButton} icon="close" label=${t("close")} onClick=${() => removeToast(one.id)} />
    </div>`)}
  </div>`;
}

/** A dialog over the page. Escape and a click beside it close it. @param {any} props */
export function Dialog({ label, onClose, children, className = "" }) {
  const place = useRef(/** @type {any} */ (null));
  useEffect(() => {
    const before = /** @type {HTMLElement | null} */ (document.activeElement);
    place.current.showModal();
    change((state) => ({ dialogs: state.dialogs + 1 }));
    return () => {
      change((state) => ({ dialogs: state.dialogs - 1 }));
      before?.focus?.();
    };
  }, []);
  /** @param {any} event */
  const clicked = (event) => event.target === place.current && onClose();
  /** @param {any} event */
  const cancelled = (event) => {
    event.preventDefault();
    onClose();
  };
  return html`<dialog ref=${place} class=${className} aria-label=${label} onClick=${clicked} onCancel=${cancelled}>
    <div class="dialog-body">
      <${IconButton} icon="close" label=${t("close")} onClick=${onClose} />
      ${children}
    </div>
    <${Toasts} inDialog=${true} />
  </dialog>`;
}

/**
 * The picture that was dropped, pasted or chosen: a file, or an image of the gallery.
 * @param {DataTransfer | {files: FileList}} from
 * @returns {Promise<Blob | null>}
 */
export async function pictureFrom(from) {
  const file = [...(from.files ?? [])].find((one) => one.type.startsWith("image/"));
  const address = "getData" in from ? from.getData("text/uri-list") : "";
  if (file || !address.startsWith(`${location.origin}${onServer("/api/")}`)) return file ?? null;
  return (await fetch(address)).blob();
}

/** A place to drop a picture, to paste it, or to choose a file. @param {any} props */
export function PictureDrop({ label, onPicture, children }) {
  const chooser = useRef(/** @type {any} */ (null));
  const [over, setOver] = useState(false);
  /** @param {DataTransfer | {files: FileList} | null | undefined} from */
  const take = async (from) => {
    const picture = from && (await pictureFrom(from));
    if (picture) onPicture(picture);
  };
  return html`<div
    class="drop"
    data-over=${over ? "" : undefined}
    onDragOver=${(/** @type {any} */ event) => (event.preventDefault(), setOver(true))}
    onDragLeave=${() => setOver(false)}
    onDrop=${(/** @type {any} */ event) => (event.preventDefault(), event.stopPropagation(), setOver(false), take(event.dataTransfer))}
    onPaste=${(/** @type {any} */ event) => take(event.clipboardData)}
  >
    ${children}
    <button type="button" onClick=${() => chooser.current.click()}>${label}</button>
    <input ref=${chooser} type="file" accept="image/*" hidden onChange=${(/** @type {any} */ event) => take({ files: event.currentTarget.files }).then(() => (chooser.current.value = ""))} />
  </div>`;
}

/** The menu of an element: buttons in a popover. @param {any} props */
export function Menu({ label, icon, children }) {
  const [open, setOpen] = useState(false);
  const place = useRef(/** @type {any} */ (null));
  useEffect(() => {
    if (!open) return undefined;
    /** @param {any} event */
    const away = (event) => {
      if (event.type === "keydown" ? event.key === "Escape" : !place.current?.contains(event.target)) setOpen(false);
    };
    document.addEventListener("pointerdown", away);
    document.addEventListener("keydown", away);
    return () => {
      document.removeEventListener("pointerdown", away);
      document.removeEventListener("keydown", away);
    };
  }, [open]);
  return html`<div class="menu" ref=${place}>
    <button type="button" aria-expanded=${open} aria-haspopup="true" onClick=${() => setOpen(!open)}>${icon && html`<${Icon} name=${icon} />`} ${label}</button>
    ${open && html`<div class="menu-body" onClick=${(/** @type {any} */ event) => event.target.closest("button") && setOpen(false)}>${children}</div>`}
  </div>`;
}
