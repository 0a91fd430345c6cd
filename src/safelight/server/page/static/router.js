// @ts-check
/** The address of the page says which view it shows, so that the back button and links work. */

import { change, current } from "./store.js";
import { BASE, onServer } from "./paths.js";

/** @typedef {{view: string, item: string, query: Record<string, string>}} Route */

/** @returns {Route} */
export function readAddress() {
  const [, view = "", item = ""] = location.pathname.slice(BASE.length).split("/");
  return {
    view: decodeURIComponent(view) || "create",
    item: decodeURIComponent(item),
    query: Object.fromEntries(new URLSearchParams(location.search)),
  };
}

/** @param {string} path without the server's own @param {{replace?: boolean}} [how] */
export function go(path, how = {}) {
  if (how.replace) history.replaceState(null, "", onServer(path));
  else history.pushState(null, "", onServer(path));
  const before = current().route.view;
  change({ route: readAddress() });
  if (current().route.view !== before) scrollTo(0, 0);
}

/** Follow links of the page and the back button. */
export function startRouter() {
  change({ route: readAddress() });
  addEventListener("popstate", () => change({ route: readAddress() }));
  document.addEventListener("click", (event) => {
    const link = /** @type {Element} */ (event.target).closest(`a[href^='${BASE}/']`);
    const plain = event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
    if (!link || !plain || link.hasAttribute("download") || link.getAttribute("target") || link.getAttribute("href")?.startsWith(onServer("/api/"))) return;
    event.preventDefault();
    go((link.getAttribute("href") ?? onServer("/")).slice(BASE.length) || "/");
  });
}

export const routeNow = () => /** @type {Route} */ (current().route);
