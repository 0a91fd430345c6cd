// @ts-check
/** Boards: the menu that puts images on one, and the dialog for a name. */

import * as api from "../api.js";
import { attempt, changeImages, toast } from "../actions.js";
import { html, useState } from "../lib/htm-preact.js";
import { useStore } from "../store.js";
import { t } from "../strings.js";
import { Dialog, TextField } from "./elements.js";

/** The boards to put images on, and a new one. @param {{ids: string[]}} props */
export function Boards({ ids }) {
  const boards = useStore((state) => state.boards);
  /** @param {string} board @param {string} name */
  const put = async (board, name) => {
    if (await changeImages(ids, { board })) toast(t("on_board", { name }));
  };
  const putOnNew = async () => {
    const names = new Set(boards.map((/** @type {any} */ one) => one.name));
    let number = 1;
    while (names.has(`${t("new_board")} ${number}`)) number++;
    const made = await attempt(() => api.post("/boards", { name: `${t("new_board")} ${number}` }));
    if (made) put(made.id, made.name);
  };
  return html`
    ${boards.map((/** @type {any} */ one) => html`<button type="button" onClick=${() => put(one.id, one.name)}>${one.name}</button>`)}
    <button type="button" onClick=${putOnNew}>${t("new_board")}</button>
    <button type="button" onClick=${() => put("none", t("no_board"))}>${t("no_board")}</button>`;
}

/** @param {{name?: string, onName: (name: string) => unknown, onClose: () => void}} props */
export function BoardName({ name = "", onName, onClose }) {
  const [text, setText] = useState(name);
  /** @param {any} event */
  const submit = (event) => {
    event.preventDefault();
    onName(text.trim());
    onClose();
  };
  return html`<${Dialog} label=${t("board_name")} onClose=${onClose}><form onSubmit=${submit}>
    <${TextField} label=${t("board_name")} value=${text} onChange=${setText} />
    <button class="primary" disabled=${!text.trim()}>${t("save")}</button>
  </form><//>`;
}
