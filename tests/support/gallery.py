"""The progress page in every state, for looking at; only development serves it.

`.venv/bin/flask --app tests.support.gallery run`, then /gallery.
"""

import os
import tempfile
from collections.abc import Callable
from time import time
from typing import Any
from unittest.mock import patch

from flask import Flask, Response, abort, render_template, render_template_string

from webapp.config import ROOT, Settings
from webapp.page.view import View
from webapp.parts import Parts
from webapp.rules.attempt import Attempt, clock
from webapp.rules.pipeline import MOST, Pipeline, Step, load
from webapp.rules.progress import expect

ENVIRON = {
    "DATABASE_URL": "sqlite:////nowhere/milepost.db",
    "GITHUB_CALLBACK_SECRET": "the callback key of the gallery",
    "SECRET_KEY": "the secret key of the gallery",
    "OPERATOR_TOKEN": "the operator token of the gallery",
    "OPERATOR_CONTACT": "the platform team, platform@example.com",
}
PIPELINES = load(ROOT / ".github" / "docs" / "examples")
LONG = dict.fromkeys(("now", "if_slow", "went_wrong", "covers"), "'" * 200)
PIPELINES["largest"] = Pipeline(
    "largest",
    tuple(Step(f"s{i}", f"{i:'>40}", (f"m{i}",) if i else (), (), **LONG) for i in range(MOST)),
    title="'" * 200,
    done="'" * 200,
    result="'" * 200,
    leaves="'" * 200,
)
MILESTONES = ("provisioning", "vm_created", "ansible_started", "ansible_complete", "running")
AFTER = (9, 61, 118, 342, 351)  # seconds, of the milestones
USUAL = {  # of each step its median, and between which the rest of the job takes
    "queued": [8.0, 290.0, 420.0],
    "creating": [55.0, 280.0, 400.0],
    "installing": [48.0, 230.0, 330.0],
    "configuring": [210.0, 190.0, 270.0],
    "running": [7.0, 6.0, 12.0],
    "*": [330.0, 300.0, 450.0],
}
RUN = {
    "run_id": "17203344551",
    "run_attempt": "1",
    "run_url": "https://github.com/acme/fleet/actions/runs/17203344551",
}
OUTPUT = "\n".join(
    f'fatal: [agent-{n}]: FAILED! => {{"msg": "<b>no</b> route to host 10.0.0.{n}", "rc": {n}}}'
    for n in range(16)
)


def _attempt(rank: int = 0, into: float = 24, **fields: Any) -> Attempt:
    """An attempt that reached `rank`, `into` seconds ago; its last sign of life is 7 s old."""
    opened = time() - (AFTER[rank - 1] if rank else 0) - into
    known: dict[str, Any] = {
        "pipeline": "provision-agent",
        "rank": rank,
        "times": {m: opened + at for m, at in zip(MILESTONES[:rank], AFTER, strict=False)},
        "usual": USUAL,
        **({"last_signal_at": time() - 7} if rank else {}),
        **RUN,
        **fields,
    }
    known.setdefault("heard_at", known.get("last_signal_at") or known.get("taken_at"))
    return expect(Attempt("job-4711", 1, opened, **known), PIPELINES["provision-agent"])


def _deploy(rank: int = 0, **fields: Any) -> Attempt:
    """An attempt of the example of another kind, of which nothing is usual yet."""
    steps = PIPELINES["deploy-site"].steps[1 : rank + 1]
    times = {step.reached_by[0]: time() - 40 * (rank - i) for i, step in enumerate(steps)}
    return _attempt(rank, **{"pipeline": "deploy-site", "usual": None, "times": times, **fields})


def _view(attempt: Attempt, **fields: Any) -> View:
    known: dict[str, Any] = {
        "agent_id": "agent-7",
        "region": "eu-central",
        "newest": attempt.number,
        **fields,
    }
    settings: Settings = known.pop("settings")
    now = clock(time(), settings.quiet_after, settings.lost_after, ())
    pipeline = PIPELINES[attempt.pipeline]
    return View(
        created_at=attempt.opened_at, link=0, attempt=attempt, pipeline=pipeline, clock=now,
        settings=settings, **{"job_id": "job-4711", **known},
    )  # fmt: skip


def _failed(rank: int, failed_step: str, error: str | None, **fields: Any) -> Attempt:
    ended = {"end": "failed", "ended_at": time() - 90, "failed_step": failed_step, "error": error}
    return _attempt(rank, 120, **{"last_signal_at": time() - 90, **ended, **fields})


def _silent(seconds: float, rank: int = 3) -> Attempt:
    return _attempt(rank, seconds + 30, last_signal_at=time() - seconds)


def _waiting(reason: str, rank: int = 0) -> Attempt:
    return _attempt(rank, 400, waiting_for=reason, last_signal_at=time() - 390)


def _largest(**fields: Any) -> Attempt:
    """An attempt in which every text is as long as it may be, and five times that once it is escaped."""
    times = {f"m{i}": time() - 100 + i for i in range(1, MOST)}
    usual = {f"s{i}": [5.0, 5.0, 5.0] for i in range(MOST)}
    texts = {"subject": "'" * 100, "note": "'" * 200, "run_url": "https://x/" + "&" * 1990}
    known = {"rank": MOST - 1, "times": times, "usual": usual, "heard_at": time(), **texts, **fields}
    return Attempt("a" * 64, 1500, time() - 200, "largest", **known)


NO_ROUTE = "Task 'Install Docker' failed: no route to host"
NOTE = {"note": "12 of 40 tasks done"}
SITE = {"agent_id": None, "region": None, "job_id": "site-main"}
STATES: dict[str, Callable[..., View]] = {
    "queued": lambda **k: _view(_attempt(taken_at=time() - 20), **k),
    "queued-unheard": lambda **k: _view(_attempt(usual=None, run_id=None, run_url=None), **k),
    "queued-for-days": lambda **k: _view(_attempt(0, 3e5, usual=None, run_id=None, run_url=None), **k),
    "waiting-approval": lambda **k: _view(_waiting("approval"), **k),
    "waiting-run": lambda **k: _view(_waiting("run"), **k),
    "waiting-runner": lambda **k: _view(_waiting("runner", 1), **k),
    "creating": lambda **k: _view(_attempt(1), **k),
    "installing": lambda **k: _view(_attempt(2), **k),
    "configuring": lambda **k: _view(_attempt(3, 96), **k),
    "configuring-note": lambda **k: _view(_attempt(3, 96, **NOTE), **k),
    "configuring-slow": lambda **k: _view(_attempt(3, 600), **k),
    "configuring-unmeasured": lambda **k: _view(_attempt(3, 96, usual=None), **k),
    "confirming": lambda **k: _view(_attempt(4, 3), **k),
    "done": lambda **k: _view(_attempt(5, 3000, end="running", ended_at=time() - 3000), **k),
    "done-days-ago": lambda **k: _view(_attempt(5, 3e5, end="running", ended_at=time() - 3e5), **k),
    "lost-milestones": lambda **k: _view(_attempt(3, times={"ansible_started": time() - 24}), **k),
    "refused": lambda **k: _view(
        _attempt(end="refused", ended_at=time() - 20, run_url=None, run_id=None,
                 error="GitHub refused: 422 Workflow does not have 'workflow_dispatch' trigger"), **k),
    "failed-creating": lambda **k: _view(
        _failed(1, "provision", "hcloud: server limit exceeded", server_left=False), **k),
    "failed-installing": lambda **k: _view(_failed(2, "unknown", None), **k),
    "failed-configuring": lambda **k: _view(_failed(3, "configure", NO_ROUTE, server_left=True), **k),
    "failed-running": lambda **k: _view(_failed(4, "unknown", "The runner has lost its network."), **k),
    "failed-long-error": lambda **k: _view(_failed(3, "configure", OUTPUT[:2000]), **k),
    "failed-unbreakable-error": lambda **k: _view(_failed(3, "configure", "x" * 270), **k),
    "cancelled": lambda **k: _view(_failed(3, "cancelled", "Cancelled by @sam"), **k),
    "timed-out": lambda **k: _view(_failed(3, "timed_out", None), **k),
    "closed": lambda **k: _view(_attempt(3, end="closed", ended_at=time(), failed_step="cancelled"), **k),
    "quiet": lambda **k: _view(_silent(200), **k),
    "quiet-note": lambda **k: _view(_silent(200)._replace(note=NOTE["note"]), **k),
    "lost": lambda **k: _view(_silent(1200), **k),
    "lost-queued": lambda **k: _view(_silent(1200, 0), **k),
    "site-queued": lambda **k: _view(_deploy(), **k | SITE),
    "site-building": lambda **k: _view(_deploy(2, subject="docs of v2.4, pushed by @sam"), **k | SITE),
    "site-failed": lambda **k: _view(
        _deploy(3, end="failed", ended_at=time() - 5, error="3 links are broken"), **k | SITE),
    "site-done": lambda **k: _view(
        _deploy(len(PIPELINES["deploy-site"].steps), end="running", ended_at=time() - 60,
                result_url="https://docs.example.com/"), **k | SITE),
    "offline": lambda **k: _view(_attempt(3, 96), **k),
    "gone": lambda **k: _view(_attempt(3, 96), **k),
    "login-page": lambda **k: _view(_attempt(3, 96), **k),
    "script-blocked": lambda **k: _view(_attempt(3, 96), **k),
    "embedded": lambda **k: _view(_attempt(3, 96), **k),
    "long-names": lambda **k: _view(
        _attempt(3, 96, note="a note as long as it may be, " * 6), **k,
        agent_id="build-agent-" + "with-a-very-long-name-" * 5,
        job_id="a" * 64, region="a-region-whose-name-nobody-ever-shortened-because-nobody-had-to"),
    "right-to-left": lambda **k: _view(
        _failed(3, "configure", "فشل تثبيت Docker: لا يوجد مسار إلى المضيف 10.0.0.7"), **k,
        agent_id="وكيل-البناء", region="الشرق الأوسط"),
    "largest": lambda **k: _view(_largest(), **k),
    "largest-failed": lambda **k: _view(
        _largest(end="failed", ended_at=time(), failed_step="x", error=("'" * 666 + "\n") * 3), **k),
    "largest-done": lambda **k: _view(
        _largest(rank=MOST, end="running", ended_at=time(), result_url="https://x/" + "'" * 1990), **k),
    "third-attempt": lambda **k: _view(_attempt(2)._replace(number=3), **k),
    "many-attempts": lambda **k: _view(_attempt(2)._replace(number=1500), **k),
    "earlier-attempt": lambda **k: _view(_failed(3, "configure", NO_ROUTE), **k, newest=3),
    "earlier-unfinished": lambda **k: _view(_silent(4000), **k, newest=3),
}  # fmt: skip
INDEX = """{% extends "base.html" %}{% block title %}Gallery{% endblock %}{% block body %}<main>
<h1>Gallery</h1><ul>{% for name in names %}<li><a href="/p/{{ name }}">{{ name }}</a></li>{% endfor %}</ul>
</main>{% endblock %}"""


def create_app(embedder: str = "") -> Flask:
    """Milepost with the gallery in the place of its jobs: a state's name is its token."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**ENVIRON, "DATABASE_URL": f"sqlite:///{folder}/unused.db", "EMBED_ORIGINS": embedder}
        with patch.dict(os.environ, environ, clear=True):
            from webapp.app import create_app as create_milepost

            app = create_milepost()
    parts: Parts = app.extensions["milepost"]

    def view(token: str) -> View:
        return STATES[token](settings=parts.settings) if token in STATES else abort(404)

    def page(token: str) -> str:
        html = render_template("page.html", view=view(token), token=token)
        if token == "script-blocked":
            return html.replace("/static/page.", "/static/blocked.")
        return html.replace('content="30"', 'content="1"') if token == "embedded" else html

    def steps(token: str) -> Response:
        if token == "login-page":
            return Response("<h1>Sign in to the network</h1>")
        if token in ("offline", "gone"):
            return Response(status={"offline": 503, "gone": 404}[token])
        return Response(status=204, headers={"Version": "as it was"})

    app.view_functions |= {
        "watch.page": page,
        "watch.steps": steps,
        "watch.events": lambda token: Response(status=204),
    }
    app.add_url_rule("/gallery", "gallery", lambda: render_template_string(INDEX, names=STATES))
    return app
