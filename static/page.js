// The progress page: what is shown comes from the server alone. Here times tick, and the connection is kept.
(() => {
  const live = document.getElementById("live")
  if (!live?.dataset.stream) return // an earlier attempt, of which nothing more comes
  const SECOND = 1000
  const FIRST_EVENT_WITHIN = 3 * SECOND // of an open stream: the server sends the state at once
  const LATE = 8 * SECOND // a sign of life that is older when it arrives was held back
  const SILENT_FOR = 90 * SECOND // of a stream; the workflow reports every minute
  const POLL = {over: 60 * SECOND, hidden: 20 * SECOND, shown: 4 * SECOND, offline: 4 * SECOND}
  const $ = id => document.getElementById(id)
  const shown = () => $("steps").dataset
  const isOver = () => shown().condition == "over"
  const spread = (from, to) => Date.now() + from + Math.random() * (to - from) // thousands come back at once

  // In a frame with sandbox="allow-scripts" a page may load nothing. It goes on reloading itself.
  const isSandboxed = self.origin == "null"
  const turns = isSandboxed ? null : streamTurns(() => setTimeout(connect, Math.random() * SECOND))
  const state = {
    source: null, // the stream, open or on its way
    heard: 0, // how many events that stream has brought
    verifyAt: Infinity, // when to ask whether that stream tells all
    overdue: 0, // the timer that gives it up
    tellsAll: false, // an answer knew no more: one that comes back is not asked about
    asksForTurn: false,
    failures: 0, // of streams, in a row
    link: "", // "": connected; "offline"; "gone": the link was revoked
    provenAt: Date.now(), // when the connection last worked
    connectAt: Date.now(),
    pollAt: Date.now() + POLL.shown,
    tickedAt: Date.now(),
    ahead: 0, // ms by which the server's clock is ahead of this machine's, which may be wrong by hours
    spoken: shown().spoken,
  }
  const serverNow = () => Date.now() + state.ahead
  const streams = () => state.source?.readyState == 1 && state.heard

  // ---- Times -------------------------------------------------------------------------------------------

  // As duration() in webapp/page/words.py says it.
  function duration(seconds) {
    const whole = Math.max(0, Math.floor(seconds))
    for (const [unit, size, smaller, part] of [["d", 86400, "h", 3600], ["h", 3600, "min", 60], ["min", 60, "s", 1]]) {
      if (whole < size) continue
      const rest = Math.floor(whole % size / part)
      return `${Math.floor(whole / size)} ${unit}` + (rest ? ` ${rest} ${smaller}` : "")
    }
    return `${whole} s`
  }

  // Brings all that depends on the clock up to date; without a connection nothing is claimed to go on.
  function tick(root) {
    const now = serverNow(), passed = moment => now > Date.parse(moment)
    for (const time of root.querySelectorAll("[data-clock]")) setText(time, clockTime(time.dateTime, now))
    for (const time of root.querySelectorAll("[data-since]")) {
      const word = time.dataset.since, at = clockTime(time.dateTime, now)
      const lasts = duration((now - Date.parse(time.dateTime)) / SECOND)
      if (state.link) setText(time, `${word == "ago" ? "at" : "since"} ${at}`)
      else setText(time, word == "ago" ? `${lasts} ago` : `${word} ${lasts}`.trim())
    }
    for (const late of root.querySelectorAll("[data-after]")) late.hidden = !passed(late.dataset.after)
    for (const early of root.querySelectorAll("[data-until]")) early.hidden = passed(early.dataset.until)
    const bar = root.querySelector("#bar"), {low, high, start, end} = bar.dataset
    if (!start || state.link) return
    const part = (now - Date.parse(start)) / (Date.parse(end) - Date.parse(start))
    bar.value = +low + (high - low) * Math.min(1, Math.max(0, part))
  }

  // ---- What is shown -----------------------------------------------------------------------------------

  // Makes `old` what `next` is and keeps each node that can stay, as selected, focused, opened or pressed.
  // (htmx 4 does this itself; no package has it yet.)
  function morph(old, next) {
    if (old.nodeName != next.nodeName || old.id != next.id) return old.replaceWith(next)
    if (old.nodeType != Node.ELEMENT_NODE) {
      if (old.data != next.data) old.data = next.data
      return
    }
    for (const {name} of [...old.attributes])
      if (!next.hasAttribute(name) && !(name == "open" && old.id)) old.removeAttribute(name) // the reader opened it
    for (const {name, value} of next.attributes)
      if (old.getAttribute(name) != value) old.setAttribute(name, value)
    const kept = [...next.childNodes].map(child => [child, null])
    let from = old.firstChild
    for (const pair of kept) {
      let same = from
      while (same && !isSame(same, pair[0])) same = same.nextSibling
      if (same) [pair[1], from] = [same, same.nextSibling]
    }
    for (const child of [...old.childNodes]) if (!kept.some(pair => pair[1] == child)) child.remove()
    let place = old.firstChild
    for (const [child, same] of kept) {
      if (!same) old.insertBefore(child, place)
      else {
        place = same.nextSibling
        morph(same, child)
      }
    }
  }
  const isSame = (a, b) => a.nodeName == b.nodeName && a.id == b.id

  htmx.defineExtension("morph", {
    handleSwap(style, target, fragment) {
      const next = fragment.querySelector("#steps")
      if (next) {
        tick(next)
        morph($("steps"), next)
        changed()
      }
      return []
    },
  })

  function changed() {
    const {title, icon, spoken} = shown()
    if (!state.link) document.title = title
    if ($("icon").getAttribute("href") != icon) $("icon").href = icon
    $("bell").hidden = !canNotify || isOver()
    if (spoken == state.spoken) return
    $("said").textContent = state.spoken = spoken
    if (isOver()) {
      if (bellIsOn()) new Notification(title, {body: spoken})
      setBell(false)
    } else if (!streams()) connect()
  }

  function setSignal(moment) {
    if (!moment || isOver()) return
    if (!$("signal")) {
      const time = Object.assign(document.createElement("time"), {id: "signal"})
      time.dataset.since = "ago"
      $("update").replaceChildren("Last update ", time)
    }
    $("signal").dateTime = moment
    tick(live)
  }

  // ---- The connection ----------------------------------------------------------------------------------

  function setLink(link) {
    if (link == state.link) return
    const was = state.link
    state.link = live.dataset.link = link
    if (!link) delete live.dataset.link
    for (const time of live.querySelectorAll("[data-known]")) {
      time.dateTime = new Date(state.provenAt + state.ahead).toISOString()
      time.textContent = clockTime(time.dateTime, serverNow())
    }
    for (const last of live.querySelectorAll("[data-last]")) last.textContent = $("now").textContent
    document.title = link ? `${link == "gone" ? "Link no longer works" : "No connection"} · ${$("name").textContent}` : shown().title
    $("said").textContent = link ? $(link).querySelector("h2").textContent : was && `Connected again. ${shown().spoken}`
    tick(live)
  }

  function proven() {
    state.provenAt = Date.now()
    setLink("")
  }

  async function connect() {
    if (state.source || state.asksForTurn || isSandboxed) return
    const wanted = () => !document.hidden && !isOver() && state.link != "gone"
    if (!wanted()) return
    state.asksForTurn = true
    const hasTurn = await turns.take()
    state.asksForTurn = false
    state.connectAt = spread(20 * SECOND, 40 * SECOND)
    if (!hasTurn) return
    if (!wanted()) return turns.giveBack()
    if (!state.link) state.pollAt = Date.now() + 10 * SECOND // time for the stream to open
    live.setAttribute("sse-connect", live.dataset.stream)
    htmx.process(live)
  }

  function disconnect() {
    state.source?.close()
    state.source = null
    forgetOpening()
    turns?.giveBack()
    live.removeAttribute("sse-connect")
    htmx.process(live)
  }

  htmx.createEventSource = url => {
    const source = state.source = new EventSource(url)
    source.addEventListener("open", () => {
      proven()
      expectEvent(FIRST_EVENT_WITHIN)
    })
    source.addEventListener("steps", () => hear(source))
    source.addEventListener("alive", ({data}) => {
      hear(source)
      // The first event of a stream may tell of long ago.
      if (state.heard > 1 && serverNow() - Date.parse(data) > LATE) giveUpStream()
      setSignal(data)
    })
    source.addEventListener("error", event => {
      event.stopImmediatePropagation() // or htmx's extension, too, would connect again
      if (source != state.source) return
      source.hasWorked && source.readyState == EventSource.CONNECTING ? streamLost() : streamFailed()
    })
    return source
  }

  function hear(source) {
    if (source != state.source) return
    if (!state.heard++ && !state.tellsAll) state.verifyAt = spread(3 * SECOND, 5 * SECOND)
    source.hasWorked = true
    state.failures = 0
    state.pollAt = Date.now() + SILENT_FOR
    clearTimeout(state.overdue)
    proven()
  }

  function expectEvent(within) {
    clearTimeout(state.overdue)
    state.overdue = setTimeout(giveUpStream, within)
  }

  // Nothing that was heard or expected holds for the next opening.
  function forgetOpening() {
    state.heard = 0
    state.verifyAt = Infinity
    clearTimeout(state.overdue)
  }

  // The browser opens it again after the server's `retry:` and says what it has, so that of ten thousand none
  // is sent anew what it shows. If that fails, it is asked why.
  function streamLost() {
    if (!state.link) state.pollAt = state.heard ? spread(6 * SECOND, 9 * SECOND) : spread(0, SECOND)
    forgetOpening()
  }

  // One that never opened, or was refused: an EventSource does not tell why.
  function streamFailed() {
    const pause = Math.min(2 ** state.failures++, 32) * SECOND
    disconnect()
    state.connectAt = spread(pause / 2, pause * 2)
    state.pollAt = spread(0, SECOND)
  }

  // Some proxies keep the last block of a stream until the next fills it: then asking is faster.
  function giveUpStream() {
    disconnect()
    state.tellsAll = false
    state.connectAt = spread(60 * SECOND, 120 * SECOND)
    state.pollAt = Date.now()
  }

  function poll() {
    state.verifyAt = Infinity
    const pause = state.link ? POLL.offline : isOver() ? POLL.over : document.hidden ? POLL.hidden : POLL.shown
    state.pollAt = spread(0, SECOND) + (streams() ? SILENT_FOR : pause)
    htmx.ajax("GET", `${live.dataset.steps}?after=${shown().version}`, {source: live}).catch(() => {})
  }

  const isOurs = xhr => (xhr.status == 200 || xhr.status == 204) && xhr.getResponseHeader("Version")

  // A stream is newer than any answer, so nothing is shown over what it brought.
  live.addEventListener("htmx:beforeSwap", ({detail}) => {
    detail.shouldSwap &&= Boolean(isOurs(detail.xhr)) && state.source?.readyState != 1
  })
  live.addEventListener("htmx:afterRequest", ({detail: {xhr}}) => {
    if (xhr.status == 404) {
      disconnect()
      return setLink("gone")
    }
    if (!isOurs(xhr)) return setLink("offline")
    const ahead = Date.parse(xhr.getResponseHeader("Date")) - Date.now()
    if (Math.abs(ahead - state.ahead) > 2 * SECOND) state.ahead = ahead
    const wasOffline = state.link
    proven()
    if (wasOffline) state.connectAt = 0
    const signal = $("signal")?.dateTime
    if (streams()) {
      state.tellsAll = xhr.status == 204 && !(xhr.getResponseHeader("Last-Signal") > (signal ?? ""))
      if (!state.tellsAll) expectEvent(2 * SECOND) // it may be on its way still
    }
    setSignal(xhr.getResponseHeader("Last-Signal"))
  })
  live.addEventListener("htmx:sseClose", ({detail}) => detail.type == "message" && disconnect())

  // After sleep a stream may look open and be dead, so it is opened anew.
  function wake() {
    if (document.hidden || isSandboxed) return
    state.tellsAll = false
    if (state.link) return poll()
    disconnect()
    connect()
    state.pollAt = Date.now() + FIRST_EVENT_WITHIN
  }
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) return wake()
    disconnect()
    state.pollAt = Date.now() + POLL.hidden
  })
  addEventListener("pageshow", ({persisted}) => persisted && wake())
  addEventListener("online", wake)
  addEventListener("offline", () => isSandboxed || poll())

  function everySecond() {
    const now = Date.now(), slept = Math.abs(now - state.tickedAt) > 10 * SECOND
    state.tickedAt = now
    tick(live)
    if (isSandboxed || state.link == "gone") return
    if (slept) {
      wake()
      return poll() // which also tells the server's time, should this machine's clock have been set
    }
    if (now > state.connectAt) connect()
    if (now > Math.min(state.pollAt, state.verifyAt)) poll()
  }

  // ---- Notification at the end -------------------------------------------------------------------------

  // Chrome on Android has the class and refuses its constructor.
  const canNotify = "Notification" in window && !isSandboxed && !/Android/.test(navigator.userAgent)
  const bellKey = `notify ${location.pathname}`
  const bellIsOn = () => $("bell").getAttribute("aria-pressed") == "true"
  function setBell(on) {
    $("bell").setAttribute("aria-pressed", on)
    if (canNotify) on ? sessionStorage.setItem(bellKey, "yes") : sessionStorage.removeItem(bellKey)
  }
  $("bell").addEventListener("click", async () => {
    const granted = !bellIsOn() && await Notification.requestPermission()
    $("blocked").hidden = granted != "denied"
    setBell(granted == "granted")
  })

  // ---- The start ---------------------------------------------------------------------------------------

  function start() {
    if (!isSandboxed && $("reload")) {
      stop() // cancels the reload that is meant for a page whose script did not start
      $("reload").remove()
    }
    connect()
  }
  const loaded = performance.getEntriesByType("navigation")[0]?.responseStart
  state.ahead = live.dataset.now * SECOND - Date.now() + (performance.now() - loaded || 0)
  $("unstarted")?.remove()
  if (canNotify && sessionStorage.getItem(bellKey) && Notification.permission == "granted") setBell(true)
  tick(live)
  changed()
  setInterval(everySecond, SECOND)
  // The reload's clock starts after this event, so only then can it be stopped.
  document.readyState == "complete" ? start() : addEventListener("load", () => setTimeout(start))
})()
