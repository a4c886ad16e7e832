// Times tick here, by the server's clock; what is shown comes from the server alone.
(() => {
  const $ = id => document.getElementById(id)
  const live = $("live"), icon = $("icon"), bell = $("bell"), clock = new Intl.DateTimeFormat([], {timeStyle: "short"})
  const data = () => $("steps").dataset, over = () => data().condition == "over"
  const arrived = performance.timeOrigin + performance.getEntriesByType("navigation")[0].responseStart
  let ahead = live.dataset.now * 1000 - arrived // of this machine's clock, in ms
  let source, asked = Date.now(), ticked = asked, down = 0, gone, wanted, headline = $("now").textContent

  const words = s => (s = Math.max(0, Math.floor(s))) < 60 ? `${s} s` : s >= 3600 ? `${s / 3600 | 0} h ${s / 60 % 60 | 0} min`
    : `${s / 60 | 0} min` + (s % 60 ? ` ${s % 60} s` : "")
  const roughly = s => s < 90 ? Math.max(Math.round(s / 10), 1) * 10 + " s" : words(Math.round(s / 60) * 60)

  function tick() {
    const now = Date.now() + ahead, since = t => (now - Date.parse(t)) / 1000
    for (const time of live.querySelectorAll("[data-since]")) time.textContent = words(since(time.dateTime))
    const bar = $("bar")
    if (!bar.dataset.pace) return
    const [from, to, median, most, rest] = bar.dataset.pace.split(" ").map(Number), t = Math.max(since(bar.dataset.from), 0)
    if (median) bar.value = Math.max(bar.value, from + (to - from) * Math.min(1, t / median))
    $("left").textContent = t > most ? "longer than usual"
      : t > median ? `up to ${roughly(rest + most - t)} left` : `about ${roughly(rest + median - t)} left`
  }

  function disconnect() {
    source?.close()
    live.removeAttribute("sse-connect")
    htmx.process(live)
  }
  function connect() {
    disconnect()
    if (document.hidden || over() || gone) return
    live.setAttribute("sse-connect", live.dataset.stream)
    htmx.process(live)
  }
  htmx.createEventSource = url => {
    source?.close() // one at a time, however many retries are under way
    source = new EventSource(url)
    if (document.hidden) source.close()
    return source
  }
  function poll() {
    asked = Date.now() + Math.random() * 2000
    htmx.ajax("GET", `${live.dataset.steps}?after=${data().version}`, {source: live}).catch(() => {})
  }
  const wake = () => { connect(); poll() }
  const patience = () => down ? 4 : over() ? 60 : document.hidden ? 20 : source?.readyState == 1 ? 90 : 4

  live.addEventListener("htmx:sseBeforeMessage", e => {
    asked = Date.now()
    if (e.detail.lastEventId <= +data().version) e.preventDefault() // never an older state over a newer one
  })
  live.addEventListener("htmx:beforeSwap", e => {
    if (e.detail.serverResponse.match(/data-version="(\d+)/)?.[1] <= +data().version) e.detail.shouldSwap = false
  })
  live.addEventListener("htmx:sseError", () => Date.now() - asked > 1000 && poll())
  live.addEventListener("htmx:afterRequest", ({detail: {xhr}}) => {
    const ok = xhr.status == 200 || xhr.status == 204, drift = Date.parse(xhr.getResponseHeader("Date")) - Date.now()
    if (ok && Math.abs(drift - ahead) > 2000) ahead = drift
    if (xhr.status == 404) gone = true, disconnect()
    if (!ok && !down) $("since").textContent = clock.format(down = Date.now())
    if (ok) down = 0
    $("gone").hidden = !gone
    const news = $("offline").hidden != !down
    $("offline").hidden = gone || !down
    if (news && !gone) $("said").textContent = down ? $("offline").textContent : headline
  })

  function changed() {
    const {title, icon: sign} = data(), text = $("now").textContent
    document.title = title
    icon.setAttribute("href", icon.getAttribute("href").replace(/(%23)\w+(.*>).(<)/, `$1${sign.split(" ").join("$2")}$3`))
    tick()
    copies()
    if (text == headline) return
    $("said").textContent = headline = text
    if (over() && wanted) new Notification(title, {body: text}), wanted = false
    if (!over() && source?.readyState != 1) connect()
  }
  new MutationObserver(changed).observe(live, {childList: true})
})()
