"""Starts servers with 0.1 s of processor time instead of 0.6: forks of a process that has the libraries.

The fork then runs gunicorn as ever, with its own environment and log. Nothing of Milepost itself is
imported before it.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from gevent import monkey

LIBRARIES = (
    "click", "dotenv", "flask.cli", "flask_migrate", "flask_sqlalchemy", "gevent.pywsgi",
    "gunicorn.app.wsgiapp", "gunicorn.http.parser", "gunicorn.workers.ggevent", "importlib.util",
    "itsdangerous", "prometheus_client", "psycopg", "requests", "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite", "werkzeug.middleware.proxy_fix",
)  # fmt: skip


class Child:
    """A forked server, as far as `subprocess.Popen` would show it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended already
            self._handle = None

    def wait(self, timeout: float) -> None:
        """Wait for its end."""
        if self._handle is None:
            return
        if not select.select([self._handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"server {self.pid}", timeout)
        os.close(self._handle)
        self._handle = None


class Preloaded:
    """The process that forks the servers."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.support.preloaded"]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, arguments: list[str], environ: dict[str, str], log: Path) -> Child:
        """Run `gunicorn arguments` in a session of its own, with its output in `log`."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([arguments, environ, str(log)]).encode() + b"\n")
        self._process.stdin.flush()
        return Child(int(self._process.stdout.readline()))

    def close(self) -> None:
        """Let the process end; its servers go on."""
        self._process.communicate(timeout=10)


def main() -> None:
    """Fork a server for each line of the input, and print its process id.

    By the operating system's own means: gevent's belong to the servers, and begin in the fork.
    """
    fork, waitpid, handle = (
        monkey.get_original(*name) for name in (("os", "fork"), ("os", "waitpid"), ("signal", "signal"))
    )

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while waitpid(-1, os.WNOHANG)[0]:
                pass

    interrupt = handle(signal.SIGINT, signal.SIG_IGN)  # the tests stop their servers themselves
    handle(signal.SIGCHLD, reap)
    for line in sys.stdin.buffer:
        arguments, environ, log = json.loads(line)
        if pid := fork():
            print(pid, flush=True)
        else:
            handle(signal.SIGINT, interrupt)
            handle(signal.SIGCHLD, signal.SIG_DFL)
            become_gunicorn(arguments, environ, log)


def become_gunicorn(arguments: list[str], environ: dict[str, str], log: str) -> None:
    """Go on as `python -m gunicorn` would have begun."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["gunicorn", *arguments]
    from gunicorn.app.wsgiapp import run  # a library like the others

    run()
    sys.exit()


if __name__ == "__main__":
    monkey.patch_all()  # as webapp.serving does, before the libraries are imported
    for library in LIBRARIES:
        importlib.import_module(library)
    main()
