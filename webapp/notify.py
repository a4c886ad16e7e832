"""Tells the operator what happened: in the log at once, and by NOTIFY_URLS in a greenlet of its own."""

from collections import Counter
from collections.abc import Callable, Sequence
from time import time
from typing import Any

import gevent
from gevent.event import Event
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from webapp import logs
from webapp.page.view import View
from webapp.page.words import headline, moment, report
from webapp.parts import Parts
from webapp.rules.events import Transition
from webapp.storage.database import reason
from webapp.storage.notifications import PAUSES, claim, note_silence, settle
from webapp.storage.transaction import Transaction

MOST_OFTEN = 5.0  # seconds between two looks
GATHER_FOR = 1.0  # seconds in which what happens together is gathered
LONGEST_SENDING = 31.0  # seconds for one service
MOST_NAMED = 30  # jobs in one message
TITLES = {
    "done": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "lost": "Lost contact",
    "recovered": "Heard of again",
}
KINDS = {"done": "success", "recovered": "success", "cancelled": "warning"}
happened = Event()  # something has to be sent


def tell(news: Sequence[Transition]) -> None:
    """Log what a transaction brought, and wake the sender."""
    for each in news:
        logs.event(each.name, job=each.job_id, attempt=each.number)
    happened.set()


def start(ours: Parts) -> None:
    """The greenlets of a serving process."""
    pause = min(ours.settings.quiet_after / 4, MOST_OFTEN)
    gevent.spawn(_for_ever, lambda: gevent.sleep(pause), lambda: _listen(ours))
    if ours.settings.notify_urls:
        gevent.spawn(_for_ever, _wait, lambda: _send_due(ours))


def _for_ever(wait: Callable[[], object], act: Callable[[], object]) -> None:
    while True:
        wait()
        try:
            act()
        except SQLAlchemyError as error:
            logs.event("the database did not take what should be told", cause=reason(error))
        except Exception:  # whatever it was, a greenlet that ended would tell nothing more
            logs.log.exception("telling failed")


def _wait() -> None:
    if happened.wait(MOST_OFTEN):
        gevent.sleep(GATHER_FOR)
    happened.clear()


def _listen(ours: Parts) -> None:
    ours.writer.run(lambda transaction: note_silence(transaction, ours.views.clock(transaction.connection)))


def _send_due(ours: Parts) -> None:
    """One message after the other, as long as any is due."""
    from webapp.services import read_services, send

    services = read_services(ours.settings.notify_urls)
    while message := ours.writer.run(lambda transaction: _next(ours, transaction)):
        rows, title, body = message
        left = {line.partition(": ")[0] for line in (rows[0].problem or "").splitlines()}
        problems = send(services, title, body, KINDS.get(rows[0].event, "failure"), left)
        problem = "\n".join(f"{name}: {why}" for name, why in problems.items()) or None
        ours.writer.run(lambda transaction: settle(transaction, rows, time(), problem))  # noqa: B023
        told = {"job": rows[0].job_id, "told": rows[0].event, "jobs": len(rows)}
        if problem:
            told |= {"cause": problem, "given_up": rows[0].tries >= len(PAUSES)}
        logs.write("warning" if problem else "info", "not notified" if problem else "notified", told)


def _next(ours: Parts, transaction: Transaction) -> tuple[Sequence[Row[Any]], str, str] | None:
    """What is sent next: its rows, its title, its text."""
    rows = claim(transaction, time(), LONGEST_SENDING * (len(ours.settings.notify_urls) + 1))
    views = [ours.views.find(transaction.connection, row.job_id, row.number) for row in rows[:MOST_NAMED]]
    named = [(TITLES[row.event], view) for row, view in zip(rows, views, strict=False) if view]
    if len(rows) == 1:
        [(event, view)] = named
        return rows, f"{event}: {view.name}", _about(ours, view, rows[0].happened_at)
    counts = Counter(TITLES[row.event].lower() for row in rows)
    title = f"{len(rows)} jobs: {', '.join(f'{n} {name}' for name, n in counts.items())}"
    lines = [f"{event}: {view.name} {_page_of(ours, view)}" for event, view in named]
    if len(rows) > len(named):
        lines.append(f"and {len(rows) - len(named)} more: {ours.settings.public_url}/")
    return (rows, title, "\n".join(lines)) if rows else None


def _about(ours: Parts, view: View, at: float) -> str:
    links = f"Progress: {ours.progress_url(view.job_id, view.link)}\nMore: {_page_of(ours, view)}"
    return f"{headline(view)}\n{report(view)}\nNoticed: {moment(at)}\n{links}"


def _page_of(ours: Parts, view: View) -> str:
    return f"{ours.settings.public_url}/jobs/{view.job_id}"


def test(ours: Parts) -> dict[str, str]:
    """Send a message to every service; what went wrong, by the services' names, "" where nothing did."""
    from webapp.services import read_services, send

    services = read_services(ours.settings.notify_urls)
    problems = send(services, "Test", f"Milepost at {ours.settings.public_url} can reach you here.", "info")
    return {name: problems.get(name, "") for name in services}
