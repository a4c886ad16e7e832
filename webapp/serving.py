"""gunicorn's settings for Milepost: `gunicorn -c python:webapp.serving wsgi:app`.

Streams are greenlets: one costs some 20 KiB, where a thread for each would end at hundreds.
The master imports nothing of the app and of its libraries: a HUP after an update serves the new code.
"""

import gc
import json
import logging
import os
import resource
import subprocess
import sys
from time import time
from typing import Any

import gevent.monkey
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.ggevent import GeventWorker


def _ask() -> Any:
    """The settings that the master needs, from a process that ends; a bad one stops the start."""
    fork, waitpid, close = (gevent.monkey.get_original("os", name) for name in ("fork", "waitpid", "close"))
    reading, writing = os.pipe()
    if child := fork():
        close(writing)
        waitpid(child, 0)
        with os.fdopen(reading) as answer:
            return json.loads(answer.read() or sys.exit(1))
    try:
        from webapp.config import environment, load

        settings = load(environment())
        os.write(writing, json.dumps([settings.address, settings.web_concurrency]).encode())
    except Exception as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def _forget() -> None:
    """Import our modules anew when they are needed next."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "webapp"]:
        del sys.modules[name]


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from webapp import logs

        logs.Handler().emit(record)


class ServerLog(Logger):  # type: ignore[misc]
    """gunicorn's own lines, in the form of all others."""

    def _set_handler(self, log: logging.Logger, *_: object) -> None:
        log.handlers = [_Lines()]


class Worker(GeventWorker):  # type: ignore[misc]
    """What the master forks; in the new process it becomes `webapp.worker.Worker`, as it is by then."""

    def init_process(self) -> None:
        """Serve until SIGTERM."""
        gevent.monkey.patch_all()  # before anything that takes a lock or a socket is imported
        from webapp.worker import Worker

        self.__class__ = Worker
        self.init_process()


address, workers = _ask()
bind = [address]
worker_class = Worker
logger_class = ServerLog
backlog = 4096
graceful_timeout = 2  # seconds, after which a worker that does not stop by itself is killed
timeout = 60
control_socket_disable = True
forwarder_headers = ""  # nothing that a client says of itself is believed here: see TRUSTED_PROXIES
forwarded_allow_ips = ""
secure_scheme_headers: dict[str, str] = {}

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a stream is an open file
# The thread that commits and the event loop take turns: 9 % more callbacks, their p99 a quarter lower.
sys.setswitchinterval(0.0005)  # seconds; Python's own: 0.005


def when_ready(server: Any) -> None:
    """A HUP under which the new code or the new settings could not start leaves the old ones at work."""
    reload = server.handle_hup

    def handle_hup() -> None:
        command = [sys.executable, "-c", "import wsgi"]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            server.log.error("not reloaded: the app does not start: %s", done.stderr.strip().split("\n")[-1])
        else:
            _forget()
            reload()

    server.handle_hup = handle_hup


def post_fork(server: Any, worker: Any) -> None:
    """Our modules are imported anew in each process."""
    _forget()


def on_starting(server: Any) -> None:
    """When the door opened, the same for all processes: until then silence says nothing of a job."""
    os.environ["MILEPOST_STARTED_AT"] = str(time())


def post_worker_init(worker: Any) -> None:
    """In each process: a collector that makes no pause, and who asks GitHub about the runs gone silent."""
    from webapp import notify
    from webapp.github import runs
    from webapp.storage import opening

    # A full collection stops everything. With Python's own thresholds five of them, of up to 0.35 s, stop
    # 6,000 streams while they open, which then take a quarter more processor time; with these, none. What is
    # here already, 116,000 objects, a third of all by then, is left out of each.
    gc.freeze()
    gc.set_threshold(5000, 10, 1000)
    ours = worker.wsgi.extensions["milepost"]
    try:
        opening.begin(ours.writer, float(os.environ["MILEPOST_STARTED_AT"]))
    except opening.CannotStart as error:
        worker.log.error("the server cannot start: %s", error)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)  # which stops the master, too
    notify.start(ours)
    if ours.settings.can_dispatch:
        opening.keep_doing("asking GitHub", runs.ask_of_silent, ours.writer)
