"""`make run`: secrets, migrations, links, then the server; on an empty database with a rehearsal."""

import os
import subprocess
import sys

import flask_migrate
from sqlalchemy import select

from webapp import config
from webapp.app import create_app
from webapp.parts import parts
from webapp.routes.sign_in import sign_in_url
from webapp.storage.tables import db, jobs


def main() -> None:
    """Replace this process by the server, or exit with the setting that is wrong."""
    os.chdir(config.ROOT)
    os.environ.update(config.with_local_secrets(os.environ, make=True))
    try:
        app = create_app()
    except config.BadSetting as error:
        sys.exit(f"milepost: {error}")
    with app.app_context():
        flask_migrate.upgrade()
        is_empty = db.session.scalar(select(jobs.c.job_id).limit(1)) is None
        db.engine.dispose()
        print(f"Sign in: {sign_in_url(parts())}", flush=True)
    if is_empty:
        subprocess.Popen([sys.executable, "-m", "flask", "--app", "wsgi", "rehearse", "--wait"])
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "-c", "python:webapp.serving", "wsgi:app"])


main()
