// The table of adapters. Only the rows in sight exist, so that a thousand cost no more than twenty.

import { bytes, count, element, named } from "./format.js";

const ROW = 34;
const SPARE = 6;
const NEAR = { slot: 0, loading: 1, cpu: 2, disk: 3 };
const WHERE = { cpu: "CPU", loading: "being read", disk: "disk" };
const LOW_FIRST = new Set(["name", "place"]);

export class AdapterTable {
  #state;
  #scroll = document.getElementById("scroll");
  #table = document.getElementById("adapters");
  #body = this.#table.tBodies[0];
  #filter = document.getElementById("filter");
  #place = document.getElementById("place");
  #sort = { key: "place", sign: 1 };
  #rows = [];
  #drawn = new Map(); // name -> {row, key}

  constructor(state) {
    this.#state = state;
    for (const cell of this.#table.querySelectorAll("th")) {
      cell.querySelector("button").addEventListener("click", () => this.#sortBy(cell.dataset.sort));
    }
    const changed = () => {
      this.#scroll.scrollTop = 0;
      this.update();
    };
    this.#filter.addEventListener("input", changed);
    this.#place.addEventListener("change", changed);
    this.#scroll.addEventListener("scroll", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(this.#scroll);
    this.#markSort();
  }

  update() {
    const wanted = this.#filter.value.trim().toLowerCase();
    const place = this.#place.value;
    const rows = [];
    for (const adapter of this.#state.adapters.values()) {
      if (wanted && !adapter.lower.includes(wanted)) continue;
      if (place === "busy" ? !(adapter.running + adapter.waiting) : place && adapter.place !== place) continue;
      rows.push(adapter);
    }
    const { key, sign } = this.#sort;
    const value = key === "place" ? (row) => NEAR[row.place] * 1e6 + (row.slot ?? 0) : (row) => row[key];
    const byName = (a, b) => (a.lower < b.lower ? -1 : a.lower > b.lower ? 1 : 0);
    rows.sort((a, b) => (key === "name" ? sign * byName(a, b) : sign * (value(a) - value(b)) || byName(a, b)));
    this.#rows = rows;
    const all = this.#state.adapters.size;
    const text = rows.length === all ? count(all) : `${count(rows.length)} of ${count(all)}`;
    const output = document.getElementById("count");
    if (output.textContent !== text) output.textContent = text;
    this.#table.setAttribute("aria-rowcount", rows.length + 1);
    this.#draw();
  }

  #sortBy(key) {
    const sign = LOW_FIRST.has(key) ? 1 : -1;
    this.#sort = { key, sign: this.#sort.key === key ? -this.#sort.sign : sign };
    this.#markSort();
    this.update();
  }

  #markSort() {
    for (const cell of this.#table.querySelectorAll("th")) {
      if (cell.dataset.sort !== this.#sort.key) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", this.#sort.sign > 0 ? "ascending" : "descending");
    }
  }

  #draw() {
    const first = Math.max(Math.floor(this.#scroll.scrollTop / ROW) - SPARE, 0);
    const last = Math.min(first + Math.ceil(this.#scroll.clientHeight / ROW) + 2 * SPARE, this.#rows.length);
    const drawn = new Map();
    const children = [space(first)];
    for (let i = first; i < last; i++) {
      const adapter = this.#rows[i];
      const key = JSON.stringify(adapter);
      const old = this.#drawn.get(adapter.name);
      const row = old?.key === key ? old.row : line(adapter);
      row.setAttribute("aria-rowindex", i + 2);
      drawn.set(adapter.name, { row, key });
      children.push(row);
    }
    children.push(space(this.#rows.length - last));
    if (!this.#rows.length) children.push(nothing(this.#state.adapters.size));
    this.#drawn = drawn;
    this.#body.replaceChildren(...children.filter(Boolean));
  }
}

function line(adapter) {
  const row = element("tr");
  const name = element("td");
  name.append(named("", adapter.name));
  if (adapter.pinned) name.append(element("span", "tag", "pinned"));
  const where = adapter.place === "slot" ? `slot ${adapter.slot}` : WHERE[adapter.place];
  row.append(name, element("td", adapter.place === "disk" ? "far" : "", where));
  for (const key of ["running", "waiting"]) {
    row.append(element("td", adapter[key] ? "number" : "number zero", count(adapter[key])));
  }
  row.append(element("td", "number", adapter.rank ? count(adapter.rank) : "–"));
  row.append(element("td", "number", bytes(adapter.bytes)));
  row.append(element("td", "number", count(adapter.version)));
  return row;
}

function space(rows) {
  if (rows <= 0) return null;
  const row = element("tr");
  row.setAttribute("aria-hidden", "true");
  const cell = element("td", "space");
  cell.colSpan = 7;
  cell.style.height = `${rows * ROW}px`;
  row.append(cell);
  return row;
}

function nothing(all) {
  const row = element("tr");
  const cell = element("td", "empty", all ? "No adapter matches." : "No adapter is registered.");
  cell.colSpan = 7;
  row.append(cell);
  return row;
}
