// A button copies the text before it: the link to share, the report to send.
document.addEventListener("click", ({target}) => {
  if (!target.matches("button.copy")) return
  const text = target.previousElementSibling
  text.select ? text.select() : getSelection().selectAllChildren(text)
  target.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C"
})
