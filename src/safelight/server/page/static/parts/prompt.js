// @ts-check
/** The field for a prompt: colours for its syntax, the number of tokens, completion, history, and weights by keys. */

import * as api from "../api.js";
import { promptHistory } from "../actions.js";
import { html, useEffect, useRef, useState } from "../lib/htm-preact.js";
import { current, useStore } from "../store.js";
import { t } from "../strings.js";
import { Labelled, useId } from "./elements.js";

const SYNTAX = /(<[^<>\n]*>)|(__[\w/-]+__)|([{}|])|([()[\]])|(:-?\d*\.?\d+)|\b(BREAK|AND)\b/g;
const KINDS = ["tag", "wildcard", "choice", "bracket", "weight", "word"];
const COUNT_AFTER = 300;
const MOST_FOUND = 8;
const STEP = 0.1;

/** @param {string} text the parts of a prompt with the kind of each */
function coloured(text) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(SYNTAX)) {
    const kind = KINDS[match.slice(1).findIndex((group) => group !== undefined)];
    parts.push(text.slice(at, match.index), html`<span class=${`syntax-${kind}`}>${match[0]}</span>`);
    at = match.index + match[0].length;
  }
  // A line of its own at the end, so that the colours are as high as the text.
  return [...parts, text.slice(at), "\n"];
}

/**
 * Change the weight of the selected words, or of the word at the cursor, as A1111 does.
 * @param {HTMLTextAreaElement} area @param {number} by
 * @returns {string} the new text; the selection is set
 */
function reweighted(area, by) {
  const text = area.value;
  let { selectionStart: start, selectionEnd: end } = area;
  if (start === end) {
    while (start > 0 && /[^\s,()]/.test(text[start - 1])) start--;
    while (end < text.length && /[^\s,():]/.test(text[end])) end++;
  }
  const words = text.slice(start, end);
  if (!words.trim()) return text;
  const after = text.slice(end).match(/^:(-?\d*\.?\d+)\)/);
  const weighted = text[start - 1] === "(" && after;
  const weight = Math.round(((weighted ? Number(after[1]) : 1) + by) * 100) / 100;
  const before = text.slice(0, weighted ? start - 1 : start);
  const rest = text.slice(weighted ? end + after[0].length : end);
  const middle = weight === 1 ? words : `(${words}:${weight})`;
  const from = before.length + (weight === 1 ? 0 : 1);
  requestAnimationFrame(() => area.setSelectionRange(from, from + words.length));
  return before + middle + rest;
}

/** What can complete the word before the cursor. @param {string} before @param {any} state */
function completions(before, state) {
  const word = before.match(/[^\s,()<>{}|]*$/)?.[0] ?? "";
  if (word.length < 2) return { word, found: [] };
  const wanted = word.toLowerCase();
  const found = state.adapters
    .filter((/** @type {any} */ one) => one.name.toLowerCase().includes(wanted) && !["vae", "controlnet", "text_encoder"].includes(one.kind))
    .map((/** @type {any} */ one) =>
      one.kind === "textual_inversion" ? { text: one.name, insert: `<${one.name}>` } : { text: one.name, insert: `<lora:${one.name}:1>` },
    );
  return { word, found: found.slice(0, MOST_FOUND) };
}

/**
 * How long a prompt is for a text encoder. CLIP reads chunks; the others cut off what is too long.
 * @param {any} encoder
 */
function countText({ name, tokens, most, chunk }) {
  const limit = chunk ? Math.max(1, Math.ceil(tokens / chunk)) * chunk : most;
  return limit ? t("tokens", { name, count: tokens, most: limit }) : t("tokens_without_limit", { name, count: tokens });
}

/** @param {{field: string, label: string, value: string, onChange: (text: string) => void, onMake?: () => void, rows?: number, main?: boolean}} props */
export function Prompt({ field, label, value, onChange, onMake, rows = 3, main = false }) {
  const id = useId();
  const area = useRef(/** @type {any} */ (null));
  const colours = useRef(/** @type {any} */ (null));
  const [found, setFound] = useState(/** @type {any[]} */ ([]));
  const [chosen, setChosen] = useState(0);
  const [past, setPast] = useState(-1);
  const [tokens, setTokens] = useState(/** @type {any} */ (null));
  const model = useStore((state) => state.form.models[0] ?? "");

  useEffect(() => {
    let late = false;
    const timer = setTimeout(() => {
      api.post("/tokens", { prompt: value, model }).then(
        (found) => late || setTokens(found),
        () => late || setTokens(null),
      );
    }, COUNT_AFTER);
    return () => {
      late = true;
      clearTimeout(timer);
    };
  }, [value, model]);

  useEffect(() => {
    // As high as the text.
    area.current.style.height = "auto";
    area.current.style.height = `${area.current.scrollHeight}px`;
  }, [value]);

  /** @param {any} one */
  const complete = (one) => {
    const at = area.current.selectionStart;
    const { word } = completions(value.slice(0, at), current());
    const start = at - word.length;
    onChange(value.slice(0, start) + one.insert + value.slice(at));
    setFound([]);
    requestAnimationFrame(() => area.current.setSelectionRange(start + one.insert.length, start + one.insert.length));
  };

  /** @param {any} event */
  const typed = (event) => {
    onChange(event.currentTarget.value);
    setPast(-1);
    const before = event.currentTarget.value.slice(0, event.currentTarget.selectionStart);
    setFound(completions(before, current()).found);
    setChosen(0);
  };

  /** @param {number} by */
  const fromHistory = (by) => {
    const history = promptHistory();
    const next = Math.min(Math.max(past + by, -1), history.length - 1);
    setPast(next);
    onChange(next < 0 ? "" : history[next]);
  };

  /** @param {any} event */
  const pressed = (event) => {
    // Keys of an input method are not ours.
    if (event.isComposing || event.keyCode === 229) return;
    const arrow = { ArrowUp: 1, ArrowDown: -1 }[/** @type {string} */ (event.key)];
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      onMake?.();
    } else if (arrow && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      onChange(reweighted(event.currentTarget, arrow * STEP));
    } else if (found.length && ["ArrowUp", "ArrowDown", "Enter", "Tab", "Escape"].includes(event.key)) {
      event.preventDefault();
      event.stopPropagation();
      if (arrow) setChosen((chosen - arrow + found.length) % found.length);
      else if (event.key === "Escape") setFound([]);
      else complete(found[chosen]);
    } else if (arrow && (value === "" || past >= 0) && main) {
      event.preventDefault();
      fromHistory(arrow);
    }
  };

  const note = tokens?.problem || (tokens?.encoders ?? []).map(countText).join(" · ");
  // FLUX's CLIP reads less than its T5: nothing is lost as long as one text encoder reads all.
  const cut = tokens?.encoders.length && tokens.encoders.every((/** @type {any} */ one) => one.most && one.tokens > one.most);
  const wrong = tokens?.problem || cut;
  return html`<${Labelled} ...${{ label, field, id }}>
    <div class="prompt">
      <div class="prompt-colours" ref=${colours} aria-hidden="true">${coloured(value)}</div>
      <textarea
        id=${id}
        ref=${area}
        rows=${rows}
        value=${value}
        spellcheck=${false}
        autocomplete="off"
        role="combobox"
        aria-expanded=${found.length > 0}
        aria-autocomplete="list"
        aria-controls=${`${id}-list`}
        aria-activedescendant=${found.length ? `${id}-${chosen}` : undefined}
        onInput=${typed}
        onKeyDown=${pressed}
        onBlur=${() => setTimeout(() => setFound([]), 150)}
        onScroll=${(/** @type {any} */ event) => (colours.current.scrollTop = event.currentTarget.scrollTop)}
      />
      <ul class="completions" role="listbox" id=${`${id}-list`} aria-label=${t("completions")} hidden=${!found.length}>
        ${found.map(
          (one, number) => html`<li id=${`${id}-${number}`} role="option" aria-selected=${number === chosen} onMouseDown=${() => complete(one)}>${one.text}</li>`,
        )}
      </ul>
      <span class="tokens" data-wrong=${wrong ? "" : undefined}>${note}</span>
    </div>
  <//>`;
}
