"""What one transaction writes, and which jobs it changed."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from operator import ne
from time import time
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, and_, func, or_, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from webapp.config import Settings
from webapp.rules.attempt import Attempt, Transition, transitions
from webapp.rules.pipeline import Pipeline
from webapp.rules.progress import Usual, expect
from webapp.storage import bulk
from webapp.storage import jobs as reads
from webapp.storage.tables import attempts, callbacks, definitions, departed, jobs, notifications

CHANNEL = "milepost"
NOTIFICATION_JOBS = 80  # times an id of 64 and a number: below PostgreSQL's 8,000 bytes
DELETED_FOR = 86_400.0  # seconds in which callbacks of a deleted job register nothing
LONGEST_ASKED = 7 * 86_400.0  # seconds of silence after which GitHub is not asked any more
ASKED_AT_ONCE = 10  # attempts
ASKED_AFTER = 60.0  # seconds after a dispatch of which nothing came
UNSEEN = {"first_sent_at", "heartbeat_sent_at", "looked_at"}  # fields that no page shows


class Change(NamedTuple):
    """A job changed; where they are at hand, its columns and its current attempt as it is now."""

    number: int
    job: Row[Any] | None = None
    attempt: Attempt | None = None


Changes = dict[str, Change]  # by job id
ANEW = Change(sys.maxsize)  # newer than any real change: forces a fresh read


def _news(before: Attempt, after: Attempt) -> dict[str, Any]:
    """The fields that differ: compared in C, for there are many."""
    return dict(compress(zip(after._fields, after, strict=True), map(ne, after, before)))


class Transaction:
    """A connection inside a transaction, and the changes that the streams are told of after it."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self.connection = connection
        self.settings = settings
        self.changes: Changes = {}
        self.transitions: list[Transition] = []
        self.known: dict[str, Attempt] = {}  # the current attempts of the jobs that were found or saved
        self.links: dict[str, int] = {}  # how many links of a job were revoked
        self.deleted: set[str] = set()  # by the operator, less than DELETED_FOR ago
        self._jobs: dict[str, Row[Any]] = {}
        self._defined: set[str] = set()
        self._usual: dict[str, Usual | None] = {}
        self._newest: int | None = None  # the number of the last change, once it is read
        self._is_postgresql = connection.dialect.name == "postgresql"
        self.insert = postgresql.insert if self._is_postgresql else sqlite.insert

    def find(self, job_ids: Iterable[str]) -> dict[str, Attempt]:
        """The current attempts of the jobs that there are, locked; of others, what is left of them."""
        ids = sorted(job_ids)
        found = self._locked(ids)
        if self._is_postgresql and (missing := [id for id in ids if id not in found]):
            found |= self._locked(missing)  # waited for: another attempt may be the current one now
        self._jobs |= found
        self.links |= {job_id: row.link for job_id, row in found.items()}
        current = {job_id: reads.attempt_from(row) for job_id, row in found.items()}
        self.known |= current
        if missing := [id for id in ids if id not in found]:
            left = self.connection.execute(select(departed).where(departed.c.job_id.in_(missing))).all()
            self.links |= {row.job_id: row.link for row in left}
            lately = time() - DELETED_FOR
            self.deleted |= {row.job_id for row in left if (row.deleted_at or 0) > lately}
        return current

    def _locked(self, ids: Sequence[str]) -> dict[str, Row[Any]]:
        found = {row.job_id: row for row in self.connection.execute(reads.LOCKED, {"ids": ids})}
        if self._newest is None and found:
            self._newest = max(next(iter(found.values()))[-2:])
        return found

    def current(self, job_id: str) -> Attempt | None:
        """A job's current attempt, locked; None for an unknown job."""
        return self.find([job_id]).get(job_id)

    def job(self, job_id: str) -> Row[Any]:
        """The row of a job that there is."""
        return self.connection.execute(select(jobs).where(jobs.c.job_id == job_id)).one()

    def unfinished_of_agent(self, agent_id: str, but: str) -> list[Attempt]:
        """The current attempts of the agent's jobs that are not over, but of one job.

        Until the commit nobody else gets past this for that agent.
        """
        if self._is_postgresql:  # on SQLite nobody else writes
            self.connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(agent_id, 0))))
        unfinished = (jobs.c.agent_id == agent_id) & jobs.c.status.in_(reads.UNFINISHED)
        found = reads.current_attempts().where(unfinished, jobs.c.job_id != but)
        return [reads.attempt_from(row) for row in self.connection.execute(found)]

    def pipeline_of(self, attempt: Attempt) -> Pipeline:
        """The steps with which an attempt was opened, or will be: the file's as it is now, if it is there."""
        if attempt.change:
            return reads.pipeline_of(self.connection, attempt.definition)
        if pipeline := self.settings.pipelines.get(attempt.pipeline):
            return pipeline
        known = reads.attempts_of(self.connection, attempt.job_id)
        return reads.pipeline_of(self.connection, known[-1].definition if known else None)

    def register(self, rows: Sequence[dict[str, Any]]) -> set[str]:
        """Insert jobs that were not found (`job_id`, `agent_id`, `region`, `pipeline`, `created_at`).

        Returns the ids that were inserted: a job that another process registered meanwhile is left alone.
        """
        first = {"attempt": 1, "status": "queued"}
        fresh = [first | {"link": self.links.get(row["job_id"], 0)} | row for row in rows]
        return bulk.insert_new(self.connection, jobs, fresh)

    def save(self, moves: Iterable[tuple[Attempt, Attempt]]) -> None:
        """Write attempts: each as it was found or, without a `change`, opened; and as it is now."""
        new: list[dict[str, Any]] = []
        changed: dict[tuple[str, ...], list[Attempt]] = defaultdict(list)
        turned: list[dict[str, Any]] = []
        for before, now in moves:
            current, after = self.known.get(now.job_id, before), self._completed(before, now)
            is_new, is_current = not before.change, after.number >= current.number
            news = {} if is_new else _news(current if after.number == current.number else before, after)
            if is_new or (is_current and not news.keys() <= UNSEEN):
                news["change"] = change = self._next(current)
                after = after._replace(change=change)
                if is_current:
                    self.changes[after.job_id] = Change(change, self._jobs.get(after.job_id), after)
            if is_current:
                self.known[after.job_id] = after
                self._compare(before, after)
                if (after.number, after.status) != (current.number, current.status):
                    turned.append({"job_id": after.job_id, "attempt": after.number, "status": after.status})
            if is_new:
                new.append(after._asdict())
            elif news:
                changed[tuple(news)].append(after)
        if new:
            bulk.insert(self.connection, attempts, new)
        if self._is_postgresql and changed:  # one statement, not up to eight of them
            changed = {tuple(sorted({*chain(*changed)})): [*chain(*changed.values())]}
        for names, moved in changed.items():
            rows = [{name: getattr(each, name) for name in ("job_id", "number", *names)} for each in moved]
            bulk.update(self.connection, attempts, ("job_id", "number"), rows)
        if turned:
            bulk.update(self.connection, jobs, ("job_id",), turned)

    def _completed(self, before: Attempt, after: Attempt) -> Attempt:
        """A newly opened attempt with its steps; with its expected times where a step has begun or ended."""
        if before.change and (after.rank, after.end) == (before.rank, before.end):
            return after
        pipeline = self.pipeline_of(before)
        if not before.change:
            after = after._replace(definition=pipeline.hash)
            if pipeline.hash not in self._defined:
                self._defined.add(pipeline.hash)
                reads.known_pipelines[pipeline.hash] = pipeline
                row = {"hash": pipeline.hash, "content": pipeline.content}
                self.connection.execute(self.insert(definitions).on_conflict_do_nothing(), row)
        if not after.end:
            if after.pipeline not in self._usual:  # while nothing is usual, it is read each time
                self._usual[after.pipeline] = reads.usual(self.connection, after.pipeline)
            after = after._replace(usual=self._usual[after.pipeline])
        return expect(after, pipeline)

    def _compare(self, before: Attempt, after: Attempt) -> None:
        """Note what happened, if anything did; a callback that comes in time costs two comparisons."""
        silence = (after.heard_at or 0) - (before.heard_at or after.heard_at or 0)
        turned = (before.end, before.waiting_for) != (after.end, after.waiting_for)
        if turned or silence > self.settings.quiet_after:
            clock = reads.clock_now(self.connection, self.settings)
            self.happened(list(transitions(before, after, clock)))

    def happened(self, news: Sequence[Transition]) -> None:
        """Note transitions: for the log, and for the operator, who wants to be told of some.

        Of a recovery only where it was told that contact was lost, and no end came.
        """
        self.transitions += news
        told, row = self.settings.told, notifications.c
        chosen = [each for each in news if each.name in told]
        recovered = {each[:2]: each for each in news if each.name == "recovered"}
        if recovered and not chosen and "lost" in told:
            is_one = tuple_(row.job_id, row.number).in_([*recovered])
            lost = select(row.job_id, row.number).where(row.event == "lost", is_one)
            chosen = [recovered[found.job_id, found.number] for found in self.connection.execute(lost)]
        rows = [
            {"job_id": job_id, "number": number, "event": name, "happened_at": at, "due_at": at, "tries": 0}
            for job_id, number, name, at in chosen
        ]
        if rows:
            self.connection.execute(self.insert(notifications).on_conflict_do_nothing(), rows)

    @property
    def _number(self) -> int:
        if self._newest is None:
            self._newest = reads.newest_change(self.connection)
        return self._newest + 1

    def _next(self, current: Attempt) -> int:
        """The number of a job's next change: on PostgreSQL, it may have taken ours before we had its lock."""
        return max(self._number, current.change + 1)

    def revoke(self, current: Attempt) -> None:
        """Give a job another link; its old one, and the streams that came by it, end."""
        job_id, change = current.job_id, self._next(current)
        self.connection.execute(jobs.update().where(jobs.c.job_id == job_id).values(link=jobs.c.link + 1))
        row = {"job_id": job_id, "number": current.number, "change": change}
        bulk.update(self.connection, attempts, ("job_id", "number"), [row])
        self.changes[job_id] = Change(change)

    def remove(self, job_ids: Sequence[str], deleted_at: float | None = None) -> None:
        """Delete jobs with all that is known of them; after `deleted_at` callbacks do not bring them back."""
        rows = self.connection.execute(select(jobs.c.job_id, jobs.c.link).where(jobs.c.job_id.in_(job_ids)))
        gone = {"change": self._number, "deleted_at": deleted_at}
        left = [gone | {"job_id": row.job_id, "link": row.link} for row in rows]
        if not left:
            return
        for table in (notifications, callbacks, attempts, jobs):
            self.connection.execute(table.delete().where(table.c.job_id.in_(job_ids)))
        statement = self.insert(departed)
        newer = {name: statement.excluded[name] for name in ("link", "change", "deleted_at")}
        self.connection.execute(statement.on_conflict_do_update(index_elements=["job_id"], set_=newer), left)
        self.changes |= {row["job_id"]: Change(self._number) for row in left}

    def claim_silent(self, now: float, quiet_after: float, bound: float) -> list[Attempt]:
        """Attempts whose run GitHub should be asked of, by nobody else within `quiet_after` seconds.

        They wait, are silent, were dispatched a minute ago without a callback, or have had no outcome of
        their dispatch for `bound` seconds.
        """
        until, row = now - quiet_after, attempts.c
        heard = row.heard_at > now - LONGEST_ASKED
        due = and_(
            row.end.is_(None),
            or_(
                heard & (row.waiting_for.is_not(None) | (row.heard_at < until)),
                heard & row.last_callback_at.is_(None) & (row.taken_at < now - ASKED_AFTER),
                row.heard_at.is_(None) & (row.asked_at < now - max(bound, quiet_after)),
            ),
            row.looked_at.is_(None) | (row.looked_at < until),
        )
        current = select(jobs.c.job_id).where(jobs.c.job_id == row.job_id, jobs.c.attempt == row.number)
        found = select(row.job_id, row.number).where(due, current.exists()).limit(ASKED_AT_ONCE)
        found = found.with_for_update(skip_locked=True)  # of what somebody changes now there is news
        claim = attempts.update().where(tuple_(row.job_id, row.number).in_(found), due)
        rows = self.connection.execute(claim.values(looked_at=now).returning(*attempts.c))
        return [reads.attempt_from(row) for row in rows]

    def notify(self) -> None:
        """Tell the other processes on PostgreSQL, with the commit; on SQLite they see for themselves."""
        lines = [f"{job_id} {change.number}" for job_id, change in self.changes.items()]
        for i in range(0, len(lines) if self._is_postgresql else 0, NOTIFICATION_JOBS):
            payload = "\n".join(lines[i : i + NOTIFICATION_JOBS])
            self.connection.execute(select(func.pg_notify(CHANNEL, payload)))
