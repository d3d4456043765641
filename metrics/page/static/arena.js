// The memory that slots share, to scale: each adapter where it lies.

import { bytes, count, element, hue, setText } from "./format.js";

let shown = "";

export function arena(state) {
  const numbers = state.numbers;
  if (!numbers) return;
  const held = state.slots.filter((slot) => Number.isInteger(slot.offset)).sort((a, b) => a.offset - b.offset);
  const several = state.slots.some((slot) => slot.replica); // a fleet: each replica has a memory of its own
  state.sharesMemory ||= held.length > 0;
  const section = document.getElementById("memory");
  section.hidden = several || !state.sharesMemory;
  if (section.hidden) return;
  const all = numbers.slot_memory;
  const key = JSON.stringify([all, held.map((slot) => [slot.adapter, slot.offset, slot.bytes, slot.state])]);
  if (key === shown) return;
  shown = key;
  const parts = held.map((slot) => {
    const part = place(slot.offset, slot.bytes, all, slot.adapter);
    part.className = slot.state.toLowerCase();
    part.style.setProperty("--hue", hue(slot.adapter));
    part.dataset.adapter = slot.adapter;
    return part;
  });
  const strip = document.getElementById("arena");
  strip.replaceChildren(...parts);
  const used = numbers.slot_memory_used;
  const text = `${count(held.length)} ${held.length === 1 ? "adapter" : "adapters"} in ${bytes(used)} of ${bytes(all)}`;
  setText("arena-sub", text);
  strip.setAttribute("aria-label", text);
}

function place(from, size, all, name) {
  const part = element("i");
  part.style.left = `${(100 * from) / all}%`;
  part.style.width = `${(100 * size) / all}%`;
  part.title = `${name}: ${bytes(size)}`;
  return part;
}
