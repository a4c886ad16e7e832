"""Forks of processes that have imported the libraries: a server costs 0.15 s of processor time, not 1.

A fork then goes on as gunicorn or flask would have begun, in an environment of its own. Nothing of
Milepost itself is imported before it.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gevent import monkey

LIBRARIES = (
    "alembic.migration", "click", "dotenv", "flask.cli", "flask_migrate.cli", "flask_sqlalchemy.cli",
    "gevent.pywsgi", "gevent.threadpool", "gunicorn.app.wsgiapp", "gunicorn.http.parser",
    "gunicorn.workers.ggevent", "importlib.util", "itsdangerous", "prometheus_client", "psycopg",
    "requests", "sqlalchemy.dialects.postgresql.psycopg", "sqlalchemy.dialects.sqlite", "sqlite3",
    "statistics", "tarfile", "werkzeug.middleware.proxy_fix",
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
    """One such process, for servers or for commands."""

    def __init__(self, root: Path, kind: str, templates: Path) -> None:
        command = [sys.executable, "-m", "tests.support.preloaded", kind, str(templates)]
        self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._alone = threading.Lock()

    def ask(self, arguments: list[str], environ: dict[str, str], stdout: Path, stderr: Path) -> int:
        """Fork once: the process id of a server, or the exit code of a command."""
        assert self._process.stdin and self._process.stdout
        with self._alone:
            line = json.dumps([arguments, environ, str(stdout), str(stderr)])
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        """Let the process end; its servers go on."""
        self._process.communicate(timeout=10)


class Preloads:
    """Both, each begun when it is needed first; `templates` is a folder for those that are compiled."""

    def __init__(self, root: Path, templates: Path) -> None:
        self._root, self._templates = root, templates

    @cached_property
    def servers(self) -> Preloaded:
        return Preloaded(self._root, "servers", self._templates)

    @cached_property
    def commands(self) -> Preloaded:
        return Preloaded(self._root, "commands", self._templates)

    def close(self) -> None:
        for begun in vars(self).values():
            if isinstance(begun, Preloaded):
                begun.close()


def fork_servers() -> None:
    """Fork gunicorn for each line of the input, and print its process id.

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
    from gunicorn.app.wsgiapp import run

    for line in sys.stdin.buffer:
        arguments, environ, *outputs = json.loads(line)
        if environ.get("NOTIFY_URLS"):
            from apprise import Apprise

            Apprise.instantiate("json://localhost")  # reads all of its plugins: 0.4 s, in each process
        if pid := fork():
            print(pid, flush=True)
        else:
            handle(signal.SIGINT, interrupt)
            handle(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            become("gunicorn", run, arguments, environ, *outputs)


def fork_commands() -> None:
    """Fork flask, or a script of the provisioning, for each line of the input; print its exit code."""
    from flask.cli import main

    for line in sys.stdin.buffer:
        arguments, environ, *outputs = json.loads(line)
        script = Path(arguments[0])
        if script.suffix == ".py":
            importlib.import_module("hcloud")
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        elif script.suffix == ".py":
            sys.path.insert(0, str(script.parent))
            run = partial(runpy.run_path, str(script), run_name="__main__")
            become(str(script), run, arguments[1:], environ, *outputs)
        else:
            become("flask", main, arguments, environ, *outputs)


def share_templates(folder: str) -> None:
    """What one app compiles is there for all that come; Jinja compares the template's text."""
    from flask import Flask
    from jinja2 import FileSystemBytecodeCache

    Flask.jinja_options = {"bytecode_cache": FileSystemBytecodeCache(folder)}


def become(
    name: str, run: Callable[[], Any], arguments: list[str], environ: dict[str, str], *outputs: str
) -> None:
    """Go on as `python -m NAME`, or a script of that name, would have begun; does not return.

    A process, or another that it has forked, ends without freeing every object that was preloaded, which
    takes longer than its start.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for output, target in zip(outputs, (1, 2), strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), target)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv, sys.dont_write_bytecode = [name, *arguments], "PYTHONDONTWRITEBYTECODE" in environ
    code: Any = 0
    try:
        run()
    except SystemExit as end:
        code = end.code or 0
    if not isinstance(code, int):
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serves = sys.argv[1] == "servers"
    if serves:
        monkey.patch_all()  # as webapp.serving does, before the libraries are imported
    for library in LIBRARIES:
        if serves or not library.startswith(("gevent", "gunicorn")):
            importlib.import_module(library)
    share_templates(sys.argv[2])
    gc.collect()
    gc.freeze()  # a fork's collector leaves out what is here already
    (fork_servers if serves else fork_commands)()
