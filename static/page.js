// The progress page: times tick here, by the server's clock; what is shown comes from the server alone.
document.getElementById("live") && (() => {
  const $ = id => document.getElementById(id), show = (id, yes) => $(id).hidden = !yes
  const live = $("live"), icon = $("icon"), bell = $("bell"), said = $("said"), clock = new Intl.DateTimeFormat([], {timeStyle: "short"})
  const data = () => $("steps").dataset, over = () => data().condition == "over", headline = () => $("now").textContent
  const locks = navigator.locks ?? {request: async (name, options, use) => use(1)}
  const canNotify = window.Notification && Notification.permission != "denied" && !/Android/.test(navigator.userAgent)
  const opened = {}

  // How far the server's clock is ahead of this machine's, in ms; that one may be wrong by hours.
  const sent = performance.getEntriesByType("navigation")[0]?.responseStart
  let ahead = live.dataset.now * 1000 - Date.now() + (performance.now() - sent || 0)
  let source, heard, turn, asked = Date.now(), ticked = asked, down, gone, wanted, told = headline()

  const words = s => (s = Math.max(0, Math.floor(s))) < 60 ? `${s} s` : s >= 3600 ? `${s / 3600 | 0} h ${s / 60 % 60 | 0} min`
    : `${s / 60 | 0} min` + (s % 60 ? ` ${s % 60} s` : "")
  const roughly = s => s < 90 ? Math.max(Math.round(s / 10), 1) * 10 + " s" : words(Math.round(s / 60) * 60)

  function tick() {
    const since = t => (Date.now() + ahead - Date.parse(t)) / 1000, bar = $("bar")
    for (const time of live.querySelectorAll("[data-since]")) time.textContent = words(since(time.dateTime))
    if (!bar.dataset.pace) return
    const [from, to, median, most, rest] = bar.dataset.pace.split(" ").map(Number), t = Math.max(since(bar.dataset.from), 0)
    if (median) bar.value = Math.max(bar.value, from + (to - from) * Math.min(1, t / median))
    $("left").textContent = t > most ? "longer than usual"
      : t > median ? `up to ${roughly(rest + most - t)} left` : `about ${roughly(rest + median - t)} left`
  }

  // HTTP/1.1 allows six connections: a hidden tab gives its stream back, and four are open at most.
  function disconnect() {
    turn?.abort()
    source?.close()
    heard = 0
    live.removeAttribute("sse-connect")
    htmx.process(live)
  }
  async function connect() {
    disconnect()
    const {signal} = turn = new AbortController()
    for (let n = 0; n < 5 && !(signal.aborted || document.hidden || over() || gone); n++)
      await locks.request("stream " + n % 4, n < 4 ? {ifAvailable: true} : {signal}, lock => lock && !signal.aborted && new Promise(done => {
        signal.onabort = done
        live.setAttribute("sse-connect", live.dataset.stream)
        htmx.process(live)
      })).catch(() => {})
  }
  htmx.createEventSource = url => {
    source?.close() // one at a time, however many retries are under way
    return source = new EventSource(url)
  }
  const streams = () => heard && source.readyState == 1
  const patience = () => down ? 4 : over() ? 60 : document.hidden ? 20 : streams() ? 90 : 4

  function poll() {
    asked = Date.now() + Math.random() * 2000
    htmx.ajax("GET", `${live.dataset.steps}?after=${data().version}`, {source: live}).catch(() => {})
  }
  function wake() {
    connect()
    poll()
  }

  live.addEventListener("htmx:sseBeforeMessage", e => {
    heard = 1
    asked = Date.now()
    if (e.detail.lastEventId == data().version) e.preventDefault()
  })
  live.addEventListener("htmx:sseError", () => Date.now() - asked > 1000 && poll())
  live.addEventListener("htmx:beforeSwap", e => {
    const newer = !e.detail.serverResponse.includes(`data-version="${data().version}"`)
    e.detail.shouldSwap &&= newer
    if (newer && streams()) connect() // that stream should have said so
  })
  live.addEventListener("htmx:afterRequest", ({detail: {xhr}}) => {
    const ok = xhr.status == 200 || xhr.status == 204, drift = Date.parse(xhr.getResponseHeader("Date")) - Date.now(), was = down || gone
    if (ok && Math.abs(drift - ahead) > 2000) ahead = drift
    gone = xhr.status == 404
    if (!ok && !down) $("since").textContent = clock.format(Date.now() + ahead)
    down = !ok
    show("gone", gone)
    show("offline", down && !gone)
    if (gone) disconnect()
    if (ok && was) connect()
    if (!was != ok) said.textContent = ok ? "Connected again. " + headline() : $(gone ? "gone" : "offline").textContent
  })

  function changed() {
    const {title, icon: sign} = data(), text = headline()
    document.title = title
    icon.setAttribute("href", icon.getAttribute("href").replace(/(%23)\w+(.*fff'%3E).(%3C)/, `$1${sign.replace(" ", "$$2")}$3`))
    for (const id in opened) if ($(id)) $(id).open = opened[id]
    tick()
    show("bell", canNotify && !over())
    if (text == told) return
    said.textContent = told = text
    if (over() && wanted) new Notification(title, {body: text})
    if (over()) bell.ariaPressed = wanted = false
    else if (!streams()) connect()
  }
  new MutationObserver(changed).observe(live, {childList: true})

  live.addEventListener("toggle", e => opened[e.target.id] = e.target.open, true)
  bell.addEventListener("click", async () => {
    bell.ariaPressed = wanted = !wanted && await Notification.requestPermission() == "granted"
  })
  document.addEventListener("visibilitychange", () => document.hidden ? disconnect() : wake())
  for (const name of ["online", "offline", "pageshow"]) addEventListener(name, wake)
  setInterval(() => {
    const now = Date.now(), slept = Math.abs(now - ticked) > 10000
    ticked = now
    tick()
    if (slept) wake()
    else if (Math.abs(now - asked) > patience() * 1000) poll()
  }, 1000)
  changed()
})()
