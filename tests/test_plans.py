"""No query on a hot path reads a whole table or sorts one: the plans of the very statements that run."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gevent
import pytest
from flask import Flask
from sqlalchemy import Connection, Engine, event
from werkzeug.test import TestResponse

from tests.support.databases import Databases
from tests.support.server import CALLBACKS, KEY, OPERATOR_TOKEN, new_job_id, sign, wait_until
from webapp.app import create_app
from webapp.github import runs
from webapp.storage.notifications import note_silence
from webapp.storage.tables import db

pytestmark = pytest.mark.slow

JOBS = 10_000
SETTINGS = {
    "GITHUB_CALLBACK_SECRET": KEY,
    "GITHUB_WEBHOOK_SECRET": KEY,
    "SECRET_KEY": "the secret key of the tests",
    "OPERATOR_TOKEN": OPERATOR_TOKEN,
    "DISPATCH_TOKEN": "a token",
    "DISPATCH_REPOSITORY": "owner/name",
    "DISPATCH_API_URL": "http://127.0.0.1:9",  # nobody listens there
    "QUIET_AFTER": "0.1",
    "CALLBACK_MAX_SKEW": "0",
}


@dataclass
class Milepost:
    """The app in this process, on a database that has grown, and a note of what it asks the database."""

    app: Flask
    sibling: Flask
    engine: Engine
    asked: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def noted(self) -> Iterator[dict[str, Any]]:
        """The statements that run meanwhile, each with its parameters."""
        self.asked.clear()
        event.listen(self.engine, "before_cursor_execute", self._note)
        yield self.asked
        event.remove(self.engine, "before_cursor_execute", self._note)

    def _note(self, _c: object, _d: object, statement: str, parameters: Any, _e: object, many: bool) -> None:
        self.asked[statement] = parameters[0] if many else parameters

    def get(self, path: str, **headers: str) -> TestResponse:
        headers = {"Authorization": f"Bearer {OPERATOR_TOKEN}", **headers}
        answer = self.app.test_client().get(path, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    def report(self, job_id: str, **fields: object) -> None:
        self.post(CALLBACKS, {"job_id": job_id, "status": "provisioning", **fields})

    def post(self, path: str, said: dict[str, object], **headers: str) -> TestResponse:
        body = json.dumps(said).encode()
        headers = {
            "Authorization": f"Bearer {OPERATOR_TOKEN}",
            "X-Signature": sign(body),
            "X-Hub-Signature-256": f"sha256={sign(body)}",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        answer = self.app.test_client().post(path, data=body, headers=headers)
        assert answer.status_code in (200, 201), answer.text
        return answer

    def link(self, job_id: str) -> str:
        url = self.get(f"/api/jobs/{job_id}").get_json()["progress_url"]
        return "/p/" + str(url).rpartition("/")[2]


@pytest.fixture(scope="module")
def milepost(database: Databases) -> Iterator[Milepost]:
    url = database.grown(JOBS)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**SETTINGS, "DATABASE_URL": url}.items():
            environment.setenv(name, value)
        app, sibling = create_app(), create_app()
    with app.app_context():
        engine = db.engine
    yield Milepost(app, sibling, engine)
    engine.dispose()


def plan(connection: Connection, statement: str, parameters: Any) -> str:
    """What the database says that it will do for a statement."""
    explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    rows = connection.exec_driver_sql(f"{explain} {statement}", parameters)
    return "\n".join(str(row[-1]) for row in rows)


def faults(statement: str, plan: str) -> list[str]:
    """What in a plan reads or sorts a table; a walk along an index up to a LIMIT does not.

    Four tables stay small: a row for each start of a server, the sessions of twelve hours, four marks,
    and the jobs that departed lately or whose link was revoked, which only `prune` reads.
    """
    found = re.findall(r".*(?:Seq Scan(?! on (?:closures|sessions|departed|marks)\b)|TEMP B-TREE).*", plan)
    tables = re.findall(r"^SCAN (?:jobs|attempts|callbacks)\b.*", plan, re.MULTILINE)
    return found + [scan for scan in tables if "INDEX" not in scan or "LIMIT" not in statement]


HOT: dict[str, Callable[[Milepost], object]] = {}


def hot(path: Callable[[Milepost], object]) -> Callable[[Milepost], object]:
    HOT[path.__name__] = path
    return path


@hot
def callback_of_a_new_job(milepost: Milepost) -> None:
    milepost.report(new_job_id(), workflow_run_id=7)


@hot
def callback_of_a_known_job(milepost: Milepost) -> None:
    milepost.report("grown-1", step="vm_created")
    milepost.report("grown-2", workflow_run_id=10**12)
    milepost.report("grown-3", workflow_run_id=1)


@hot
def heartbeat(milepost: Milepost) -> None:
    milepost.post(CALLBACKS, {"job_id": "grown-4", "type": "heartbeat", "sent_at": 4e9})


@hot
def page(milepost: Milepost) -> None:
    milepost.get(milepost.link("grown-5"))


@hot
def fragment(milepost: Milepost) -> None:
    milepost.get(milepost.link("grown-5") + "/steps")


@hot
def stream(milepost: Milepost) -> None:
    job_id = new_job_id()
    milepost.report(job_id)
    events = milepost.get(milepost.link(job_id) + "/events").iter_encoded()
    assert b'data-step="creating" data-state="active"' in next(events)
    if (
        milepost.engine.dialect.name == "sqlite"
    ):  # PostgreSQL tells; on SQLite the others' changes are asked for
        body = json.dumps({"job_id": job_id, "status": "provisioning", "step": "vm_created"}).encode()
        milepost.sibling.test_client().post(CALLBACKS, data=body, headers={"X-Signature": sign(body)})
        assert b'data-step="installing" data-state="active"' in next(events)
        assert any("attempts.change > ?" in asked for asked in milepost.asked)


@hot
def operators_list(milepost: Milepost) -> None:
    first = milepost.get("/api/jobs").get_json()
    milepost.get(f"/api/jobs?before={first['before']}")
    for status in ("queued", "provisioning", "running", "failed"):
        milepost.get(f"/api/jobs?status={status}")
    milepost.get("/api/jobs?agent_id=agent-7")
    milepost.get("/api/jobs?agent_id=agent-7&status=running")
    milepost.get("/api/jobs?pipeline=provision-agent&since=2026-01-01")


@hot
def operators_page(milepost: Milepost) -> None:
    client = milepost.app.test_client()
    csrf = re.search(r'name="csrf" value="([^"]+)"', client.get("/sign-in").text)
    assert csrf
    assert client.post("/sign-in", data={"csrf": csrf[1], "token": OPERATOR_TOKEN}).status_code == 303
    for query in ("", "?status=failed"):  # a condition or a search sorts what it finds
        assert client.get(f"/{query}").status_code == 200


@hot
def start_of_a_job(milepost: Milepost) -> None:
    job = {"job_id": new_job_id(), "agent_id": "agent-7", "dispatch": False}
    milepost.post("/api/jobs", job)
    milepost.report(str(job["job_id"]), status="failed")


@hot
def githubs_delivery(milepost: Milepost) -> None:
    run = {"id": 10**10 + 6, "run_attempt": 1, "status": "in_progress", "event": "workflow_dispatch"}
    run |= {"run_started_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"}
    said = {"workflow_run": run, "repository": {"full_name": "owner/name"}}
    assert milepost.post(CALLBACKS, said, X_GitHub_Event="workflow_run").get_json()["jobs"] == ["grown-6"]


@hot
def search_for_the_silent(milepost: Milepost) -> None:
    def has_asked() -> bool:
        gevent.sleep(0.01)
        return any("looked_at" in asked for asked in milepost.asked)

    ours = milepost.app.extensions["milepost"]
    asking = gevent.spawn(runs.ask_of_silent, ours.writer)
    wait_until(has_asked)
    asking.kill()


@hot
def prune(milepost: Milepost) -> None:
    pruned = milepost.app.test_cli_runner().invoke(
        args=["prune", "--older-than", "89.99"]
    )  # a few: not most of a page
    assert re.search(r"[1-9]\d* jobs pruned", pruned.output), pruned.output


@hot
def note_of_silence(milepost: Milepost) -> None:
    ours = milepost.app.extensions["milepost"]
    ours.writer.run(lambda begun: note_silence(begun, ours.views.clock(begun.connection)))


@pytest.mark.parametrize("path", HOT)
def test_no_query_on_a_hot_path_grows_with_its_table(milepost: Milepost, path: str) -> None:
    with milepost.noted() as asked:
        HOT[path](milepost)
    queries = {
        q: p for q, p in asked.items() if q.startswith(("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"))
    }
    assert queries
    with milepost.engine.connect() as connection:
        for query, parameters in queries.items():
            plan_of_it = plan(connection, query, parameters)
            assert not faults(query, plan_of_it), f"{query}\n{plan_of_it}"


def test_a_look_for_silence_walks_no_job_that_is_alive(milepost: Milepost) -> None:
    with milepost.noted() as asked:
        note_of_silence(milepost)
    looks = {q: p for q, p in asked.items() if q.startswith("SELECT") and "heard_at >=" in q}
    assert len(looks) == 2
    with milepost.engine.connect() as connection:
        for query, parameters in looks.items():
            assert "attempts_unfinished" in plan(connection, query, parameters), query
