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

from webapp.config import Settings
from webapp.page.view import View
from webapp.parts import Parts
from webapp.rules.attempt import Attempt
from webapp.rules.progress import STEPS

ENVIRON = {
    "DATABASE_URL": "sqlite:////nowhere/milepost.db",
    "GITHUB_CALLBACK_SECRET": "the callback key of the gallery",
    "SECRET_KEY": "the secret key of the gallery",
    "OPERATOR_TOKEN": "the operator token of the gallery",
    "OPERATOR_CONTACT": "the platform team, platform@example.com",
}
MILESTONES = ("provisioning", "vm_created", "ansible_started", "ansible_complete", "running")
AFTER = (9, 61, 118, 342, 351)  # seconds, of the milestones
USUAL = {
    **dict(zip(STEPS, ([8.0, 21.0], [55.0, 80.0], [48.0, 71.0], [210.0, 290.0], [7.0, 12.0]), strict=True)),
    "total": [330.0, 450.0],
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
    times = {milestone: opened + at for milestone, at in zip(MILESTONES[:rank], AFTER, strict=False)}
    heard = {"last_signal_at": time() - 7} if rank else {}
    known: dict[str, Any] = {
        "version": 40 + rank,
        "rank": rank,
        "times": times,
        "usual": USUAL,
        **heard,
        **RUN,
    }
    return Attempt("job-4711", 1, opened, **known | fields)


def _view(attempt: Attempt, **fields: Any) -> View:
    known: dict[str, Any] = {"job_id": "job-4711", "agent_id": "agent-7", "region": "eu-central", **fields}
    settings: Settings = known.pop("settings")
    return View(
        created_at=attempt.opened_at, link=0, attempt=attempt, now=time(), settings=settings,
        **{"newest": attempt.number, **known},
    )  # fmt: skip


def _failed(rank: int, failed_step: str, error: str | None, **fields: Any) -> Attempt:
    ended = {"end": "failed", "ended_at": time() - 90, "failed_step": failed_step, "error": error}
    return _attempt(rank, 120, **{"last_signal_at": time() - 90, **ended, **fields})


def _silent(seconds: float, rank: int = 3) -> Attempt:
    return _attempt(rank, seconds + 30, last_signal_at=time() - seconds)


NO_ROUTE = "Task 'Install Docker' failed: no route to host"
STATES: dict[str, Callable[[Settings], View]] = {
    name: lambda settings, make=make: make(settings=settings)
    for name, make in {
        "queued": lambda **k: _view(_attempt(taken_at=time() - 20), **k),
        "queued-unheard": lambda **k: _view(_attempt(usual=None, run_id=None, run_url=None), **k),
        "creating": lambda **k: _view(_attempt(1), **k),
        "installing": lambda **k: _view(_attempt(2), **k),
        "configuring": lambda **k: _view(_attempt(3, 96), **k),
        "configuring-slow": lambda **k: _view(_attempt(3, 400), **k),
        "configuring-unmeasured": lambda **k: _view(_attempt(3, 96, usual=None), **k),
        "confirming": lambda **k: _view(_attempt(4, 3), **k),
        "done": lambda **k: _view(_attempt(5, 3000, end="running", ended_at=time() - 3000), **k),
        "lost-milestones": lambda **k: _view(_attempt(3, times={"ansible_started": time() - 24}), **k),
        "refused": lambda **k: _view(
            _attempt(end="refused", ended_at=time() - 20, run_url=None, run_id=None,
                     error="GitHub refused: 422 Workflow does not have 'workflow_dispatch' trigger"), **k),
        "failed-creating": lambda **k: _view(_failed(1, "provision", "hcloud: server limit exceeded"), **k),
        "failed-installing": lambda **k: _view(_failed(2, "unknown", None), **k),
        "failed-configuring": lambda **k: _view(_failed(3, "configure_full", NO_ROUTE), **k),
        "failed-running": lambda **k: _view(_failed(4, "unknown", "The agent stopped at once."), **k),
        "failed-long-error": lambda **k: _view(_failed(3, "configure", OUTPUT[:2000]), **k),
        "failed-unbreakable-error": lambda **k: _view(_failed(3, "configure", "x" * 270), **k),
        "cancelled": lambda **k: _view(_failed(3, "cancelled", "Cancelled by @sam"), **k),
        "timed-out": lambda **k: _view(_failed(3, "timed_out", None), **k),
        "quiet": lambda **k: _view(_silent(200), **k),
        "lost": lambda **k: _view(_silent(1200), **k),
        "offline": lambda **k: _view(_attempt(3, 96), **k),
        "gone": lambda **k: _view(_attempt(3, 96), **k),
        "long-names": lambda **k: _view(
            _attempt(3, 96), **k, agent_id="build-agent-" + "with-a-very-long-name-" * 5,
            job_id="a" * 64, region="a-region-whose-name-nobody-ever-shortened-because-nobody-had-to"),
        "right-to-left": lambda **k: _view(
            _failed(3, "configure", "فشل تثبيت Docker: لا يوجد مسار إلى المضيف 10.0.0.7"), **k,
            agent_id="وكيل-البناء", region="الشرق الأوسط"),
        "third-attempt": lambda **k: _view(_attempt(2)._replace(number=3), **k),
        "earlier-attempt": lambda **k: _view(_failed(3, "configure", NO_ROUTE), **k, newest=3),
        "earlier-unfinished": lambda **k: _view(_silent(4000), **k, newest=3),
    }.items()
}  # fmt: skip
INDEX = """{% extends "base.html" %}{% block title %}Gallery{% endblock %}{% block body %}<main>
<h1>Gallery</h1><ul>{% for name in names %}<li><a href="/p/{{ name }}">{{ name }}</a></li>{% endfor %}</ul>
</main>{% endblock %}"""


def create_app() -> Flask:
    """Milepost with the gallery in the place of its jobs: a state's name is its token."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**ENVIRON, "DATABASE_URL": f"sqlite:///{folder}/unused.db"}
        with patch.dict(os.environ, environ, clear=True):
            from webapp.app import create_app as create_milepost

            app = create_milepost()
    parts: Parts = app.extensions["milepost"]

    def view(token: str) -> View:
        return STATES[token](parts.settings) if token in STATES else abort(404)

    def steps(token: str) -> Response:
        return Response(status={"offline": 503, "gone": 404}.get(token, 204))

    app.view_functions |= {
        "watch.page": lambda token: render_template("page.html", view=view(token), token=token),
        "watch.steps": steps,
        "watch.events": lambda token: Response(status=503 if token in ("offline", "gone") else 204),
    }
    app.add_url_rule("/gallery", "gallery", lambda: render_template_string(INDEX, names=STATES))
    return app
