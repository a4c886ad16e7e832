"""gunicorn's settings for Milepost, but a request has one second to arrive."""

from typing import Any

from webapp import serving
from webapp.serving import *  # noqa: F403


def post_worker_init(worker: Any) -> None:  # type: ignore[no-redef]
    from webapp import worker as ours

    ours.ARRIVES_WITHIN = 1.0
    serving.post_worker_init(worker)
