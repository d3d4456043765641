// The slots over the last two minutes: one row each, a bar for every adapter that was in it.

import { duration, element, hue, named } from "./format.js";
import { WINDOW, slotKey } from "./state.js";

const AXIS = 20;
const STATES = { loading: "being copied", ready: "in the slot", draining: "draining" };

export class Timeline {
  #state;
  #canvas = document.getElementById("canvas");
  #names = document.getElementById("slot-names");
  #tip = document.getElementById("tip");
  #row = 36;
  #width = 0;
  #drawn = -1;
  #theme = null;
  #keys = null;
  #shown = [];

  constructor(state) {
    this.#state = state;
    new ResizeObserver(() => this.#resize()).observe(this.#canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#theme = null;
      this.redraw();
    });
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => (this.#tip.hidden = true));
  }

  // The names at the left: what each slot holds now.
  update() {
    const { slots } = this.#state;
    const keys = slots.map(slotKey).join();
    if (this.#keys !== keys) {
      this.#keys = keys;
      this.#row = slots.length <= 2 ? 50 : slots.length <= 4 ? 36 : slots.length <= 10 ? 28 : 22;
      this.#names.style.setProperty("--row", `${this.#row}px`);
      this.#names.replaceChildren(...slots.map(() => element("li")));
      this.#shown = slots.map(() => "");
      this.#resize();
    }
    slots.forEach((slot, i) => {
      const key = JSON.stringify(slot);
      if (this.#shown[i] === key) return;
      this.#shown[i] = key;
      const number = element("b", "", String(slot.index));
      number.title = slot.replica ? `slot ${slot.index} of replica ${slot.replica}` : `slot ${slot.index}`;
      const now = slot.adapter === null ? element("span", "muted", "free") : named("name", slot.adapter);
      const word = { READY: slot.pinned ? "pinned" : "", LOADING: "loading", DRAINING: "draining", FREE: "" };
      const parts = [number, now, element("span", "sub", word[slot.state])];
      if (this.#begins(i)) parts.unshift(element("span", "replica", slot.replica));
      this.#names.children[i].classList.toggle("begins", this.#begins(i));
      this.#names.children[i].replaceChildren(...parts);
    });
    this.redraw();
  }

  // Whether the strip of a replica begins with this slot.
  #begins(i) {
    const { slots } = this.#state;
    return Boolean(slots[i].replica) && slots[i].replica !== slots[i - 1]?.replica;
  }

  redraw() {
    this.#drawn = -1;
  }

  #resize() {
    const ratio = devicePixelRatio || 1;
    this.#width = this.#canvas.parentElement.clientWidth;
    const height = this.#state.slots.length * this.#row + AXIS;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.width = Math.round(this.#width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    this.redraw();
  }

  #x(time) {
    return this.#width * (1 - (this.#state.now() - time) / WINDOW);
  }

  // Called for every frame; draws if the picture has moved by half a pixel, or by a second if motion is unwanted.
  frame(still) {
    const now = this.#state.now();
    const step = still ? 1 : (WINDOW / Math.max(this.#width, 1)) * 0.5;
    if (!Number.isFinite(now) || (this.#drawn >= 0 && Math.abs(now - this.#drawn) < step)) return;
    this.#drawn = now;
    this.#theme ??= readTheme();
    const context = this.#canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.#width, this.#canvas.height);
    context.font = `500 12px ${getComputedStyle(document.body).fontFamily}`;
    this.#axis(context);
    this.#state.slots.forEach((slot, i) => {
      context.fillStyle = this.#theme.track;
      const known = Math.min(Math.max(this.#x(this.#state.since), 0), this.#width);
      box(context, known, this.#top(i), this.#width - known, this.#bar());
      for (const segment of this.#state.segments.get(slotKey(slot)) ?? []) this.#segment(context, segment, i);
      if (i > 0 && this.#begins(i)) {
        context.fillStyle = this.#theme.muted;
        context.fillRect(0, i * this.#row, this.#width, 1);
      }
    });
  }

  #top(i) {
    return i * this.#row + (this.#row - this.#bar()) / 2;
  }

  #bar() {
    return Math.round(this.#row * 0.72);
  }

  #axis(context) {
    const bottom = this.#state.slots.length * this.#row;
    context.textBaseline = "middle";
    for (let ago = 0; ago <= WINDOW; ago += 30) {
      const x = Math.round(this.#width * (1 - ago / WINDOW));
      context.fillStyle = this.#theme.line;
      context.fillRect(Math.min(x, this.#width - 1), 0, 1, bottom);
      context.fillStyle = this.#theme.muted;
      context.textAlign = ago === 0 ? "right" : ago === WINDOW ? "left" : "center";
      context.fillText(ago ? `−${ago} s` : "now", x, bottom + AXIS / 2 + 2);
    }
  }

  #segment(context, segment, i) {
    const ratio = devicePixelRatio || 1;
    const snap = (x) => Math.round(x * ratio) / ratio; // whole pixels, or the thin bars would shimmer as they move
    const left = snap(Math.max(this.#x(segment.from), 0));
    const right = snap(Math.min(segment.to === null ? this.#width : this.#x(segment.to), this.#width));
    if (right <= 0) return;
    const width = Math.max(right - left - 1, 2);
    const [top, height] = [this.#top(i), this.#bar()];
    const full = this.#theme.fill(hue(segment.adapter));
    context.save();
    context.fillStyle = full;
    context.globalAlpha = { loading: 0.25, draining: 0.4, ready: 1 }[segment.state];
    box(context, left, top, width, height);
    context.globalAlpha = 1;
    context.clip();
    if (segment.state === "draining") context.fillRect(left, top + height - 3, width, 3);
    if (segment.state === "loading") stripes(context, left, top, width, height, full);
    if (width > 30) {
      context.fillStyle = this.#theme.ink;
      context.textAlign = "left";
      context.fillText(fit(context, segment.adapter, width - 10), left + 6, top + height / 2 + 0.5);
    }
    context.restore();
  }

  #point(event) {
    const i = Math.floor(event.offsetY / this.#row);
    const slot = this.#state.slots[i];
    const time = this.#state.now() - (1 - event.offsetX / this.#width) * WINDOW;
    const near = (2 * WINDOW) / this.#width; // the thinnest bars are hit within two pixels
    const hit = ((slot && this.#state.segments.get(slotKey(slot))) ?? []).findLast(
      (segment) => segment.from - near <= time && (segment.to ?? Infinity) + near >= time,
    );
    this.#tip.hidden = !hit;
    if (!hit) return;
    const lasted = duration((hit.to ?? this.#state.now()) - hit.from);
    this.#tip.textContent = `${hit.adapter} version ${hit.version}: ${STATES[hit.state]} for ${lasted}`;
    const left = Math.min(event.offsetX + 12, this.#width - this.#tip.offsetWidth);
    this.#tip.style.left = `${Math.max(left, 0)}px`;
    this.#tip.style.top = `${event.offsetY + 14}px`;
  }
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const [lightness, chroma] = [value("--fill-l"), value("--fill-c")];
  return {
    track: value("--track"),
    line: value("--line"),
    muted: value("--muted"),
    ink: value("--ink"),
    fill: (angle) => `oklch(${lightness} ${chroma} ${angle})`,
  };
}

function box(context, x, y, width, height) {
  context.beginPath();
  context.roundRect(x, y, width, height, Math.min(4, width / 2));
  context.fill();
}

function stripes(context, left, top, width, height, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 2.5;
  context.beginPath();
  for (let x = left - height; x < left + width; x += 7) {
    context.moveTo(x, top + height);
    context.lineTo(x + height, top);
  }
  context.stroke();
}

function fit(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = Math.min(text.length, Math.ceil(width / 4));
  while (length > 0 && context.measureText(`${text.slice(0, length)}…`).width > width) length--;
  return length > 1 ? `${text.slice(0, length)}…` : "";
}
