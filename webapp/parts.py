"""The parts that the doors share; `create_app` makes them, once per app."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from flask import current_app

from webapp.config import Settings
from webapp.page.view import Views
from webapp.refusals import Refusals
from webapp.rules.pipeline import Pipeline
from webapp.signing import OperatorSignatures, ShareLinks
from webapp.storage.writer import Writer
from webapp.streams.hub import Hub


@dataclass(frozen=True)
class Parts:
    """What a door needs to find, tell and show."""

    settings: Settings
    pipelines: Mapping[str, Pipeline]
    links: ShareLinks
    badges: ShareLinks
    signatures: OperatorSignatures
    writer: Writer
    views: Views
    hub: Hub
    refusals: Refusals

    def progress_url(self, job_id: str, link: int) -> str:
        """The address that a watcher is given."""
        return f"{self.settings.public_url}/p/{self.links.token(job_id, link)}"

    def badge_url(self, job_id: str, link: int) -> str:
        """The address of the badge: it opens nothing else, and ends with the link."""
        return f"{self.settings.public_url}/p/{self.badges.token(job_id, link)}/badge.svg"


def parts() -> Parts:
    """The current app's parts."""
    return cast("Parts", current_app.extensions["milepost"])
