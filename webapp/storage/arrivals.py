"""What one transaction does with the callbacks that arrived."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from webapp.rules import progress
from webapp.rules.attempt import Attempt, Report
from webapp.rules.pipeline import BUILT_IN
from webapp.rules.report import BadField
from webapp.storage import jobs as reads
from webapp.storage.tables import callbacks
from webapp.storage.transaction import Move, Transaction


class UnknownPipeline(BadField):
    """A callback would register a job of a pipeline that this server does not have."""


class Receipt(NamedTuple):
    """What became of a callback; `link` counts the revoked links of its job."""

    duplicate: bool
    link: int


def receive(transaction: Transaction, reports: Sequence[Report]) -> list[Receipt]:
    """Take callbacks in, in this order."""
    current = _current(transaction, reports)
    kept: set[int] = set()
    for wave in _waves(reports):
        known = [(index, report) for index, report in wave if report.job_id in current]
        placed = {report.job_id: _place(transaction, current[report.job_id], report) for _, report in known}
        stored = _keep(transaction, [report for _, report in known], placed)
        moves = []
        for index, report in known:
            if report.job_id in stored:
                kept.add(index)
                target = placed[report.job_id]
                after = progress.receive(target, report, transaction.pipeline_of(target))
                moves.append(Move(current[report.job_id], target, after))
        current |= {after.job_id: after for after in transaction.save(moves)}
    return [Receipt(i not in kept, transaction.links.get(r.job_id, 0)) for i, r in enumerate(reports)]


def _current(transaction: Transaction, reports: Sequence[Report]) -> dict[str, Attempt]:
    """The current attempts of the reports' jobs, locked; unknown jobs are registered but deleted ones."""
    first: dict[str, Report] = {}
    for report in reports:
        first.setdefault(report.job_id, report)
    found = transaction.find(first)
    missing = first.keys() - found.keys()
    if missing:
        missing -= transaction.deleted_lately(missing)
    if missing:
        transaction.register([_as_job(transaction, first[id]) for id in sorted(missing)])
        found |= transaction.find(missing)  # registered by another process, meanwhile
        for id in missing - found.keys():
            found[id] = Attempt(id, 1, first[id].arrived_at, first[id].pipeline or BUILT_IN)
    return found


def _as_job(transaction: Transaction, report: Report) -> dict[str, Any]:
    pipeline = report.pipeline or BUILT_IN
    if pipeline not in transaction.pipelines:
        raise UnknownPipeline(
            f"pipeline: {pipeline} is not one of {', '.join(sorted(transaction.pipelines))}"
        )
    return {"job_id": report.job_id, "pipeline": pipeline, "created_at": report.arrived_at}


def _place(transaction: Transaction, current: Attempt, report: Report) -> Attempt:
    """`progress.place`, with the older attempts at hand where they matter."""
    known = [current]
    if report.run is not None and report.run != current.run and current.change:
        known = reads.attempts_of(transaction.connection, report.job_id)
    return progress.place(known, report.run, report.sent_at, report.arrived_at)


def _keep(transaction: Transaction, reports: Iterable[Report], placed: dict[str, Attempt]) -> set[str]:
    """Add one callback for each job; the jobs whose callback was not a repeat."""
    rows = [
        {
            "job_id": report.job_id,
            "number": placed[report.job_id].number,
            "milestone": report.milestone,
            "arrived_at": report.arrived_at,
            "sent_at": report.sent_at,
            "body": report.body,
        }
        for report in reports
        if not progress.is_stale(placed[report.job_id], report)
    ]
    if not rows:
        return set()
    statement = transaction.insert(callbacks).on_conflict_do_nothing().returning(callbacks.c.job_id)
    return {row.job_id for row in transaction.connection.execute(statement, rows)}


def _waves(reports: Sequence[Report]) -> list[list[tuple[int, Report]]]:
    """The reports with their places, parted so that no part has two of one job."""
    waves: list[list[tuple[int, Report]]] = []
    depth: Counter[str] = Counter()
    for index, report in enumerate(reports):
        if depth[report.job_id] == len(waves):
            waves.append([])
        waves[depth[report.job_id]].append((index, report))
        depth[report.job_id] += 1
    return waves
