// Numbers, times and colours, as people read them.

const whole = new Intl.NumberFormat("en");

export const count = (value) => whole.format(value);

export const percent = (part, all) => (all ? `${Math.round((100 * part) / all)}%` : "–");

export function rate(value) {
  return value < 10 && value > 0 ? value.toFixed(1) : whole.format(Math.round(value));
}

export function bytes(value) {
  if (!value) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

export const clock = (date) => date.toTimeString().slice(0, 8);

// The same name has the same hue, on every page and after every restart. FNV-1a, then a last mixing step:
// names that differ in one letter must not look alike.
export function hue(name) {
  let hash = 0x811c9dc5;
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 15), 0x9e3779b1);
  return ((hash ^ (hash >>> 13)) >>> 0) % 360;
}

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Adapter names come from outside: they reach the page as text and in no other way.
export function named(className, name) {
  const made = element("span", className);
  const dot = element("i", "dot");
  dot.style.setProperty("--hue", hue(name));
  made.append(dot, element("span", "name", name));
  made.title = name;
  return made;
}

export function setText(id, text) {
  const found = document.getElementById(id);
  if (found.textContent !== text) found.textContent = text;
}
