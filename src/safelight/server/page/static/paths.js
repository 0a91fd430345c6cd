// @ts-check
/** Where the server is: behind a proxy it may have a path of its own, such as /safelight. */

/** The path of the server without a slash at its end; "" if it has none. This file is at BASE/page/paths.js. */
export const BASE = new URL("..", import.meta.url).pathname.slice(0, -1);

/** Return the address of something on the server. @param {string} path begins with a slash */
export const onServer = (path) => BASE + path;
