"""The parts that the doors share: where they meet, once per app; no routes, no queries."""

from typing import cast

from flask import Flask, current_app

from webapp.config import Settings
from webapp.page.view import Views
from webapp.signing import Links
from webapp.storage import database
from webapp.storage.reader import Reader
from webapp.storage.tables import db
from webapp.storage.writer import Writer
from webapp.streams.frames import Frames
from webapp.streams.hub import Hub


class Parts:
    """What a door needs to find, tell and show; made in an app's context."""

    def __init__(self, app: Flask, settings: Settings) -> None:
        files = database.prepare(db.engine)
        self.settings = settings
        self.links = Links(settings.public_url, settings.secret_key, settings.operator_token)
        self.views = Views(settings)
        self.reader = Reader(db.engine, self.views.of)
        self.hub = Hub(db.engine, Frames(self.reader, self.views, app.jinja_env.get_template("_steps.html")))
        self.writer = Writer(db.engine, files, settings, self.hub.wake)


def parts() -> Parts:
    """The current app's parts."""
    return cast("Parts", current_app.extensions["milepost"])
