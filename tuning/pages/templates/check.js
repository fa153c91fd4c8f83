"use strict";

const ROLES = { I: "text", U: "supervised", B: "image" };
const HINT = "Point at a token, or focus the text and press ← and →, to see ids.";

function describe(element, first, total) {
  const count = Number(element.dataset.n || 1);
  if (element.tagName === "B") {
    const place = count === 1 ? `token ${first}` : `tokens ${first} to ${first + count - 1}`;
    return `${place} of ${total}: ${element.textContent}, id ${element.title}`;
  }
  return `token ${first} of ${total}: id ${element.title}, ${JSON.stringify(element.textContent)}, ${ROLES[element.tagName]}`;
}

function explain(box) {
  const status = document.getElementById(box.getAttribute("aria-describedby"));
  let elements, places, total;
  let current = -1;

  function number() {
    if (elements) return;
    elements = [...box.querySelectorAll("i, u, b")];
    places = new Map();
    total = 0;
    elements.forEach((element, index) => {
      places.set(element, { index, first: total + 1 });
      total += Number(element.dataset.n || 1);
    });
  }
  function show(element) {
    status.textContent = element ? describe(element, places.get(element).first, total) : HINT;
  }
  function moveTo(index) {
    elements[current]?.classList.remove("current");
    current = Math.max(0, Math.min(elements.length - 1, index));
    elements[current]?.classList.add("current");
    elements[current]?.scrollIntoView({ block: "nearest" });
    show(elements[current]);
  }
  function find(event) {
    number();
    return event.target.closest(".tokens i, .tokens u, .tokens b");
  }

  status.textContent = HINT;
  box.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    number();
    const index = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: elements.length - 1 }[event.key];
    if (index === undefined) return;
    event.preventDefault();
    moveTo(index);
  });
  box.addEventListener("click", (event) => {
    const element = find(event);
    if (element) moveTo(places.get(element).index);
  });
  box.addEventListener("mouseover", (event) => {
    const element = find(event);
    if (element) show(element);
  });
  box.addEventListener("mouseleave", () => show(elements?.[current]));
}

document.querySelectorAll(".tokens").forEach(explain);
