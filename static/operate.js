// The operator's pages: a link is selected when it is touched, and copied by its button.
for (const button of document.querySelectorAll("button.copy")) {
  const link = button.parentElement.querySelector("input")
  link.onfocus = () => link.select()
  button.onclick = () => { link.select(); button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C" }
  button.hidden = false
}
