"""`make run`: secrets, migrations, links, then the server; on an empty database with a rehearsal."""

import os
import socket
import subprocess
import sys

import flask_migrate
from sqlalchemy.exc import SQLAlchemyError

from webapp import config
from webapp.app import create_app
from webapp.parts import parts
from webapp.routes.sign_in import sign_in_url
from webapp.storage.database import reason
from webapp.storage.jobs import is_empty
from webapp.storage.tables import db

GUNICORN = """
import signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until gunicorn has a handler of its own
from gunicorn.app.wsgiapp import run
run()
"""


def main() -> None:
    """Replace this process by the server, or exit with a sentence that says why it cannot be."""
    os.chdir(config.ROOT)
    try:
        known = config.with_local_secrets(config.given(), make=True)
        os.environ.update({name: known[name] for name in config.SECRETS})
        app = create_app()
        with app.app_context():
            flask_migrate.upgrade()
            has_jobs = not is_empty(db.session.connection())
            db.engine.dispose()
            _can_listen(parts().settings)
            print(f"Sign in: {sign_in_url(parts())}", flush=True)
    except config.BadSetting as error:
        sys.exit(f"milepost: {error}")
    except SQLAlchemyError as error:
        sys.exit(f"milepost: DATABASE_URL cannot be used: {reason(error)}")
    except OSError as error:
        sys.exit(f"milepost: {error.filename or ''} {error.strerror}".replace("  ", " "))
    if not has_jobs:
        command = [sys.executable, "-m", "flask", "--app", "wsgi", "rehearse", "--wait"]
        subprocess.Popen(command, stderr=subprocess.DEVNULL)  # silent when Ctrl-C ends both
    os.execv(sys.executable, [sys.executable, "-c", GUNICORN, "-c", "python:webapp.serving", "wsgi:app"])


def _can_listen(settings: config.Settings) -> None:
    """Raises BadSetting where HOST and PORT are taken, or are not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise config.BadSetting(
            f"HOST and PORT: {settings.host}:{settings.port} cannot be listened at: {error.strerror}"
        ) from None


try:
    main()
except KeyboardInterrupt:
    sys.exit(130)
