"""A database that has grown: bulk inserts straight into the tables, as Milepost would have left them."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sqlalchemy import create_engine, insert

from tests.support.load import MILESTONES
from webapp.rules import progress
from webapp.rules.attempt import Attempt, Report
from webapp.rules.pipeline import BUILT_IN, load
from webapp.storage.tables import attempts, callbacks, departed, jobs, notifications

STEPS = load(None)[BUILT_IN]
BATCH = 2000  # jobs
CALLBACKS_EACH = 10  # six milestones, four heartbeats


def fill(database_url: str, count: int) -> int:
    """Add `count` jobs that have ended, with ten callbacks each; how many callbacks that is."""
    url = database_url.replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url)  # none of Milepost's bounds
    started_at = time.time() - 90 * 86_400
    for first in range(0, count, BATCH):
        rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for number in range(first, min(first + BATCH, count)):
            for table, row in _job(number, started_at + number * 60):
                rows[table].append(row)
        with engine.begin() as connection:
            for table, of_one in rows.items():
                connection.execute(insert(table), of_one)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("VACUUM ANALYZE")
    engine.dispose()
    return count * CALLBACKS_EACH


def _job(number: int, at: float) -> Iterator[tuple[Any, dict[str, Any]]]:
    job_id = f"grown-{number}"
    attempt = Attempt(
        job_id, 1, at, BUILT_IN, change=number + 1, run_id=str(10**10 + number), run_attempt="1"
    )
    names = [MILESTONES[0], None, MILESTONES[1], None, *MILESTONES[2:4], None, MILESTONES[4], None, "running"]
    for minute, name in enumerate(names):
        sent_at = at + 6 * minute
        said = {"job_id": job_id, "status": "provisioning", "step": name, "workflow_run_id": attempt.run_id}
        report = Report(job_id, name, sent_at + 0.2, sent_at, attempt.run, body=json.dumps(said))
        attempt = progress.receive(attempt, report, STEPS)
        kept = {"job_id": job_id, "number": 1, "milestone": name, "body": report.body}
        yield callbacks, kept | {"arrived_at": report.arrived_at, "sent_at": sent_at}
    told = {"job_id": job_id, "number": 1, "event": "done", "happened_at": at, "sent_at": at, "tries": 1}
    yield notifications, told
    yield departed, {"job_id": f"gone-{number}", "link": 0, "change": number + 1}
    yield attempts, attempt._asdict()
    yield (
        jobs,
        {
            "job_id": job_id,
            "agent_id": f"agent-{number % 5000}",
            "region": "fsn1",
            "created_at": at,
            "attempt": 1,
            "status": attempt.status,
            "link": 0,
        },
    )
