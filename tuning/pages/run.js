"use strict";

const header = document.querySelector("header");
const seconds = Number(header.dataset.reload || 0);
const KEPT = "report " + location.pathname;

function recall() {
  try { return JSON.parse(sessionStorage.getItem(KEPT)) || {}; } catch { return {}; }
}
function keep(changes) {
  try { sessionStorage.setItem(KEPT, JSON.stringify({ ...recall(), ...changes })); } catch { /* the page is only less comfortable */ }
}
const folds = () => [...document.querySelectorAll("details")];
const nameOf = (fold) => `${fold.closest("[id]").id} ${fold.querySelector("summary").textContent.replace(/\d/g, "")}`;

function reload() {
  const focused = document.activeElement?.id;
  keep({ open: folds().filter((fold) => fold.open).map(nameOf), focused });
  location.reload();
}

// The browser itself goes back to where the page was scrolled to.
function restore() {
  const { open = [], focused } = recall();
  folds().forEach((fold) => { fold.open = open.includes(nameOf(fold)); });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  keep({ open: [], focused: "" });
}

function offerReload() {
  const label = document.createElement("label");
  label.className = "reload";
  const box = Object.assign(document.createElement("input"), { type: "checkbox", id: "reload" });
  box.checked = !recall().paused;
  box.addEventListener("change", () => keep({ paused: !box.checked }));
  label.append(box, `Load this page again every ${seconds} seconds`);
  header.append(label);
  setInterval(() => {
    const selecting = String(getSelection() || "");
    if (box.checked && !document.hidden && !selecting) reload();
  }, seconds * 1000);
}

function tellAge() {
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
  tellAge();
}
restore();
