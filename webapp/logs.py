"""The log: one line of ASCII JSON on stderr for each event that matters, so that no input can forge a line.

Nobody waits for whoever reads it. What stderr cannot take now is kept, up to a bound; what comes after
that is dropped and counted.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from io import TextIOBase
from stat import S_ISREG
from time import gmtime, strftime, time
from typing import Any

from gevent.monkey import get_original

LONGEST, LONGEST_TRACEBACK = 300, 20_000  # characters of any one value
KEPT = 2**18  # bytes
PIPE_BUF = 4096  # bytes; a pipe that takes any at all takes so many without waiting

log = logging.getLogger("webapp")
request: Callable[[], dict[str, object]] = dict  # what is told of the current one; routes.middleware sets it


class Sink:
    """Stderr, to which a line is written without waiting, or later, or never."""

    def __init__(self) -> None:
        self._waiting, self._dropped = bytearray(), 0
        self._lock = get_original("_thread", "allocate_lock")()
        self._poll = get_original("select", "poll")()
        self._poll.register(2, 4)  # POLLOUT
        self._own: int | None = None  # a file description of our own: others would find stderr's non-blocking
        try:
            if not S_ISREG(os.fstat(2).st_mode):  # of a file, two descriptions overwrite each other
                self._own = os.open("/dev/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # a socket, as under systemd; another user's; closed
            pass

    def write(self, line: str) -> None:
        """Keep a line, and write what can be written now."""
        if len(self._waiting) < KEPT:
            self._waiting += line.encode()
        else:
            self._dropped += 1
        self.flush()

    def flush(self) -> None:
        """Write what can be written now."""
        if not self._waiting or not self._lock.acquire(False):
            return
        try:
            while self._waiting and (self._own or self._poll.poll(0)):
                part = self._waiting if self._own else self._waiting[:PIPE_BUF]
                del self._waiting[: os.write(self._own or 2, part)]
                if self._dropped and not self._waiting:
                    count, self._dropped = self._dropped, 0
                    self._waiting += _line("warning", "log lines were dropped", {"count": count}).encode()
        except OSError:  # it is full, stalled or gone
            pass
        finally:
            self._lock.release()


sink = Sink()


class Handler(logging.Handler):
    """The records of other people's loggers, and of our own, as lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """`extra={"fields": {...}}` are members of the line."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        message = record.getMessage()
        if message.startswith("Invalid request"):  # gunicorn's; the rest may hold a link's token
            message = message.partition(": ")[0]
        write(record.levelname.lower(), message, fields)


class Stderr(TextIOBase):
    """In place of `sys.stderr`: whatever is printed there becomes a line, and waits for nobody."""

    def write(self, text: str) -> int:
        """A line, unless there is nothing in it."""
        if text.strip():
            write("error", "stderr", {"traceback": text.strip()})
        return len(text)


def write(level: str, event: str, fields: Mapping[str, Any]) -> None:
    """Write a line, with the request that it belongs to."""
    sink.write(_line(level, event, fields))


def event(name: str, **fields: object) -> None:
    """Log something that matters, with what it was about; never a secret, never a link's token."""
    write("info", name, fields)


def set_up() -> None:
    """All loggers of this process write here."""
    logging.logThreads = False  # a record's thread is not told, and would cost each stream a stand-in of one
    logging.basicConfig(handlers=[Handler()])
    log.setLevel(logging.INFO)


def _line(level: str, event: str, fields: Mapping[str, Any]) -> str:
    now = time()
    second = strftime("%Y-%m-%dT%H:%M:%S", gmtime(now))
    said: dict[str, Any] = {"time": f"{second}.{int(now % 1 * 1000):03}Z", "level": level}
    for name, value in {**request(), "event": event, **fields}.items():
        longest = LONGEST_TRACEBACK if name == "traceback" else LONGEST
        said[name] = value if isinstance(value, int | float | None) else str(value)[:longest]
    return json.dumps(said) + "\n"
