// @ts-check
/** An image in a grid. */

import { html } from "../lib/htm-preact.js";
import { t } from "../strings.js";
import { Icon } from "./elements.js";
import { onServer } from "../paths.js";

/** @param {{image: any, onOpen?: () => void, selected?: boolean, href?: string}} props */
export function Thumbnail({ image, onOpen, selected }) {
  const label = t("image_by", { model: image.model || image.program, seed: image.seed ?? "?" });
  return html`<button
    type="button"
    class="thumbnail"
    aria-label=${label}
    aria-pressed=${selected}
    draggable=${true}
    onDragStart=${(/** @type {any} */ event) => {
      const address = new URL(onServer(image.url), location.href).href;
      event.dataTransfer.setData("text/uri-list", address);
      // Chromium's own format: dragged to a folder, the image becomes a file there.
      event.dataTransfer.setData("DownloadURL", `${image.mime}:${image.file_name}:${address}`);
    }}
    onClick=${onOpen}
  >
    <img src=${onServer(image.thumbnail)} alt="" draggable=${false} loading="lazy" decoding="async" width=${image.width} height=${image.height} />
    ${image.starred && html`<span class="badge badge-star"><${Icon} name="star" filled=${true} /></span>`}
    ${image.marks.length > 0 && html`<span class="badge badge-mark" title=${image.marks.join("; ")}>${t("suspicious")}</span>`}
    ${image.same === true && html`<span class="badge badge-same" title=${t("same_yes")}><${Icon} name="check" /></span>`}
  </button>`;
}
