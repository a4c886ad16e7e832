"""gunicorn's settings for Milepost, but requests arrive, and watched jobs are compared, within a second."""

from typing import Any

from webapp import serving
from webapp.serving import *  # noqa: F403


def post_worker_init(worker: Any) -> None:  # type: ignore[no-redef]
    from webapp import worker as ours
    from webapp.streams import siblings

    ours.ARRIVES_WITHIN = siblings.COMPARE_EVERY = 1.0
    serving.post_worker_init(worker)
