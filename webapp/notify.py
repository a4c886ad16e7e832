"""Tells the operator by NOTIFY_URLS what happened.

Apprise speaks to mail, Slack, ntfy and many more: https://appriseit.com.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from time import time
from typing import Any
from zlib import crc32

import gevent
from sqlalchemy import Row

from webapp import logs
from webapp.page.words import headline, moment, report
from webapp.parts import Parts
from webapp.storage.notifications import PAUSES, claim, happened, note_silence, settle
from webapp.storage.opening import keep_doing
from webapp.storage.transaction import ANEW, Transaction
from webapp.streams.frames import ANY

MOST_OFTEN = 5.0  # seconds between two looks
GATHER_FOR = 1.0  # seconds in which what happens together is gathered
SENT_WITHIN = 30  # seconds for all services, which are told side by side
BUSY_FOR = 60.0  # seconds after which another process sends, because this one has died
LONGEST = 200  # characters of a reason
MOST_NAMED = 30  # jobs in one message
TITLES = {"lost": "Lost contact", "recovered": "Heard of again"}  # in place of the event's own name
KINDS = {"done": "success", "recovered": "success", "cancelled": "warning"}


def start(ours: Parts) -> None:
    """Begin to look for silence and, where there is somebody to tell, for what has to be sent."""
    keep_doing("noting silence", _note_silence, ours)
    if ours.settings.services:
        keep_doing("telling the operator", _send_due, ours)


def _note_silence(ours: Parts) -> None:
    gevent.sleep(min(ours.settings.quiet_after / 4, MOST_OFTEN))
    if ours.writer.run(lambda begun: note_silence(begun, ours.views.clock(begun.connection))):
        ours.hub.wake({ANY: ANEW})  # the operator's lists


def _send_due(ours: Parts) -> None:
    """One message after the other, as long as any is due."""
    if happened.wait(MOST_OFTEN):
        gevent.sleep(GATHER_FOR)
    happened.clear()
    while message := ours.writer.run(partial(_next, ours)):
        rows, title, body = message
        left = {line.partition(": ")[0] for line in (rows[0].problem or "").splitlines()}
        told = send(ours.settings.services, title, body, KINDS.get(rows[0].event, "failure"), left)
        problem = "\n".join(f"{name}: {why}" for name, why in told.items() if why) or None
        ours.writer.run(partial(settle, rows=rows, now=time(), problem=problem))
        fields = {"job": rows[0].job_id, "told": rows[0].event, "jobs": len(rows)}
        if problem:
            fields |= {"cause": problem, "given_up": rows[0].tries >= len(PAUSES)}
        logs.write("warning" if problem else "info", "not notified" if problem else "notified", fields)


def _next(ours: Parts, transaction: Transaction) -> tuple[Sequence[Row[Any]], str, str] | None:
    """What is sent next: its rows, its title, its text."""
    rows, home = claim(transaction, time(), BUSY_FOR), ours.settings.public_url
    events, lines = [TITLES.get(row.event, row.event.capitalize()) for row in rows], []
    for event, row in zip(events[:MOST_NAMED], rows, strict=False):
        if view := ours.views.find(transaction.connection, row.job_id, row.number):
            title, page = f"{event}: {view.name}", f"{home}/jobs/{view.job_id}"
            lines.append(f"{title} {page}")
    if len(rows) == 1 and view:
        about = f"{headline(view)}\n{report(view)}\nNoticed: {moment(rows[0].happened_at)}"
        if view.error != view.attempt.error:  # what a watcher is not told
            about += f"\nGitHub's answer: {view.attempt.error}"
        return rows, title, f"{about}\nProgress: {ours.links.page(view.job_id, view.link)}\nMore: {page}"
    counts = ", ".join(f"{n} {event.lower()}" for event, n in Counter(events).items())
    if len(rows) > MOST_NAMED:
        lines.append(f"and {len(rows) - MOST_NAMED} more: {home}/")
    return (rows, f"{len(rows)} jobs: {counts}", "\n".join(lines)) if rows else None


def send(services: Sequence[Any], title: str, body: str, kind: str, only: Collection[str]) -> dict[str, str]:
    """Why each could not be told, "" where it was, by names without secrets; `only` those, if any is left."""
    from apprise import Apprise  # as in `config`

    left = [each for each in services if _name(each.service_name, each.url(privacy=True)) in only]
    to = Apprise(left or services)
    said = to.notify(body, title, notify_type=kind, body_format="text", timeout=SENT_WITHIN)
    told = {_name(each.name, each.url): "" if each else _last(each.logs()) for each in said}
    return told or {"Apprise": _last(said.logs())}


def _name(service: str, url: str) -> str:
    return f"{service} {crc32(url.encode()):08x}"  # Apprise's own id is the same for all of one account


def _last(logs: Iterable[Any]) -> str:
    return ["refused", *(str(entry.message) for entry in logs)][-1][:LONGEST]
