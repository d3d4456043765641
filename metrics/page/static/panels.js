// The tiles, the CPU cache, and the list of swaps.

import { bytes, clock, count, duration, element, named, percent, rate, setText } from "./format.js";
import { WINDOW } from "./state.js";

const CHIPS = 60;
const BUCKET = 2;
const NOW = { slot: (adapter) => `slot ${adapter.slot}`, loading: () => "being read", cpu: () => "" };

export function tiles(state) {
  const n = state.numbers;
  if (!n) return;
  const capacity = n.waiting - n.waiting_for_adapter;
  const used = n.kv_blocks - n.kv_blocks_free;
  const asked = n.slot_hits + n.slot_misses;
  setText("running", count(n.running));
  setText("running-sub", `${count(n.requests_finished)} finished${n.requests_failed ? `, ${count(n.requests_failed)} failed` : ""}`);
  setText("waiting", count(n.waiting));
  setText("waiting-sub", n.waiting ? `${count(n.waiting_for_adapter)} for an adapter, ${count(capacity)} for room` : "nobody waits");
  bar("waiting-adapter", n.waiting_for_adapter, n.waiting);
  bar("waiting-capacity", capacity, n.waiting);
  setText("kv", percent(used, n.kv_blocks));
  setText("kv-sub", `${count(used)} of ${count(n.kv_blocks)} blocks`);
  bar("kv-bar", used, n.kv_blocks);
  setText("hits", percent(n.slot_hits, asked));
  setText("hits-sub", asked ? `${count(n.slot_hits)} of ${count(asked)} found it in a slot` : "no request for an adapter yet");
  bar("hits-bar", n.slot_hits, asked);
  setText("swaps-sub", `${many(n.slot_loads, "load")}, ${many(n.slot_evictions, "eviction")}${n.load_failures ? `, ${many(n.load_failures, "failure")}` : ""}`);
}

// These fall by themselves when the engine has nothing more to say.
export function rates(state) {
  if (!state.numbers) return;
  setText("tokens", rate(state.rate("decode")));
  setText("tokens-sub", `${rate(state.rate("prefill"))} prompt tokens per second`);
  const end = Math.floor(state.now() / BUCKET) * BUCKET;
  const values = [];
  for (let ago = 0; ago <= WINDOW && end - ago >= state.samples[0].time + BUCKET; ago += BUCKET) {
    values.push(state.rate("decode", end - ago, 2 * BUCKET));
  }
  if (!values.length) return;
  const top = Math.max(...values, 1);
  const x = (i) => (WINDOW - i * BUCKET).toFixed(1);
  const line = values.map((value, i) => `${x(i)},${(31 - (30 * value) / top).toFixed(1)}`).join(" L");
  document.querySelector("#spark .line").setAttribute("d", `M${line}`);
  document.querySelector("#spark .area").setAttribute("d", `M${x(0)},32 L${line} L${x(values.length - 1)},32`);
}

const many = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;

function bar(id, part, all) {
  document.getElementById(id).style.width = `${all ? (100 * part) / all : 0}%`;
}

let shownChips = "";

export function cpuCache(state) {
  const held = [...state.adapters.values()].filter((adapter) => adapter.place !== "disk");
  held.sort((a, b) => (a.lower < b.lower ? -1 : 1));
  const capacity = state.numbers?.cpu_capacity ?? 0;
  const key = JSON.stringify([held.map((a) => [a.name, a.place, a.slot, a.bytes]), capacity]);
  if (key === shownChips) return;
  shownChips = key;
  const size = held.reduce((sum, adapter) => sum + adapter.bytes, 0);
  setText("cpu-sub", `${count(state.numbers?.cpu_adapters ?? held.length)} of ${count(capacity)} places${size ? `, ${bytes(size)}` : ""}`);
  const chips = held.slice(0, CHIPS).map((adapter) => {
    const chip = element("li", adapter.place);
    chip.append(named("name", adapter.name));
    const now = NOW[adapter.place](adapter);
    if (now) chip.append(element("span", "sub", now));
    return chip;
  });
  if (held.length > CHIPS) chips.push(element("li", "free", `and ${count(held.length - CHIPS)} more`));
  else if (!held.length) chips.push(element("li", "free", "empty"));
  document.getElementById("chips").replaceChildren(...chips);
}

const ROWS = 100;
let newest = 0;

export function swaps(state, full) {
  const list = document.getElementById("swaps");
  if (full) {
    list.replaceChildren();
    newest = 0;
  }
  const added = state.swaps.filter((swap) => swap.id > newest).slice(-ROWS);
  newest = state.swapCount;
  if (!added.length) {
    if (!list.children.length) list.append(element("li", "empty", "None since this page was opened."));
    return;
  }
  list.querySelector(".empty")?.remove();
  const before = list.scrollHeight;
  list.prepend(...added.reverse().map((swap) => swapRow(state, swap)));
  if (list.scrollTop > 0) list.scrollTop += list.scrollHeight - before; // what is being read stays in place
  while (list.children.length > ROWS) list.lastChild.remove();
}

function swapRow(state, swap) {
  const what = {
    loaded: "disk → CPU",
    placed: `CPU → slot ${swap.slot}`,
    evicted: `left slot ${swap.slot}`,
    dropped: "left the CPU",
    failed: `failed: ${swap.reason}`,
    unloaded: "unloaded",
  }[swap.kind];
  const row = element("li", ["loaded", "placed"].includes(swap.kind) ? "" : swap.kind === "failed" ? "failed" : "minor");
  const time = element("time", "", clock(state.date(swap.time)));
  row.append(time, named("who", swap.adapter), element("span", "what", what));
  row.append(element("span", "took", swap.seconds === undefined || swap.seconds === null ? "" : duration(swap.seconds)));
  row.dataset.kind = swap.kind;
  return row;
}
