// @ts-check
/** A client of the native API, as anybody could write one. */

import { onServer } from "./paths.js";

const RECONNECT_MS = 3000;

/** An answer of the server that refuses a request. */
export class Refused extends Error {
  /** @param {number} status @param {any} body */
  constructor(status, body) {
    super(body?.message ?? `HTTP ${status}`);
    this.status = status;
    /** The field of the request that is wrong, if it is one. */
    this.field = body?.field ?? null;
    this.kind = body?.error ?? "";
    this.near = body?.near ?? [];
  }
}

/** The server did not answer at all. */
export class Unreachable extends Error {}

/**
 * Ask the server. Throws Refused or Unreachable.
 * @param {string} method
 * @param {string} path below /api/v1
 * @param {any} [body] sent as JSON
 * @returns {Promise<Response>}
 */
async function ask(method, path, body) {
  let answer;
  try {
    answer = await fetch(onServer(`/api/v1${path}`), {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    throw new Unreachable(String(error));
  }
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => null));
  return answer;
}

/**
 * Call a route.
 * @param {string} method @param {string} path @param {any} [body]
 * @returns {Promise<any>} the answer's JSON; null if it has none
 */
export async function call(method, path, body) {
  const answer = await ask(method, path, body);
  return answer.status === 204 ? null : answer.json();
}

/** @param {string} path @param {Record<string, any>} [query] values of null, undefined and "" are left out */
export function get(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return call("GET", text ? `${path}?${text}` : path);
}

/** @param {string} path @param {any} [body] */
export const post = (path, body) => call("POST", path, body);
/** @param {string} path @param {any} body */
export const patch = (path, body) => call("PATCH", path, body);
/** @param {string} path @param {any} body */
export const put = (path, body) => call("PUT", path, body);
/** @param {string} path */
export const remove = (path) => call("DELETE", path);

/** @param {string} name a part of a path */
export const part = (name) => encodeURIComponent(name);

/**
 * Download the answer of a route as a file.
 * @param {string} path @param {any} body @param {string} name
 */
export async function download(path, body, name) {
  saveFile(await (await ask("POST", path, body)).blob(), name);
}

/** Ask for a picture. @param {string} path @param {any} body @returns {Promise<Blob>} */
export const picture = async (path, body) => (await ask("POST", path, body)).blob();

/** Let the browser save a file. @param {Blob} blob @param {string} name */
export function saveFile(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/**
 * Listen to the server's events until the returned function is called. The browser connects again by itself.
 * @param {Record<string, (data: any) => void>} handlers by kind of event
 * @param {(online: boolean) => void} onConnection
 */
export function listen(handlers, onConnection) {
  /** @type {EventSource} */
  let source;
  const connect = () => {
    source = new EventSource(onServer("/api/v1/events"));
    source.onopen = () => onConnection(true);
    source.onerror = () => {
      onConnection(false);
      // After an answer that is no stream, such as a proxy's error, the browser does not try again.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, RECONNECT_MS);
    };
    for (const [kind, handler] of Object.entries(handlers)) {
      source.addEventListener(kind, (event) => handler(JSON.parse(/** @type {MessageEvent} */ (event).data)));
    }
  };
  connect();
  return () => source.close();
}

/**
 * Store a picture as an input image.
 * @param {Blob} blob
 * @param {"image" | "mask" | "controls" | "references"} field
 * @returns {Promise<{digest: string, width: number, height: number}>}
 */
export async function storeInput(blob, field) {
  return post("/inputs", { image: await dataUrl(blob), field });
}

/** @param {Blob} blob @returns {Promise<string>} */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
