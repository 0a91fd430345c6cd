// @ts-check
/** Who uses the page, and what they may do. */

import * as api from "./api.js";
import { change, current, useStore } from "./store.js";

const ROLES = ["admin", "member", "guest"];

/** Whether a person may do what a role may. @param {any} me @param {string} role */
const allows = (me, role) => Boolean(me?.role) && ROLES.indexOf(me.role) <= ROLES.indexOf(role);

/** Whether the person may do what a role may. @param {"admin" | "member" | "guest"} role */
export const may = (role) => allows(current().me, role);

/** The same for a view, which is drawn again when it changes. @param {"admin" | "member" | "guest"} role @returns {boolean} */
export const useMay = (role) => useStore((state) => allows(state.me, role));

/** Ask the server who uses the page. @returns {Promise<boolean>} whether the server would answer them */
export async function loadMe() {
  const me = await api.get("/me");
  change({ me });
  return !me.people || Boolean(me.name);
}

/** The session has ended: the page asks for name and password again. */
export const mustLogIn = () => change({ me: { people: true, name: "", role: null }, ready: false });
