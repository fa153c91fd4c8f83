// An image that is dropped anywhere on the page goes into the box. The browser would open it in place of the page.
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  const input = document.querySelector("input[type=file]");
  if (event.defaultPrevented || !input || !event.dataTransfer.files.length) return;
  event.preventDefault();
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
