"""gunicorn's settings for Milepost: `gunicorn -c python:webapp.serving wsgi:app`.

Streams are greenlets: one costs some 20 KiB, where a thread for each would end at hundreds.
"""

from gevent import monkey

monkey.patch_all()  # before anything that takes a lock or a socket is imported

import gc
import logging
import resource
import sys
from typing import Any

import gevent

from webapp.github import runs
from webapp.config import environment, load

settings = load(environment())  # here, or the master would restart failing workers for ever

bind = [f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"]
worker_class = "webapp.worker.Worker"
backlog = 4096
graceful_timeout = 2  # seconds, after which a worker that does not stop by itself is killed
timeout = 60
control_socket_disable = True

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a stream is an open file
sys.setswitchinterval(0.0005)  # the writer's thread takes turns with the event loop


def on_starting(server: Any) -> None:
    """Of a malformed request the log names the address alone: its first line may hold a link's token."""

    def hush(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Invalid request"):
            record.msg = record.msg.partition(": ")[0]
        return True

    server.log.error_log.addFilter(hush)


def post_worker_init(worker: Any) -> None:
    """In each process: a collector that makes no pause, and who asks GitHub about the runs gone silent."""
    gc.freeze()  # a full collection among ten thousand streams would stop them all for most of a second
    gc.set_threshold(5000, 10, 1000)
    if settings.can_dispatch:
        ours = worker.wsgi.extensions["milepost"]
        gevent.spawn(runs.ask_for_ever, ours.writer, ours.settings, ours.pipelines)
