// What every page uses: copying, the reader's own time of day, and turns at the streams.

// A button copies the text before it: the link to share, the report to send.
document.addEventListener("click", ({target}) => {
  if (!target.matches("button.copy")) return
  const text = target.previousElementSibling
  text.select ? text.select() : getSelection().selectAllChildren(text)
  // navigator.clipboard exists on https and localhost only; this works everywhere.
  target.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C"
})

const shortTime = new Intl.DateTimeFormat([], {timeStyle: "short"})
const longTime = new Intl.DateTimeFormat([], {dateStyle: "medium", timeStyle: "short"})

// A moment as the reader writes it, with its date unless that is today's.
function clockTime(moment, now) {
  const at = new Date(moment)
  return (at.toDateString() == new Date(now).toDateString() ? shortTime : longTime).format(at)
}

// Changes a text only where it differs, so that a selection in it lives on.
function setText(element, text) {
  if (element.textContent != text) element.textContent = text
}

// HTTP/1.1 allows a browser six connections to a host, so at most four pages have a stream and the others
// ask now and then. They agree by messages: navigator.locks exists on https and localhost only.
// `onFree` is called when another page gives its turn back.
function streamTurns(onFree) {
  const MOST = 4, ANSWER_WITHIN = 150 // pages; ms
  const me = Math.random(), before = new Set(), channel = new BroadcastChannel("milepost streams")
  let holds = false, asks = false
  channel.onmessage = ({data: {says, from, to}}) => {
    if (says == "free") onFree()
    if (says == "mine" && to == me) before.add(from)
    if (says != "who") return
    if (holds || (asks && me < from)) channel.postMessage({says: "mine", from: me, to: from})
    else if (asks) before.add(from) // of two that ask at once, the smaller number goes first
  }
  return {
    async take() {
      asks = true
      before.clear()
      channel.postMessage({says: "who", from: me})
      await new Promise(done => setTimeout(done, ANSWER_WITHIN))
      asks = false
      return holds = before.size < MOST
    },
    giveBack() {
      if (holds) channel.postMessage({says: "free"})
      holds = false
    },
  }
}
