"""What one transaction does with the callbacks that arrived."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from time import time
from typing import Any

from webapp.rules import progress
from webapp.rules.attempt import Attempt, Report
from webapp.rules.pipeline import BUILT_IN
from webapp.rules.report import BadField
from webapp.storage import bulk
from webapp.storage import jobs as reads
from webapp.storage.tables import callbacks, marks
from webapp.storage.transaction import Transaction

PROBE = Report(" probe", "provisioning", 0.0)  # no job can have this id


def receive(transaction: Transaction, reports: Sequence[Report]) -> list[tuple[bool, int]]:
    """Take callbacks in, in this order; of each, whether it is a duplicate, and its job's revoked links."""
    _find(transaction, reports)
    kept: set[int] = set()
    for wave in _waves(reports):
        placed = {i: _place(transaction, reports[i]) for i in wave if reports[i].job_id in transaction.known}
        stored = _keep(transaction, [(reports[i], attempt) for i, attempt in placed.items()])
        moves = []
        for i, attempt in placed.items():
            if attempt.job_id in stored:
                kept.add(i)
                pipeline = transaction.pipeline_of(attempt)
                moves.append((attempt, progress.receive(attempt, reports[i], pipeline)))
        transaction.save(moves)
    return [(i not in kept, transaction.links.get(r.job_id, 0)) for i, r in enumerate(reports)]


def try_to_store(transaction: Transaction) -> None:
    """Store a callback, undo that, and leave a mark, so that there is something to commit."""
    connection = transaction.connection
    with connection.begin_nested() as savepoint:
        receive(Transaction(connection, transaction.settings), [PROBE])
        savepoint.rollback()
    mark = transaction.insert(marks).values(name="health", at=time())
    connection.execute(mark.on_conflict_do_update(index_elements=["name"], set_={"at": mark.excluded.at}))


def _find(transaction: Transaction, reports: Sequence[Report]) -> None:
    """Lock the reports' jobs; unknown ones are registered, but not those that were deleted lately."""
    first = {report.job_id: report for report in reversed(reports)}
    found = transaction.find(first)
    missing = first.keys() - found.keys() - transaction.deleted
    if not missing:
        return
    new = transaction.register([_as_job(transaction, first[id]) for id in sorted(missing)])
    if new != missing:
        transaction.find(missing - new)  # registered by another process, meanwhile
    for id in new:
        report = first[id]
        transaction.known[id] = Attempt(id, 1, report.arrived_at, report.pipeline or BUILT_IN)


def _as_job(transaction: Transaction, report: Report) -> dict[str, Any]:
    pipeline = report.pipeline or BUILT_IN
    if pipeline not in transaction.settings.pipelines:
        known = ", ".join(sorted(transaction.settings.pipelines))
        raise BadField(f"pipeline: {pipeline} is not one of {known}")
    return {"job_id": report.job_id, "pipeline": pipeline, "created_at": report.arrived_at}


def _place(transaction: Transaction, report: Report) -> Attempt:
    """`progress.place`, with the older attempts at hand where they matter."""
    current = transaction.known[report.job_id]
    known = [current]
    if report.run is not None and report.run != current.run and current.change:
        known = reads.attempts_of(transaction.connection, report.job_id)
    return progress.place(known, report.run, report.sent_at, report.arrived_at)


def _keep(transaction: Transaction, placed: Iterable[tuple[Report, Attempt]]) -> set[str]:
    """Add one callback for each job; the jobs whose callback was not a repeat."""
    columns = ("job_id", "milestone", "arrived_at", "sent_at", "body")
    rows = [
        {name: getattr(report, name) for name in columns} | {"number": attempt.number}
        for report, attempt in placed
        if not progress.is_stale(attempt, report)
    ]
    return bulk.insert_new(transaction.connection, callbacks, rows) if rows else set()


def _waves(reports: Sequence[Report]) -> Iterable[list[int]]:
    """The places of the reports, parted so that no part has two of one job."""
    waves: dict[int, list[int]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for i, report in enumerate(reports):
        waves[seen[report.job_id]].append(i)
        seen[report.job_id] += 1
    return waves.values()
