// @ts-check
/** The page: navigation, the view that the address names, messages, and keys that count everywhere. */

import { cancel, ownUnended, report, start } from "./actions.js";
import { emptyCanvas } from "./canvas/document.js";
import { html, render, useEffect, useState } from "./lib/htm-preact.js";
import { HelpLink, IconButton, pictureFrom, Toasts } from "./parts/elements.js";
import { readPicture } from "./parts/form.js";
import { LogIn } from "./parts/people.js";
import { go, startRouter } from "./router.js";
import { change, useStore } from "./store.js";
import { languageNow, t } from "./strings.js";
import { applyTheme, setTheme } from "./theme.js";
import { Compare } from "./views/compare.js";
import { Create } from "./views/create.js";
import { Gallery } from "./views/gallery.js";
import { Models } from "./views/models.js";
import { SettingsView } from "./views/settings.js";
import { CanvasView } from "./views/canvas.js";
import { onServer } from "./paths.js";

/** @type {Record<string, any>} */
const VIEWS = { create: Create, canvas: CanvasView, gallery: Gallery, compare: Compare, models: Models, settings: SettingsView };

function App() {
  const ready = useStore((state) => state.ready);
  const route = useStore((state) => state.route);
  const outside = useStore((state) => state.me?.people && !state.me.name);
  useStore((state) => state.language);
  const [failed, setFailed] = useState("");
  useEffect(() => {
    const begin = () =>
      start().then(
        () => setFailed(""),
        (error) => {
          setFailed(String(error.message ?? error));
          setTimeout(begin, 3000);
        },
      );
    begin();
  }, []);
  const View = VIEWS[route.view] ?? Lost;
  return html`
    <a class="skip" href="#main">${t("to_content")}</a>
    <${Top} view=${route.view} />
    <main id="main" tabindex="-1" onDragOver=${(/** @type {any} */ event) => event.preventDefault()} onDrop=${dropped}>
      ${outside ? html`<${LogIn} />` : ready ? html`<${View} />` : html`<p class="empty" role="status">${failed ? t("cannot_start", { why: failed }) : t("loading")}</p>`}
    </main>
    <${Toasts} inDialog=${false} />
    <${Said} />
  `;
}

let draggedInside = false;
addEventListener("dragstart", () => (draggedInside = true));
addEventListener("dragend", () => (draggedInside = false));

/** A picture that is dropped anywhere fills the form with its settings. @param {any} event */
function dropped(event) {
  event.preventDefault();
  // What is dragged within the page has its own places; a slip of the hand must not change the form.
  if (draggedInside) return;
  pictureFrom(event.dataTransfer).then((picture) => picture && readPicture(picture).then(() => go("/"))).catch(report);
}

/** @param {{view: string}} props */
function Top({ view }) {
  const online = useStore((state) => state.online);
  const outside = useStore((state) => state.me?.people && !state.me.name);
  const health = useStore((state) => state.health);
  const busy = useStore((state) => state.queue.running.length > 0);
  const device = health?.run ? `${health.run.device}, ${health.run.dtype}` : t("worker_starting");
  const trouble = health?.status === "waiting" ? health.problem : "";
  const name = useStore((state) => state.me?.name);
  const toggle = () => {
    const dark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
    setTheme(dark ? "light" : "dark");
    change({ theme: dark ? "light" : "dark" });
  };
  return html`<header class="top">
    <a class="brand" href=${onServer("/")} aria-label="Safelight"><span class="lamp" data-busy=${busy ? "" : undefined} /> <span class="brand-name">Safelight</span></a>
    <nav aria-label=${t("views")}>
      ${outside ? null : Object.keys(VIEWS).map((name) => html`<a href=${onServer(name === "create" ? "/" : `/${name}`)} aria-current=${view === name ? "page" : undefined}>${t(`view_${name}`)}</a>`)}
    </nav>
    <span class="status note">${outside ? "" : device}</span>
    ${name && html`<a class="who" href=${onServer("/settings")} title=${t("account")}>${name}</a>`}
    <${HelpLink} page="index" label=${t("documentation")} />
    <${IconButton} icon="contrast" label=${t("light_or_dark")} onClick=${toggle} />
    ${!online && html`<p class="banner" role="alert">${t("offline")}</p>`}
    ${trouble && html`<p class="banner" role="alert">${t("queue_waits", { why: trouble })}</p>`}
  </header>`;
}

function Lost() {
  return html`<p class="empty">${t("no_view")} <a href=${onServer("/")}>${t("view_create")}</a></p>`;
}

/** What screen readers say. */
function Said() {
  const said = useStore((state) => state.said);
  return html`<p class="hidden" role="status" aria-live="polite">${said}</p>`;
}

change({
  online: true,
  ready: false,
  asked: [],
  jobs: {},
  sheet: {},
  details: {},
  ids: [],
  downloads: [],
  toasts: [],
  boards: [],
  presets: {},
  models: [],
  adapters: [],
  queue: { running: [], waiting: [], others_running: 0, others_waiting: 0 },
  me: null,
  progress: {},
  memory: null,
  memoryHistory: [],
  doctor: null,
  compacting: null,
  documentation: false,
  dialogs: 0,
  grid: null,
  slots: [],
  earlier: [],
  compared: "",
  switchHistory: [],
  galleryVersion: 0,
  filter: { search: "", model: "", lora: "", tag: "", board: "", program: "", starred: false, trashed: false, seed: "", from: "", to: "", person: "" },
  problem: null,
  said: "",
  canvas: emptyCanvas(),
});
document.documentElement.lang = languageNow();
applyTheme();
startRouter();

addEventListener("keydown", (event) => {
  // Escape cancels what this tab has asked for, unless it closes something.
  const closes = event.isComposing || document.querySelector("dialog[open]");
  if (event.key === "Escape" && !closes) for (const id of ownUnended()) cancel(id);
});
addEventListener("unhandledrejection", (event) => report(event.reason));

const place = document.getElementById("app");
if (place) render(html`<${App} />`, place);
