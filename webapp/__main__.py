"""`make run`: secrets, migrations, links, then the server; on an empty database with a rehearsal."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent, also while the rest is imported

import os
import secrets
import socket
import subprocess
import sys

import flask_migrate

from webapp import cli, config
from webapp.app import create_app
from webapp.parts import parts
from webapp.storage.jobs import newest_jobs
from webapp.storage.tables import db

GUNICORN = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until gunicorn has a handler of its own
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
from gunicorn.app.wsgiapp import run
run()
"""


def main() -> None:
    """Replace this process by the server, or end with a sentence that says why it cannot be."""
    sys.excepthook = cli.tell_fault
    os.chdir(config.ROOT)
    given = config.given()
    for name in config.SECRETS:
        known = given.get(name) or config.made_secret(name)
        os.environ[name] = known or config.keep_secret(name, secrets.token_urlsafe(32))
    app = create_app()
    with app.app_context():
        flask_migrate.upgrade()
        has_jobs = bool(newest_jobs(db.session.connection(), 1)[0])
        db.engine.dispose()
        host, port, address = parts().settings.host, parts().settings.port, parts().settings.address
        try:  # gunicorn would, for five seconds, and say in ten lines that it cannot
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            raise config.BadSetting(f"HOST and PORT: {address}: {error.strerror}") from None
        print(f"Sign in: {parts().links.sign_in()}", flush=True)
    if not has_jobs:
        command = [sys.executable, "-m", "flask", "--app", "wsgi", "rehearse", "--wait"]
        subprocess.Popen(command, stderr=subprocess.DEVNULL)  # silent when Ctrl-C ends both
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which a Python that begins takes for a fault
    os.execv(sys.executable, [sys.executable, "-c", GUNICORN, "-c", "python:webapp.serving", "wsgi:app"])


main()
