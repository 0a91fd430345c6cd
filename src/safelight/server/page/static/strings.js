// @ts-check
/** The texts of the page, in the language of the browser. Each language has one file. */

/** The names of the languages, each in itself. @type {Record<string, string>} */
export const LANGUAGE_NAMES = { en: "English", zh: "中文" };

const KEY = "safelight.language";

let language = chosen();

function chosen() {
  const asked = [localStorage.getItem(KEY) ?? "", ...navigator.languages].map((one) => one.toLowerCase().split("-")[0]);
  return asked.find((one) => one in LANGUAGE_NAMES) ?? "en";
}

/** Load the texts of a language. A browser needs only one. @param {string} name @returns {Promise<Record<string, string>>} */
const load = async (name) => (await import(`./strings/${name}.js`))[name];

let texts = await load(language);

export const languageNow = () => language;

/** @param {string} name the language to use from now on */
export async function setLanguage(name) {
  texts = await load(name);
  language = name;
  localStorage.setItem(KEY, name);
  document.documentElement.lang = name;
}

/**
 * Return a text.
 * @param {string} key
 * @param {Record<string, string | number>} [values] replace `{name}` in the text
 */
export function t(key, values = {}) {
  const text = texts[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

/**
 * The label of a value that the server names, for example "vae_dtype". A name without a label, such as the role of an
 * installed package's component, stays as it is.
 * @param {string} name
 */
export const labelOf = (name) => texts[`fact_${name}`] ?? name.replaceAll("_", " ");

/** @param {number} seconds since 1970 */
export const when = (seconds) =>
  new Date(seconds * 1000).toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });

/** @param {number} bytes */
export function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toLocaleString(language, { maximumFractionDigits: 1 })} GB`;
  return `${Math.round(bytes / 1e6).toLocaleString(language)} MB`;
}

/** @param {number} seconds a duration */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toLocaleString(language, { maximumFractionDigits: 1 })} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}
