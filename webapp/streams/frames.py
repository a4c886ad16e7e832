"""One state of a job, rendered, as the events of a stream.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import secrets
from collections.abc import Callable
from typing import NamedTuple

from jinja2 import Template
from sqlalchemy import Engine

from webapp.page.view import View, Views, iso
from webapp.storage.jobs import newest_change
from webapp.storage.transaction import Change

ANY = ""  # in place of a job id: any job


class Frame(NamedTuple):
    """What a stream sends of a job.

    `number` is the change that made it; at `changes_at` (Unix seconds) the clock alone makes it another
    one; `body` has the state, None where it was let go of; `alive` has only the last sign of life.
    """

    number: int
    version: str
    link: int
    changes_at: float | None = None
    is_over: bool = False
    body: bytes | None = None
    alive: bytes = b""


Make = Callable[[str, Change, Frame | None], Frame]


def frame_maker(template: Template, engine: Engine, views: Views) -> Make:
    """What the hub makes a job's frames with, outside of any request."""

    def make(job_id: str, change: Change, before: Frame | None) -> Frame:
        """The frame after a change; `before` is the newest, whose body serves again for the same state."""
        view = _of_change(change, views)
        if view is None:
            with engine.connect() as connection:
                if job_id == ANY:
                    return _of_any_job(newest_change(connection))
                view = views.find(connection, job_id)
        if view is None:  # pruned or deleted: no link is its link
            return Frame(0, "", -1, is_over=True)
        body = before.body if before and before.version == view.version else as_events(view, template)
        signal = iso(view.attempt.last_signal_at)
        alive = f"event: alive\nid: {view.version}\ndata: {signal}\n\n".encode() if signal else b""
        is_over = view.condition == "over"
        return Frame(view.attempt.change, view.version, view.link, view.changes_at, is_over, body, alive)

    return make


def _of_change(change: Change, views: Views) -> View | None:
    """The view of what a commit told, None where the database has to be asked."""
    try:
        return views.of(change.job, None, change.attempt) if change.job else None
    except LookupError:
        return None


def _of_any_job(number: int) -> Frame:
    id = secrets.token_hex(8)
    return Frame(number, id, 0, body=f"event: jobs\nid: {id}\ndata: changed\n\n".encode())


def as_events(view: View, template: Template) -> bytes:
    """One state as the event `steps`, and `done` after the last."""
    fragment = template.render(view=view)
    data = fragment.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\ndata: ")
    done = f"event: done\nid: {view.version}\ndata: over\n\n" if view.attempt.end else ""
    return f"event: steps\nid: {view.version}\ndata: {data}\n\n{done}".encode()
