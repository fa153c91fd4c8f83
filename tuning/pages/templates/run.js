"use strict";

const header = document.querySelector("header");
const seconds = Number(header.dataset.reload || 0);
const STATE_KEY = "report " + location.pathname;

function readState() {
  try { return JSON.parse(sessionStorage.getItem(STATE_KEY)) || {}; } catch { return {}; }
}
function saveState(changes) {
  try { sessionStorage.setItem(STATE_KEY, JSON.stringify({ ...readState(), ...changes })); } catch { /* without storage the page only forgets what was open */ }
}
const folds = () => [...document.querySelectorAll("details")];
const nameOf = (fold) => `${fold.closest("[id]").id} ${fold.querySelector("summary").textContent.replace(/\d/g, "")}`;

function reload() {
  const focused = document.activeElement?.id;
  saveState({ open: folds().filter((fold) => fold.open).map(nameOf), focused });
  location.reload();
}

// The browser itself goes back to where the page was scrolled to.
function restoreState() {
  const { open = [], focused } = readState();
  folds().forEach((fold) => { fold.open = open.includes(nameOf(fold)); });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  saveState({ open: [], focused: "" });
}

function offerReload() {
  const label = document.createElement("label");
  label.className = "reload";
  const box = Object.assign(document.createElement("input"), { type: "checkbox", id: "reload" });
  box.checked = !readState().paused;
  box.addEventListener("change", () => saveState({ paused: !box.checked }));
  label.append(box, `Load this page again every ${seconds} seconds`);
  header.append(label);
  setInterval(() => {
    const selecting = String(getSelection() || "");
    if (box.checked && !document.hidden && !selecting) reload();
  }, seconds * 1000);
}

function showAge() {
  const times = header.querySelectorAll("time");
  const minutes = Math.round((Date.now() - Date.parse(times[times.length - 1]?.dateTime)) / 60000);
  if (!(minutes > 10)) return;
  const note = document.createElement("span");
  note.className = "old";
  note.textContent = ` (${minutes} minutes ago: the run may have been killed, or a step takes long)`;
  times[times.length - 1].after(note);
}

if (seconds) {
  offerReload();
  showAge();
}
restoreState();
