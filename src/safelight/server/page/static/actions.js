// @ts-check
/** What the page asks of the server, and how the state follows the server's events. */

import * as api from "./api.js";
import { isShown, requests, restoreForm, setForm, without } from "./form.js";
import { change, current, removeToast } from "./store.js";
import { t } from "./strings.js";
import { loadMe, may, mustLogIn } from "./me.js";
import { onServer } from "./paths.js";

const ASKED_KEY = "safelight.asked";
const PROMPTS_KEY = "safelight.prompts";
const MOST_ASKED = 200;
const LOADED_AT_ONCE = 20;
const MOST_PROMPTS = 200;
const WAITING_SHOWN = 100;
const HISTORY_SECONDS = 3600;
const PROBE_MS = 2000;
const MOST_DETAILS = 5000;
const MOST_EARLIER = 40;
const NARROW = 1100;
const CHANGED_AT_ONCE = 1000;
const DOCUMENTATION = "/help/index.html";

let stopListening = () => {};

/** Load everything that the page shows, then follow the events. Nothing, if somebody must log in first. */
export async function start() {
  stopListening();
  if (!(await loadMe())) return;
  /** @type {boolean | null} */
  let connected = null;
  await loadAll();
  stopListening = api.listen(
    {
      job: onJob,
      progress: (data) => change((state) => ({ progress: { ...state.progress, [data.job]: data } })),
      image: onImage,
      images: (data) => onImages(data.ids),
      boards: loadBoards,
      presets: loadPresets,
      models: loadModels,
      memory: (data) => rememberMemory(data),
      download: (data) => change((state) => ({ downloads: [data, ...state.downloads.filter((/** @type {any} */ one) => one.id !== data.id)] })),
      worker: loadHealth,
      doctor: loadDoctor,
      compacting: loadCompacting,
    },
    (online) => {
      change({ online });
      // What happened while there was no connection is not told again.
      if (online && !connected) (connected === null ? loadSheet() : loadAll()).catch(report);
      connected = online;
    },
  );
}

async function loadAll() {
  const first = !current().fields;
  const [fields, families, models, adapters, health, slots, queue, boards, presets, downloads] = await Promise.all([
    first ? api.get("/fields") : current().fields,
    first ? api.get("/families") : current().families,
    api.get("/models"),
    api.get("/adapters"),
    api.get("/health"),
    api.get("/slots"),
    api.get("/queue", { limit: WAITING_SHOWN }),
    api.get("/boards"),
    api.get("/presets"),
    may("member") ? api.get("/downloads") : [],
  ]);
  const defaultModel = (models.find((/** @type {any} */ one) => one.is_default) ?? models[0])?.name ?? "";
  change({ fields, families, models, adapters, health, slots, queue, boards, presets, downloads, defaultModel, online: true });
  if (first) {
    restoreForm();
    const { me } = current();
    if (me.people) change((state) => ({ filter: { ...state.filter, person: me.name } }));
    change({ asked: JSON.parse(localStorage.getItem(ASKED_KEY) ?? "[]") });
  }
  await loadSheet();
  if (health.worker === "starting") loadHealth().catch(report);
  if (first) fetch(onServer(DOCUMENTATION), { method: "HEAD" }).then((answer) => change({ documentation: answer.ok }), () => undefined);
  loadMemory().catch(() => undefined);
  change((state) => ({ galleryVersion: state.galleryVersion + 1, ready: true }));
}

export async function loadHealth() {
  const [health, slots] = await Promise.all([api.get("/health"), api.get("/slots")]);
  change({ health, slots });
  // No event tells that the worker is ready.
  if (health.worker === "starting") setTimeout(() => loadHealth().catch(report), PROBE_MS);
}

export async function loadModels() {
  const [models, adapters] = await Promise.all([api.get("/models"), api.get("/adapters")]);
  change({ models, adapters });
}

export async function loadBoards() {
  change({ boards: await api.get("/boards") });
}

export async function loadPresets() {
  change({ presets: await api.get("/presets") });
}

export async function loadDoctor() {
  if (!may("admin")) return;
  change({ doctor: await api.get("/doctor") });
}

async function loadCompacting() {
  if (!may("admin")) return;
  change({ compacting: await api.get("/compacting") });
}

export async function loadMemory() {
  rememberMemory(await api.get("/memory"));
}

/** @param {any} memory */
function rememberMemory(memory) {
  const now = Date.now() / 1000;
  const host = memory.places?.host;
  const point = host ? [{ at: now, stored: host.stored, budget: host.budget }] : [];
  change((state) => ({
    memory,
    memoryHistory: [...state.memoryHistory, ...point].filter((one) => one.at > now - HISTORY_SECONDS),
  }));
}

const loadQueue = once(async () => {
  change({ queue: await api.get("/queue", { limit: WAITING_SHOWN }) });
});

const loadBoardsSoon = once(loadBoards);

/**
 * Return a function that runs another at most every 150 ms, and once more after the last call.
 * @param {() => Promise<void>} run
 */
function once(run) {
  /** @type {ReturnType<typeof setTimeout> | null} */
  let timer = null;
  return () => {
    timer ??= setTimeout(() => {
      timer = null;
      run().catch(report);
    }, 150);
  };
}

/** @param {any} job */
function onJob(job) {
  const known = current().jobs[job.id];
  change((state) => ({ jobs: { ...state.jobs, [job.id]: job }, progress: job.ended ? without(state.progress, [job.id]) : state.progress }));
  if (job.ended && job.started && known?.state !== job.state) {
    change((state) => ({
      switchHistory: [...state.switchHistory, { at: job.ended, model: job.model, seconds: job.ended - job.started }].slice(-500),
    }));
  }
  if (job.state === "done") announce(t("said_done", { prompt: job.request.prompt || t("no_prompt") }));
  if (job.state === "failed") {
    announce(t("said_failed", { reason: job.reason }));
    if (isOwn(job.id)) toast(job.reason, "bad");
  }
  loadQueue();
}

/** Whether a job was queued by this tab. @param {string} id */
export const isOwn = (id) => current().asked.includes(id) || current().canvas.asked.includes(id);

/** @returns {string[]} the jobs of this tab that wait or run */
export function ownUnended() {
  const state = current();
  return [...state.asked, ...state.canvas.asked].filter((/** @type {string} */ id) => !state.jobs[id]?.ended);
}

/** @param {any} image */
function onImage(image) {
  change((state) => {
    const images = [...(state.sheet[image.job] ?? []).filter((/** @type {any} */ one) => one.id !== image.id), image];
    const asked = [...state.asked, ...state.earlier, ...state.canvas.asked].includes(image.job);
    return {
      sheet: asked ? { ...state.sheet, [image.job]: images.sort((a, b) => a.place - b.place) } : state.sheet,
      galleryVersion: state.galleryVersion + 1,
    };
  });
}

/** @param {string[]} ids */
async function onImages(ids) {
  const { details, sheet } = current();
  const shown = new Set([...Object.keys(details), ...Object.values(sheet).flatMap((images) => images.map((/** @type {any} */ one) => one.id))]);
  const wanted = ids.filter((id) => shown.has(id)).slice(0, MOST_DETAILS);
  const changed = wanted.length ? await api.post("/images/details", { ids: wanted }) : [];
  change((state) => {
    const found = new Map(changed.map((/** @type {any} */ image) => [image.id, image]));
    const gone = new Set(wanted.filter((id) => !found.has(id) || found.get(id).trashed));
    const sheet = Object.fromEntries(
      Object.entries(state.sheet).map(([job, images]) => [
        job,
        images
          .filter((/** @type {any} */ image) => !gone.has(image.id))
          .map((/** @type {any} */ image) => (found.has(image.id) ? { ...image, ...found.get(image.id), metadata: image.metadata } : image)),
      ]),
    );
    const details = { ...state.details };
    for (const id of ids) {
      if (found.has(id)) details[id] = found.get(id);
      // It is asked for again when it is shown.
      else delete details[id];
    }
    return { sheet, details, galleryVersion: state.galleryVersion + 1 };
  });
  // The boards count their images.
  loadBoardsSoon();
}

/** Load the jobs of the last request, and their images. */
async function loadSheet() {
  const missing = await loadJobs([...current().asked.slice(0, MOST_ASKED), ...current().canvas.asked]);
  change((state) => ({ asked: state.asked.filter((/** @type {string} */ id) => !missing.has(id)) }));
}

/**
 * Load jobs and their images. What an event says meanwhile is newer, and stays.
 * @param {string[]} ids
 * @returns {Promise<Set<string>>} those that do not exist
 */
async function loadJobs(ids) {
  const missing = new Set();
  /** @param {string} id */
  const load = async (id) => {
    const before = current().sheet[id];
    try {
      const job = await api.get(`/jobs/${id}`);
      return { id, before, job, images: await api.get(`/jobs/${id}/images`) };
    } catch (error) {
      if (!(error instanceof api.Refused && error.status === 404)) throw error;
      missing.add(id);
      return null;
    }
  };
  for (let first = 0; first < ids.length; first += LOADED_AT_ONCE) {
    const found = (await Promise.all(ids.slice(first, first + LOADED_AT_ONCE).map(load))).filter((one) => one !== null);
    change((state) => {
      const jobs = { ...state.jobs };
      const sheet = { ...state.sheet };
      for (const { id, before, job, images } of found) {
        if (!jobs[id]?.ended) jobs[id] = job;
        const there = new Set(images.map((/** @type {any} */ one) => one.id));
        const came = sheet[id] && sheet[id] !== before ? sheet[id].filter((/** @type {any} */ one) => !there.has(one.id)) : [];
        sheet[id] = [...images, ...came].sort((a, b) => a.place - b.place);
      }
      return { jobs, sheet };
    });
  }
  return missing;
}

/** What this tab has asked for so far stays in sight below the next request. */
const rememberSheet = () => change((state) => ({ earlier: [...new Set([...state.asked, ...state.earlier])].slice(0, MOST_EARLIER) }));

/** @param {string[]} asked */
function setAsked(asked) {
  change({ asked });
  localStorage.setItem(ASKED_KEY, JSON.stringify(asked.slice(0, MOST_ASKED)));
}

/**
 * Queue requests one after the other, and show each as soon as it is accepted.
 * @param {any[]} wanted
 * @param {(ids: string[]) => void} accepted called with the identifiers of all jobs so far
 * @returns {Promise<number>} how many jobs were accepted
 */
export async function queue(wanted, accepted) {
  /** @type {string[]} */
  const ids = [];
  for (const request of wanted) {
    try {
      const job = await api.post("/generate", { ...request, spread: true });
      ids.push(...job.jobs);
      // An event may have told a newer state already.
      change((now) => ({ jobs: { [job.id]: job, ...now.jobs }, problem: null }));
      accepted([...ids]);
    } catch (error) {
      report(error);
      break;
    }
  }
  // Images that were made meanwhile.
  await loadJobs(ids).catch(report);
  return ids.length;
}

/** Say that a model must be chosen. @returns {boolean} whether one is */
export function modelIsChosen() {
  if (current().form.models.length) return true;
  report(new api.Refused(422, { message: t("choose_model"), field: "models" }));
  return false;
}

/** @returns {number} a seed that nobody has chosen */
export const someSeed = () => Math.floor(Math.random() * 2 ** 32);

/** Queue what the form says. */
export async function make() {
  const state = current();
  if (!modelIsChosen()) return;
  const seed = state.form.seed ?? someSeed();
  rememberSheet();
  const count = await queue(requests(state, { seed }), setAsked);
  if (!count) return;
  // On a narrow screen, the images are below the form.
  if (innerWidth < NARROW) document.querySelector(".work")?.scrollIntoView({ block: "start" });
  rememberPrompt(state.form.prompt);
  if (state.form.seedLocked) setForm({ seed });
  announce(t("said_queued", { count }));
}

/**
 * Queue a grid: what the form says, varied along two fields.
 * @param {string} x `NAME=V1,V2` from left to right @param {string} y the same from top to bottom; empty for one row
 */
export async function makeGrid(x, y) {
  const state = current();
  if (!modelIsChosen()) return;
  const request = { ...requests(state, { seed: state.form.seed ?? someSeed(), count: 1 })[0] };
  const grid = await attempt(() => api.post("/grid", { request, x, y }));
  if (!grid) return;
  rememberSheet();
  setAsked(grid.cells.map((/** @type {any} */ cell) => cell.job));
  change({ grid });
  await loadJobs(current().asked).catch(report);
}

/** End the session. What the browser has stored of it goes, because others may use the browser. */
export async function logOut() {
  if ((await attempt(() => api.post("/logout"))) === undefined) return;
  localStorage.removeItem(ASKED_KEY);
  localStorage.removeItem(PROMPTS_KEY);
  location.assign(onServer("/"));
}

/** @param {string} prompt */
function rememberPrompt(prompt) {
  if (!prompt) return;
  const prompts = [prompt, ...promptHistory().filter((one) => one !== prompt)].slice(0, MOST_PROMPTS);
  localStorage.setItem(PROMPTS_KEY, JSON.stringify(prompts));
}

/** @returns {string[]} the prompts of earlier requests, the newest first */
export function promptHistory() {
  try {
    return JSON.parse(localStorage.getItem(PROMPTS_KEY) ?? "[]");
  } catch {
    return [];
  }
}

/** @param {string} job */
export const cancel = (job) => attempt(() => api.post(`/jobs/${job}/cancel`));

/** @param {boolean} everybody also other people's jobs */
export const cancelWaiting = (everybody = false) => attempt(() => api.post(`/queue/cancel${everybody ? "?everybody=true" : ""}`));

/** Let jobs that wait start in this order. @param {string[]} ids */
export const setOrder = (ids) => attempt(() => api.put("/queue/order", { ids }));

/**
 * Move images to the trash, and offer to undo it.
 * @param {string[]} ids
 */
export async function trash(ids) {
  const changed = await changeImages(ids, { trashed: true });
  if (changed) {
    toast(t("moved_to_trash", { count: changed.length }), "plain", {
      label: t("undo"),
      run: () => changeImages(changed, { trashed: false }),
    });
  }
}

/**
 * @param {string[]} ids
 * @param {Record<string, any>} values
 * @returns {Promise<string[] | undefined>} the images that were changed
 */
export const changeImages = (ids, values) =>
  attempt(async () => {
    /** @type {string[]} */
    const changed = [];
    for (let at = 0; at < ids.length; at += CHANGED_AT_ONCE) {
      changed.push(...(await api.patch("/images", { ids: ids.slice(at, at + CHANGED_AT_ONCE), ...values })).ids);
    }
    return changed;
  });

/** @param {string} id whether a fresh process makes the same pixels */
export const check = (id) => attempt(() => api.post(`/images/${id}/check`));

/**
 * Do something, and show what went wrong.
 * @template T
 * @param {() => Promise<T>} run
 * @returns {Promise<T | undefined>}
 */
export async function attempt(run) {
  try {
    return await run();
  } catch (error) {
    report(error);
    return undefined;
  }
}

let numbers = 0;

/**
 * Show a message until the user closes it; plain ones go by themselves.
 * @param {string} text
 * @param {"plain" | "bad"} [kind]
 * @param {{label: string, run: () => unknown}} [action]
 */
export function toast(text, kind = "plain", action = undefined) {
  const id = ++numbers;
  change((state) => ({ toasts: [...state.toasts.filter((/** @type {any} */ one) => one.text !== text), { id, text, kind, action }].slice(-4) }));
  if (kind === "plain") setTimeout(() => removeToast(id), action ? 12_000 : 6000);
}

let waiting = false;

/** Ask the server until it answers. The stream of events may not notice that the network was cut for a moment. */
async function waitForServer() {
  if (waiting) return;
  waiting = true;
  while (waiting) {
    await new Promise((resolve) => setTimeout(resolve, PROBE_MS));
    waiting = await api.get("/health").then(
      () => false,
      () => true,
    );
  }
  await loadAll().catch(report);
}

/** Show an error: beside its field if the form has it, else as a message. @param {unknown} error */
export function report(error) {
  if (error instanceof api.Unreachable) {
    change({ online: false });
    waitForServer();
    return;
  }
  if (error instanceof api.Refused && error.status === 401 && current().me?.people) {
    stopListening();
    mustLogIn();
    return;
  }
  const message = error instanceof Error ? error.message : String(error);
  const field = error instanceof api.Refused ? error.field : null;
  if (field && isShown(field)) change({ problem: { field, message } });
  else toast(message, "bad");
}

/** Tell users of screen readers what happened. @param {string} text */
export const announce = (text) => change({ said: text });
