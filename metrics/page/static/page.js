// The live page: wires the engine's messages to what is shown.

import { arena } from "./arena.js";
import { setText } from "./format.js";
import { follow } from "./feed.js";
import { cpuCache, rates, swaps, tiles } from "./panels.js";
import { State } from "./state.js";
import { AdapterTable } from "./table.js";
import { Timeline } from "./timeline.js";

const state = new State();
const timeline = new Timeline(state);
const table = new AdapterTable(state);
const lessMotion = matchMedia("(prefers-reduced-motion: reduce)");

let changed = false;
let full = false;

follow(
  "events",
  (update) => {
    state.apply(update);
    changed = true;
    full ||= update.full ?? false;
  },
  (connection) => {
    const pill = document.getElementById("connection");
    if (pill.dataset.state === connection) return;
    pill.dataset.state = connection;
    pill.textContent = { connecting: "Connecting", live: "Live", lost: "Connection lost, reconnecting" }[connection];
    document.documentElement.classList.toggle("lost", connection === "lost");
    document.title = connection === "lost" ? "(lost) aioengine" : "aioengine";
    if (connection === "lost") state.freeze();
  },
);

function frame() {
  if (changed) {
    changed = false;
    setText("model", state.model);
    tiles(state);
    arena(state);
    cpuCache(state);
    swaps(state, full);
    table.update();
    timeline.update();
    full = false;
  }
  timeline.frame(lessMotion.matches);
  requestAnimationFrame(frame);
}

requestAnimationFrame(frame);
setInterval(() => rates(state), 1000);

addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  document.getElementById("filter").focus();
});
