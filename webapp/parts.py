"""The parts that the doors share; `create_app` makes them, once per app."""

from dataclasses import dataclass
from typing import cast

from flask import current_app

from webapp.config import Settings
from webapp.page.view import Views
from webapp.signing import Links
from webapp.storage.writer import Writer
from webapp.streams.hub import Hub


@dataclass(frozen=True)
class Parts:
    """What a door needs to find, tell and show."""

    settings: Settings
    links: Links
    writer: Writer
    views: Views
    hub: Hub


def parts() -> Parts:
    """The current app's parts."""
    return cast("Parts", current_app.extensions["milepost"])
