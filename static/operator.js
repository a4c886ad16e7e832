// The operator's pages: a list or a job asks for itself anew at each event of its stream.
document.getElementById("feed") && (() => {
  const live = document.getElementById("feed"), offline = document.getElementById("away")
  const turns = streamTurns(() => setTimeout(() => source || connect(), Math.random() * 1000)) // ms
  const copies = () => [...live.querySelectorAll("button.copy")]
  let source = null, asksForTurn = false, opened = [], told = new Map()

  function disconnect() {
    source?.close()
    source = null
    turns.giveBack()
  }

  // HTTP/1.1 allows six connections to a host: a hidden tab gives its stream back, and of many only some have one.
  async function connect() {
    if (asksForTurn) return
    disconnect()
    if (document.hidden) return
    asksForTurn = true
    const hasTurn = await turns.take()
    asksForTurn = false
    if (!hasTurn || document.hidden) return turns.giveBack()
    source = new EventSource(live.dataset.stream)
    for (const name of live.dataset.events.split(" ")) source.addEventListener(name, refresh)
    source.addEventListener("done", disconnect)
    source.onerror = () => source?.readyState == EventSource.CLOSED && setTimeout(refresh, 5000)
  }
  const refresh = () => document.hidden || htmx.trigger(live, "refresh")
  const lost = () => {
    if (!offline.hidden) return
    offline.firstElementChild.textContent = new Date().toLocaleTimeString()
    offline.hidden = false
  }
  document.addEventListener("visibilitychange", () => { connect(); refresh() })
  addEventListener("pagehide", disconnect)
  addEventListener("pageshow", connect)
  addEventListener("offline", lost)
  navigator.onLine || lost()
  addEventListener("online", () => { connect(); refresh() })
  for (const name of ["htmx:sendError", "htmx:timeout", "htmx:responseError"]) live.addEventListener(name, lost)
  live.addEventListener("htmx:beforeSwap", ({detail}) => {
    if (detail.xhr.status != 200) return
    offline.hidden = true
    opened = [...live.querySelectorAll("details[open]")].map(each => each.id)
    told = new Map(copies().map(button => [button.previousElementSibling.value, button.textContent]))
  })
  live.addEventListener("htmx:afterSwap", () => {
    for (const id of opened) document.getElementById(id)?.setAttribute("open", "")
    for (const button of copies()) setText(button, told.get(button.previousElementSibling.value) ?? button.textContent)
    if ((!source || source.readyState == EventSource.CLOSED) && document.getElementById("job")?.dataset.condition != "over") connect()
  })
})()
