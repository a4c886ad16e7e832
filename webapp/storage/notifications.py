"""What the operator is told of: a row for each event of an attempt, which waits until it is sent.

The primary key makes an event one of a kind over all processes and restarts. One process sends at a
time, as long as its mark says. A process that dies while it sends leaves its rows due again.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from gevent.event import Event
from sqlalchemy import Connection, Row, bindparam, func, select

from webapp import logs
from webapp.rules.attempt import Clock, Transition
from webapp.storage.jobs import ANY_CLOCK, current_attempts, is_in
from webapp.storage.tables import attempts, marks, notifications
from webapp.storage.transaction import Transaction

PAUSES = (5, 15, 40, 120, 300, 720, 1200, 1200)  # seconds after each try: an hour in all
MINUTE, PER_MINUTE, AT_ONCE = 60.0, 10, 500
_SILENT = {  # made once: made anew at each look they took half of it
    name: current_attempts().where(is_in(name, ANY_CLOCK), attempts.c.heard_at >= bindparam("since"))
    for name in ("quiet", "lost")
}
KEY = (notifications.c.job_id, notifications.c.number, notifications.c.event)
happened = Event()  # in this process, and something may have to be sent


def tell(news: Iterable[Transition]) -> None:
    """Log what a transaction brought, once it is committed, and wake the sender."""
    for each in news:
        logs.event(each.name, job=each.job_id, attempt=each.number)
        happened.set()


def note_silence(transaction: Transaction, clock: Clock) -> bool:
    """Note which attempts became quiet or lost since anybody looked, if any; the first look sees none."""
    for name, until in (("quiet", clock.quiet_before), ("lost", clock.lost_before)):
        since = _mark(transaction, name, until)
        if since > until:  # the clock was set back
            _set_mark(transaction, name, until)
        silent = transaction.connection.execute(_SILENT[name], clock._asdict() | {"since": since}).all()
        if silent:
            transaction.happened([Transition(row.job_id, row.number, name, clock.now) for row in silent])
            _set_mark(transaction, name, until)
    return bool(transaction.transitions)


def claim(transaction: Transaction, now: float, busy_for: float) -> Sequence[Row[Any]]:
    """Rows that are due and go as one message; none while another process sends, or a full minute passes.

    Until they are settled nobody else sends, for `busy_for` seconds at most.
    """
    connection = transaction.connection
    if _mark(transaction, "notifying", 0) > now:
        return []
    due = select(notifications).where(notifications.c.due_at <= now).order_by(notifications.c.happened_at)
    if not (rows := connection.execute(due.limit(AT_ONCE)).all()):
        return []
    lately = select(func.count()).where(notifications.c.sent_at > now - MINUTE)
    if len(rows) + connection.execute(lately).scalar_one() > PER_MINUTE:
        if _mark(transaction, "notified_of_many", 0) > now - MINUTE:
            return []
        _set_mark(transaction, "notified_of_many", now)
        rows = [row for row in rows if row.problem == rows[0].problem]  # the same services are left
    else:
        rows = rows[:1]
    _set_mark(transaction, "notifying", now + busy_for)
    return rows


def settle(transaction: Transaction, rows: Sequence[Row[Any]], now: float, problem: str | None) -> None:
    """Sent, or with a problem: then it is tried again, unless this was the last time."""
    for row in rows:
        pause = PAUSES[row.tries] if problem and row.tries < len(PAUSES) else None
        values = {"problem": problem, "sent_at": None if problem else now, "due_at": pause and now + pause}
        which = [column == getattr(row, column.name) for column in KEY]
        statement = notifications.update().where(*which).values(values | {"tries": row.tries + 1})
        transaction.connection.execute(statement)
    _set_mark(transaction, "notifying", 0)


def notifications_of(connection: Connection, job_id: str) -> Sequence[Row[Any]]:
    """Those of a job, oldest first."""
    which = select(notifications).where(notifications.c.job_id == job_id)
    return connection.execute(which.order_by(notifications.c.happened_at)).all()


def waiting_notifications(connection: Connection) -> int:
    """How many are not sent and not given up."""
    return connection.scalar(select(func.count()).where(notifications.c.due_at.is_not(None))) or 0


def _mark(transaction: Transaction, name: str, first: float) -> float:
    """The time of a mark, locked until the transaction ends; `first` where it is new."""
    connection = transaction.connection
    connection.execute(transaction.insert(marks).values(name=name, at=first).on_conflict_do_nothing())
    which = select(marks.c.at).where(marks.c.name == name).with_for_update()
    return float(connection.execute(which).scalar_one())


def _set_mark(transaction: Transaction, name: str, at: float) -> None:
    transaction.connection.execute(marks.update().where(marks.c.name == name).values(at=at))
