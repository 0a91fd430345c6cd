// @ts-check
/** Light or dark: as the system says, unless the user chose. */

const KEY = "safelight.theme";

export const themeNow = () => localStorage.getItem(KEY) ?? "";

/** @param {string} name light, dark, or "" for the system's */
export function setTheme(name) {
  if (name) localStorage.setItem(KEY, name);
  else localStorage.removeItem(KEY);
  applyTheme();
}

export function applyTheme() {
  const chosen = themeNow();
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
}
