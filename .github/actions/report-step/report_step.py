"""Report a step of a workflow run to Milepost: one signed callback, or heartbeats.

    python3 report_step.py              what the environment describes
    python3 report_step.py heartbeat    a sign of life every HEARTBEAT_SECONDS, in the foreground

It is one file without dependencies, for Python 3.8 and newer. Environment:
    CALLBACK_SECRET     the key; nothing is signed without one. `heartbeat` also reads it from
                        its standard input, so that no later process finds it in /proc
    CALLBACK_URL        http(s), and within CALLBACK_ORIGIN where that is set
    JOB_ID, STATUS, STEP, FAILED_STEP, ERROR, PIPELINE, SUBJECT, NOTE, SERVER_ID, SERVER_IP,
    TAILSCALE_IP, RESULT_URL, SERVER_LEFT
                        the fields; an empty one is left out. STATUS takes the words of GitHub,
                        GitLab and Jenkins, too, and is in_progress where a STEP is given. A NOTE
                        may come without a STATUS
    ERROR_FILE          a file whose end is the ERROR
    WORKFLOW_RUN_ID, RUN_ATTEMPT
                        which run reports; else GitHub's own variables say it, else GitLab's
                        CI_PIPELINE_ID or Jenkins' BUILD_NUMBER, with RUN_ATTEMPT
    HEARTBEAT           `start` sends heartbeats from the background, `stop` ends them
    HEARTBEAT_SECONDS   60
    HEARTBEAT_FILE      heartbeats end when this file is gone; `start` makes one in RUNNER_TEMP
    RUNNER_PID          heartbeats end when this process is gone (POSIX only); with `start` it is
                        the process that called this one
    RUNNER_TEMP         a folder in which the calls of one run keep what they tell each other
    RETRY_SECONDS       how long to keep trying: 120 for what ends an attempt; 10 for the rest,
                        which any later callback implies
    PAUSE_SECONDS       the first pause between two tries, 1; each further one is twice as long
    SUMMARY             yes or no: tell the link, once per RUNNER_TEMP, in the log and in
                        GITHUB_STEP_SUMMARY (yes where that is set), never in a public repository
    HTTPS_PROXY, NO_PROXY, ALL_PROXY, http_proxy
                        as curl reads them

The exit code is 0 whatever happens: a run must not depend on who watches it. What could
not be delivered is said in the log, as a GitHub warning.

Every try signs and sends the same body. `sent_at` stays the time of the milestone, so two
minutes of tries keep well within the receiver's default CALLBACK_MAX_SKEW of 300 s. A
redirect is never followed: it could carry the callback out of CALLBACK_ORIGIN.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPException
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

TRY_SECONDS = 10.0
END_SECONDS = 120.0
HEARTBEAT_SECONDS = 60.0
LONGEST_JOB_SECONDS = 6 * 3600.0  # GitHub's limit for a job on its own runners
LONGEST_ANSWER = 65_536  # bytes
LONGEST_ERROR = 2000  # characters, like all that follow; what Milepost takes
LONGEST = {"step": 64, "failed_step": 64, "subject": 100, "note": 200}
LONGEST.update({"server_id": 255, "server_ip": 64, "tailscale_ip": 64})
LONGEST_ADDRESS = 2000
DEFAULT_PORTS = {"http": 80, "https": 443}
PROXY_PORT = 1080  # curl's default
CANCELLED = {"cancelled", "canceled", "aborted"}  # in GitHub's words, GitLab's and Jenkins'
WORDS = {"in_progress": "provisioning", "success": "running", "unstable": "running", "failure": "failed"}
FIELDS = ["step", "subject", "note", "server_id", "server_ip", "tailscale_ip"]
NO = {"no", "false", "off", "0"}
LINK = re.compile(r"https?://[\w.~:/?#@!$&'*+,;=%()\[\]-]+", re.ASCII)
INVISIBLE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?"  # terminal sequences
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class DeliveryError(Exception):
    """A callback did not arrive; the message says why."""


class RefusedError(DeliveryError):
    """It will not arrive however often it is tried."""


class StrangerError(DeliveryError):
    """Something answered 200, but not as Milepost does."""


def setting(name: str) -> str:
    """Return a variable as text that UTF-8 can carry, "" where it is not set."""
    return os.fsencode(os.environ.get(name, "")).decode(errors="replace").strip()


def seconds(name: str, default: float) -> float:
    """Return a variable as a positive number of seconds."""
    text = setting(name)
    try:
        value = float(text or default)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise RefusedError(f"{name} is not a number of seconds: {text!r}")
    return value


def origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port, as RFC 6454 compares them."""
    return url.scheme, url.hostname, url.port or DEFAULT_PORTS.get(url.scheme)


def receiver() -> SplitResult:
    """Return CALLBACK_URL once it is known to be one that may get signatures."""
    address, allowed = setting("CALLBACK_URL"), setting("CALLBACK_ORIGIN")
    try:
        url = urlsplit(address)
        if url.scheme not in DEFAULT_PORTS or not url.hostname or address.split() != [address]:
            raise RefusedError(f"callback URL is not an http(s) address: {address!r}")
        if allowed and origin(url) != origin(urlsplit(allowed)):
            raise RefusedError(f"callback URL {address!r} is outside CALLBACK_ORIGIN {allowed!r}")
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return url._replace(netloc=f"{host}:{url.port}" if url.port else host, fragment="")
    except ValueError as broken:
        raise RefusedError(f"callback URL {address!r}: {broken}") from broken


def run() -> dict[str, str]:
    """Return the fields that say which run reports."""
    for id, attempt in (
        ("WORKFLOW_RUN_ID", "RUN_ATTEMPT"),
        ("GITHUB_RUN_ID", "GITHUB_RUN_ATTEMPT"),
        ("CI_PIPELINE_ID", "RUN_ATTEMPT"),
        ("BUILD_NUMBER", "RUN_ATTEMPT"),
    ):
        if re.fullmatch("[0-9]{1,20}", setting(id)):
            github = {"repository": setting("GITHUB_REPOSITORY")} if id == "GITHUB_RUN_ID" else {}
            return {"workflow_run_id": setting(id), "run_attempt": setting(attempt), **github}
    return {}


def callback(**fields: object) -> bytes:
    """Return the body of a callback that happens now."""
    job = {"job_id": setting("JOB_ID"), "pipeline": setting("PIPELINE")}
    given = {**job, **fields, **run(), "sent_at": round(time.time(), 3)}
    return json.dumps({name: value for name, value in given.items() if value not in ("", None)}).encode()


def reason() -> str:
    """Return the end of the error, without what only a terminal understands."""
    text = setting("ERROR")
    if setting("ERROR_FILE"):
        try:
            with Path(setting("ERROR_FILE")).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8 * LONGEST_ERROR))
                text = file.read().decode(errors="replace").strip()
        except FileNotFoundError:
            pass  # what would have written it has not begun
        except OSError as problem:
            text = text or f"The reason could not be read: {problem}"
    return INVISIBLE.sub("", text)[-LONGEST_ERROR:]


def described(last_step: str) -> dict[str, object]:
    """Return the fields that the environment gives, {} where there is nothing to report."""
    given = setting("STATUS").lower() or ("in_progress" if setting("STEP") else "")
    status = "failed" if given in CANCELLED else WORDS.get(given, given)
    fields: dict[str, object] = {name: setting(name.upper()) for name in FIELDS}
    if status == "failed":
        failed_step = setting("FAILED_STEP") or setting("STEP") or last_step
        fields["failed_step"] = "cancelled" if given in CANCELLED else failed_step
        fields["error"] = reason()
        fields["server_left"] = {"true": True, "false": False}.get(setting("SERVER_LEFT").lower())
    if status == "running" and len(setting("RESULT_URL")) <= LONGEST_ADDRESS:
        fields["result_url"] = setting("RESULT_URL")
    for name, longest in LONGEST.items():
        text = " ".join(str(fields.get(name, "")).split())
        fields[name] = text if len(text) <= longest else text[: longest - 1] + "…"
    if status:
        return {"status": status, **fields}
    return {"type": "heartbeat", **fields} if fields["note"] or fields["subject"] else {}


def secret(piped: bool = False) -> bytes:
    """Return the key that signs, from a pipe if it may come by one."""
    key = setting("CALLBACK_SECRET").encode()
    if piped and not key and not sys.stdin.isatty():
        key = sys.stdin.buffer.read().strip()
    if not key:
        raise RefusedError("CALLBACK_SECRET is empty: is the repository secret set?")
    return key


def goes_direct(host: str) -> bool:
    """Say whether NO_PROXY names a host: itself, its domain, its network, or "*"."""
    for entry in re.split(r"[\s,]+", setting("no_proxy") or setting("NO_PROXY")):
        name = entry.strip(".").lower()
        try:
            if entry == "*" or ip_address(host) in ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:  # one of the two is a name
            if name and (host == name or host.endswith("." + name)):
                return True
    return False


def proxies_for(url: SplitResult) -> dict[str, str]:
    """Return the proxy that curl would take, {} for the direct way.

    https://everything.curl.dev/usingcurl/proxies/env
    """
    own = ["https_proxy", "HTTPS_PROXY"] if url.scheme == "https" else ["http_proxy"]
    address = next(filter(None, map(setting, [*own, "all_proxy", "ALL_PROXY"])), "")
    if not address or goes_direct(url.hostname or ""):
        return {}
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise RefusedError("this machine's proxy is not an http:// address, the only kind known here")
    return {url.scheme: proxy.geturl() if proxy.port else f"http://{proxy.netloc}:{PROXY_PORT}"}


class NoRedirect(HTTPRedirectHandler):
    """Leaves a redirect as the answer that it is."""

    def redirect_request(self, *_: object) -> None:
        """Return no request to follow."""


def post(url: SplitResult, body: bytes, key: bytes) -> tuple[int, bytes]:
    """Send a body; return the status and the beginning of the answer."""
    signature = "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
    headers = {"Content-Type": "application/json", "User-Agent": "report-step", "X-Signature": signature}
    request = Request(url.geturl(), body, headers)  # noqa: S310  receiver() lets only http(s) pass
    try:
        with build_opener(ProxyHandler(proxies_for(url)), NoRedirect).open(
            request, timeout=TRY_SECONDS
        ) as answer:
            return answer.status, answer.read(LONGEST_ANSWER)
    except HTTPError as refused:
        with refused:
            return refused.code, refused.read(300)


def attempt(url: SplitResult, body: bytes, key: bytes, limit: float) -> str:
    """Send a body in at most `limit` seconds; return the link to the page, or raise DeliveryError.

    A thread keeps the bound: a socket's timeout covers neither a name lookup nor an
    answer that trickles in byte by byte.
    """
    outcome: list[tuple[int, bytes] | Exception] = []

    def work() -> None:
        try:
            outcome.append(post(url, body, key))
        except (OSError, HTTPException, ValueError, RefusedError) as problem:
            outcome.append(problem)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    if not outcome:
        raise DeliveryError(f"{url.netloc} gave no answer in {limit:.0f} s")
    result = outcome[0]
    if isinstance(result, (RefusedError, ValueError)):  # InvalidURL is a ValueError, too
        raise RefusedError(str(result))
    if isinstance(result, Exception):
        raise DeliveryError(f"{url.netloc}: {getattr(result, 'reason', result) or type(result).__name__}")
    status, said = result
    if status == 200:
        return link_in(url, said)
    text = f"{url.netloc} answered {status}: {said.decode(errors='replace')}"
    raise (RefusedError if 300 <= status < 500 and status not in (408, 429) else DeliveryError)(text)


def link_in(url: SplitResult, said: bytes) -> str:
    """Return the progress page's address in an answer, "" where there is none."""
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or answer.get("received") is not True:
        raise StrangerError(f"{url.netloc} answered 200, but not as Milepost does: is the address right?")
    link = str(answer.get("progress_url", ""))
    return link if len(link) <= LONGEST_ADDRESS and LINK.fullmatch(link) else ""


def deliver(body: bytes, key: bytes, patience: float, insist: bool = False) -> str:
    """Try with growing pauses until delivered, refused or out of patience (seconds).

    `insist` tries again where a stranger answered: an end is worth it. Returns the link.
    """
    url, deadline, pause = receiver(), time.monotonic() + patience, seconds("PAUSE_SECONDS", 1)
    while True:
        try:
            return attempt(url, body, key, min(TRY_SECONDS, deadline - time.monotonic()))
        except DeliveryError as problem:
            final = isinstance(problem, RefusedError) or (isinstance(problem, StrangerError) and not insist)
            if final or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        pause *= 2


def own_file(kind: str) -> Path | None:
    """Return a file that the calls of this run share for this job; None where RUNNER_TEMP is not set."""
    folder, who = setting("RUNNER_TEMP"), {**run(), "job_id": setting("JOB_ID")}
    name = hashlib.sha256(json.dumps(who).encode()).hexdigest()[:16]
    return Path(folder).absolute() / f"report-step-{name}.{kind}" if folder else None


def remembered() -> dict[str, str]:
    """Return what earlier calls of this run noted: their last `step`, and the `link` that they told."""
    file = own_file("json")
    try:
        notes = json.loads(file.read_bytes()) if file else {}
    except (OSError, ValueError):
        notes = {}
    return notes if isinstance(notes, dict) else {}


def remember(**notes: str) -> None:
    """Note something for later calls of this run."""
    file = own_file("json")
    if file:
        with suppress(OSError):
            file.write_text(json.dumps({**remembered(), **notes}))


def is_public() -> bool:
    """Say whether strangers read this run's log.

    https://docs.github.com/en/webhooks/webhook-events-and-payloads: repository.visibility, .private
    """
    try:
        repository = json.loads(Path(setting("GITHUB_EVENT_PATH")).read_bytes())["repository"]
        visibility, private = repository.get("visibility"), repository.get("private")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        visibility = private = None
    return "public" in (visibility, setting("CI_PROJECT_VISIBILITY")) or private is False


def append(variable: str, line: str) -> None:
    """Add a line to a file that the runner reads after the step, where there is one."""
    if setting(variable):
        with suppress(OSError), Path(setting(variable)).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def tell(link: str) -> None:
    """Hand on the link: always as an output, and once in the run, for those who may know it."""
    github, public = setting("GITHUB_ACTIONS") == "true", is_public()
    if github and public:
        command("add-mask", link)  # nor may a later step show it by mistake
    append("GITHUB_OUTPUT", f"progress-url={link}")
    wish = setting("SUMMARY") or ("yes" if setting("GITHUB_STEP_SUMMARY") else "no")
    if public or wish.lower() in NO or remembered().get("link") == link:
        return
    append("GITHUB_STEP_SUMMARY", f"Live progress: <{link}>")
    if github:
        command("notice title=Milepost", f"Live progress: {link}")
    else:
        say(f"Live progress: {link}")
    remember(link=link)


def report(fields: dict[str, object]) -> None:
    """Send one callback, and say what became of it."""
    status, step = fields.get("status", "note"), fields["step"]
    what = step if step and status == "provisioning" else status
    ends = status in ("running", "failed")
    try:
        if step:
            remember(step=str(step))
        patience = seconds("RETRY_SECONDS", END_SECONDS if ends else TRY_SECONDS)
        link = deliver(callback(**fields), secret(), patience, insist=ends)
    except DeliveryError as problem:
        warn(what, problem)
        return
    say(f"Reported {what}")
    if link:
        tell(link)


def is_wanted(own: object) -> bool:
    """Say whether the run that asked for heartbeats is still there; `own` is what file_id() was."""
    runner = setting("RUNNER_PID")
    try:
        if runner.isdecimal() and os.name == "posix":
            os.kill(int(runner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    return file_id() == own


def file_id() -> str | None:
    """Identify HEARTBEAT_FILE: another file of its name belongs to a later heartbeat."""
    file = setting("HEARTBEAT_FILE")
    try:
        return str(Path(file).stat().st_ino) if file else "none is needed"
    except OSError:
        return None


def heartbeat() -> None:
    """Send heartbeats until nobody wants them; one warning for each outage."""
    key, own = secret(piped=True), setting("HEARTBEAT_FILE_ID") or file_id()
    interval = seconds("HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    start, beats, heard = time.monotonic(), 1, True
    while own and is_wanted(own) and time.monotonic() < start + LONGEST_JOB_SECONDS:
        if time.monotonic() < start + beats * interval:
            time.sleep(min(1.0, interval))
            continue
        beats += 1
        try:
            deliver(callback(type="heartbeat"), key, TRY_SECONDS)
            say("Reported heartbeat")
            heard = True
        except DeliveryError as problem:
            if heard:
                warn("heartbeat", problem)
            heard = False


def start_heartbeat() -> None:
    """Send heartbeats from a process of their own, which gets the key by a pipe alone."""
    file, key = own_file("log"), secret()
    if not file:
        raise RefusedError("RUNNER_TEMP names no folder, in which the heartbeat could keep its log")
    stop_heartbeat()
    caller = setting("RUNNER_PID") or str(os.getppid())
    environment = {**os.environ, "HEARTBEAT_FILE": str(file), "RUNNER_PID": caller}
    environment.pop("CALLBACK_SECRET", None)
    command = [sys.executable, "-I", str(Path(__file__).absolute()), "heartbeat"]
    with file.open("xb") as log:
        # From here, as a later start may have replaced the file before this heartbeat has begun.
        environment["HEARTBEAT_FILE_ID"] = str(os.fstat(log.fileno()).st_ino)
        pipe, own_end = os.pipe()
        os.write(own_end, key)
        os.close(own_end)
        subprocess.Popen(command, stdin=pipe, stdout=log, stderr=log, env=environment, start_new_session=True)
        os.close(pipe)


def stop_heartbeat() -> None:
    """End the heartbeat, if there is one, and show its log."""
    file = own_file("log")
    if file and file.exists():
        with suppress(OSError):  # Windows keeps what is open; the heartbeat then ends with the job
            say(file.read_text(errors="replace").rstrip("\n"))
            file.unlink()


def say(text: str) -> None:
    """Print a line of the run's log, whatever encoding this system prefers."""
    with suppress(OSError):
        sys.stdout.buffer.write(f"{text}\n".encode(errors="replace"))
        sys.stdout.buffer.flush()


def command(name: str, text: str) -> None:
    """Print a command to the runner on one line, whatever a receiver put into it.

    https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    """
    for character, escape in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(character, escape)
    say(f"::{name}::{text}")


def warn(what: object, problem: BaseException) -> None:
    """Say in the run's log what did not arrive."""
    command(
        "warning title=report-step",
        f"Milepost did not get the {what} callback: {str(problem) or 'interrupted'}",
    )


def main() -> None:
    """Report, and let nothing that goes wrong with it reach the run."""
    beat, fields = setting("HEARTBEAT"), {}
    try:
        if sys.argv[1:] == ["heartbeat"]:
            return heartbeat()
        if beat not in ("", "start", "stop"):
            raise RefusedError(f"HEARTBEAT is neither start nor stop: {beat!r}")
        if beat == "stop":
            stop_heartbeat()
        fields = described(remembered().get("step", ""))
        if fields:
            report(fields)
        elif not beat:
            raise RefusedError("there is no STATUS, no STEP and no NOTE to report")
        if beat == "start":
            start_heartbeat()
    except (Exception, KeyboardInterrupt) as problem:  # a mistake in here must not fail a run either
        warn("heartbeat" if beat or not fields else fields.get("status", "note"), problem)
    return None


if __name__ == "__main__":
    main()
    os._exit(0)  # at once: an ordinary exit beside a thread that still waits for TLS was seen to crash
