// What the engine has told this page. Times are seconds on the engine's clock.

export const WINDOW = 120;
const RATE_SECONDS = 3;
const SWAPS = 200;

export class State {
  adapters = new Map();
  numbers = null;
  slots = [];
  sharesMemory = false; // whether an adapter takes what its own rank takes
  segments = new Map(); // by slot, as slotKey() calls it: {adapter, version, state, from, to}; to is null while it lasts
  swaps = []; // newest last
  swapCount = 0;
  samples = []; // {time, decode, prefill}
  model = "";
  since = 0; // what was before is not known
  frozen = null;
  #offset = -Infinity;

  // The engine's clock now. Messages arrive late, never early: the smallest delay seen is the best guess.
  now() {
    return this.frozen ?? performance.now() / 1000 + this.#offset;
  }

  // When the connection is lost, time stands still: nobody knows what the slots hold now.
  freeze() {
    if (this.#offset > -Infinity) this.frozen ??= this.now();
  }

  date(time) {
    return new Date(Date.now() - (this.now() - time) * 1000);
  }

  apply(update) {
    const full = update.full ?? false;
    if (full) this.#restart(update);
    this.frozen = null;
    this.#offset = Math.max(this.#offset, update.time - performance.now() / 1000);
    for (const row of update.adapters ?? []) this.adapters.set(row[0], adapter(row));
    for (const name of update.gone ?? []) this.adapters.delete(name);
    for (const entry of update.log ?? []) this.#move(entry);
    if (update.slots) {
      this.slots = update.slots;
      this.#reconcile(full ? update.since : update.time);
    }
    if (update.numbers) {
      this.numbers = update.numbers;
      const { decode, prefill } = update.numbers;
      const last = this.samples.at(-1);
      if (last && (decode < last.decode || update.time < last.time)) this.samples = []; // another engine, or a restart
      this.samples.push({ time: update.time, decode, prefill });
    }
    this.#forget(update.time - WINDOW);
  }

  // Tokens per second of one kind ("decode", "prefill") in the few seconds before ``time``.
  rate(kind, time = this.now(), seconds = RATE_SECONDS) {
    const end = this.#sample(time);
    const start = this.#sample(time - seconds) ?? this.samples[0];
    if (!end || !start || end === start) return 0;
    return (end[kind] - start[kind]) / Math.min(seconds, Math.max(time - start.time, 0.5));
  }

  #sample(time) {
    let low = 0;
    let high = this.samples.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.samples[middle].time <= time) low = middle + 1;
      else high = middle;
    }
    return this.samples[low - 1];
  }

  #restart(update) {
    this.adapters.clear();
    this.segments.clear();
    this.swaps = [];
    this.sharesMemory = false;
    this.model = update.model ?? "";
    this.since = update.since;
    this.#offset = -Infinity;
  }

  #move(entry) {
    const { time } = entry;
    if (entry.slot !== undefined) {
      const slot = slotKey({ index: entry.slot });
      this.#close(slot, time);
      if (entry.kind !== "evicted") {
        const state = { placing: "loading", placed: "ready", draining: "draining" }[entry.kind];
        this.#open(slot, entry.adapter, entry.version, state, time);
      }
    }
    if (["loaded", "placed", "evicted", "dropped", "failed", "unloaded"].includes(entry.kind)) {
      entry.id = ++this.swapCount;
      this.swaps.push(entry);
      if (this.swaps.length > SWAPS) this.swaps.shift();
    }
  }

  // The slot table has the last word: about what no movement said, and what was before the first one.
  #reconcile(time) {
    const keys = new Set(this.slots.map(slotKey));
    for (const key of this.segments.keys()) if (!keys.has(key)) this.segments.delete(key); // its replica is gone
    for (const slot of this.slots) {
      const { adapter: name, version, state } = slot;
      const key = slotKey(slot);
      const last = this.segments.get(key)?.at(-1);
      const open = last && last.to === null ? last : null;
      const same = open && open.adapter === name && open.version === version && open.state === state.toLowerCase();
      if (same || (!open && name === null)) continue;
      const from = Math.max(time, last?.from ?? 0, last?.to ?? 0);
      this.#close(key, from);
      if (name !== null) this.#open(key, name, version, state.toLowerCase(), from);
    }
  }

  #open(slot, name, version, state, from) {
    if (!this.segments.has(slot)) this.segments.set(slot, []);
    this.segments.get(slot).push({ adapter: name, version, state, from, to: null });
  }

  #close(slot, to) {
    const last = this.segments.get(slot)?.at(-1);
    if (last && last.to === null) last.to = to;
  }

  #forget(before) {
    for (const segments of this.segments.values()) {
      while (segments.length && segments[0].to !== null && segments[0].to < before) segments.shift();
    }
    while (this.samples.length > 2 && this.samples[1].time < before) this.samples.shift();
  }
}

// Which slot it is, among those of all replicas.
export function slotKey({ replica, index }) {
  return replica ? `${replica}/${index}` : String(index);
}

function adapter([name, version, rank, bytes, place, slot, pinned, running, waiting]) {
  return { name, version, rank, bytes, place, slot, pinned, running, waiting, lower: name.toLowerCase() };
}
