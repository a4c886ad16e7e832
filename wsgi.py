"""The WSGI entry point: `gunicorn -c python:webapp.serving wsgi:app`."""

from webapp.app import create_app

app = create_app()
