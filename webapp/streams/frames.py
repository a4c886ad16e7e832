"""One state of a job, rendered, as the events of a stream.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import secrets
from math import inf
from typing import NamedTuple

from jinja2 import Template

from webapp.page.view import View, Views, iso
from webapp.storage.reader import Reader
from webapp.storage.transaction import Change

ANY = ""  # in place of a job id: any job


class Frame(NamedTuple):
    """What a stream sends of a job: in `body` its state, in `alive` only its last sign of life.

    `number` is the change that it shows. At `changes_at` (Unix seconds) time alone makes it another one.
    """

    number: int
    version: str
    link: int
    body: bytes = b""
    alive: bytes = b""
    changes_at: float = inf
    is_over: bool = False


GONE = Frame(0, "", -1, is_over=True)  # of a job that was pruned or deleted: no link is its link


class Frames:
    """Makes frames, outside of any request."""

    def __init__(self, reader: Reader[View], views: Views, template: Template) -> None:
        self._reader, self._views, self._template = reader, views, template

    def find(self, job_id: str, change: Change) -> View | None:
        """A job after a change: as the commit told it, or else as the database has it now."""
        try:
            if change.job:
                return self._views.of(change.job, None, change.attempt)
        except LookupError:  # its steps are not in memory
            pass
        return self._reader.find(job_id)

    def of(self, view: View | None, before: Frame = GONE, seen: str = "") -> Frame:
        """The frame of a view.

        `before` is the newest one, whose body serves again for the same state. The version `seen` needs none.
        """
        if view is None:
            return GONE
        body = before.body
        if before.version != view.version:
            body = b"" if view.version == seen else self._body(view)
        signal = iso(view.attempt.last_signal_at)
        alive = f"event: alive\nid: {view.version}\ndata: {signal}\n\n".encode() if signal else b""
        changes_at, is_over = view.changes_at or inf, view.condition == "over"
        return Frame(view.attempt.change, view.version, view.link, body, alive, changes_at, is_over)

    def of_any_job(self) -> Frame:
        """Says no more than that some job has changed."""
        id = secrets.token_hex(8)
        return Frame(0, id, 0, f"event: jobs\nid: {id}\ndata: changed\n\n".encode())

    def _body(self, view: View) -> bytes:
        """The event `steps`, and `done` after the last."""
        fragment = self._template.render(view=view)
        data = fragment.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\ndata: ")
        done = f"event: done\nid: {view.version}\ndata: over\n\n" if view.attempt.end else ""
        return f"event: steps\nid: {view.version}\ndata: {data}\n\n{done}".encode()
