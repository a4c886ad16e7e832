"""The log: one line of ASCII JSON on stderr for each event that matters, so that no input can forge a line.

Nobody waits for whoever reads it. What stderr cannot take now is kept, up to a bound; what comes after
that is dropped and counted.
"""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from json.encoder import encode_basestring_ascii
from stat import S_ISREG
from time import gmtime, strftime, time
from typing import Any

from gevent.monkey import get_original

LONGEST, LONGEST_TRACEBACK = 300, 20_000  # characters of any one value
KEPT = 2**18  # bytes
PIPE_BUF = 4096  # bytes; a pipe that takes any at all takes so many without waiting

log = logging.getLogger("webapp")
request_id: Callable[[], str] = str  # of the current request; routes.middleware puts its own here
whence: Callable[[], dict[str, object]] = dict  # the address from which an event was asked for; the same


class Sink:
    """Stderr, to which a line is written without waiting, or later, or never."""

    def __init__(self) -> None:
        self._waiting, self._dropped = bytearray(), 0
        self._lock = get_original("_thread", "allocate_lock")()
        try:  # a file description of our own: who shares stderr's own would find it non-blocking
            own = 2  # a file, which blocks nobody, and where two descriptions overwrite each other
            if not S_ISREG(os.fstat(2).st_mode):
                own = os.open("/dev/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
            self._write: Callable[[bytearray], int] = partial(os.write, own)
        except OSError:  # a socket, as under systemd; another user's; closed
            self._write = _write_when_ready

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
            while self._waiting:
                written = self._write(self._waiting)
                del self._waiting[:written]
                if self._dropped and not self._waiting:
                    count, self._dropped = self._dropped, 0
                    self._waiting += _line("warning", "log lines were dropped", {"count": count}).encode()
        except OSError:  # it is full, stalled or gone
            pass
        finally:
            self._lock.release()


def _write_when_ready(data: bytearray) -> int:
    poll = get_original("select", "poll")()
    poll.register(2, 4)  # POLLOUT
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(2, data[:PIPE_BUF])


sink = Sink()


class Handler(logging.Handler):
    """The records of other people's loggers, and of our own, as lines."""

    def createLock(self) -> None:  # noqa: N802
        """None: the sink has its own."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """`extra={"fields": {...}}` are members of the line."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        message = record.getMessage()
        if message.startswith("Invalid request"):  # gunicorn's; the rest may hold a link's token
            message = message.partition(": ")[0]
        write(record.levelname.lower(), message, fields)


class Stderr:
    """In place of `sys.stderr`: whatever is printed there becomes a line, and waits for nobody."""

    def write(self, text: str) -> int:
        """A line, unless there is nothing in it."""
        if text.strip():
            write("error", "stderr", {"traceback": text.strip()})
        return len(text)

    def flush(self) -> None:
        """Nothing is held back here."""

    def isatty(self) -> bool:
        """No colours."""
        return False


def write(level: str, event: str, fields: Mapping[str, Any]) -> None:
    """Write a line, with the request that it belongs to."""
    sink.write(_line(level, event, fields))


def event(name: str, **fields: object) -> None:
    """Log something that matters, with what it was about; never a secret, never a link's token."""
    write("info", name, whence() | fields)


def set_up() -> None:
    """All loggers of this process write here."""
    logging.logThreads = False  # a record's thread is not told, and would cost each stream a stand-in of one
    root = logging.getLogger()
    if not any(isinstance(handler, Handler) for handler in root.handlers):
        root.addHandler(Handler())
        log.setLevel(logging.INFO)


def _line(level: str, event: str, fields: Mapping[str, Any]) -> str:
    """Put together by hand: a LogRecord and a JSON encoder took 14 % of a callback, this takes 1 %."""
    now = time()
    second = strftime("%Y-%m-%dT%H:%M:%S", gmtime(now))
    line = f'{{"time": "{second}.{int(now % 1 * 1000):03}Z", "level": "{level}"'
    if request := request_id():
        line += f', "request": "{request}"'
    line += f', "event": {_json("event", event)}'
    for name, value in fields.items():
        line += f', "{name}": {_json(name, value)}'
    return line + "}\n"


def _json(name: str, value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return encode_basestring_ascii(str(value)[: LONGEST_TRACEBACK if name == "traceback" else LONGEST])
