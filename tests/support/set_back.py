"""gunicorn's settings for Milepost on a machine whose clock goes back an hour once `set-back` is in HOME."""

import os
import time as system
from pathlib import Path
from typing import Any

from webapp import serving
from webapp.serving import *  # noqa: F403

HOUR = 3600.0
_now, _mark = system.time, Path(os.environ["HOME"], "set-back")
system.time = lambda: _now() - (HOUR if _mark.exists() else 0)


def post_worker_init(worker: Any) -> None:  # type: ignore[no-redef]
    from webapp.streams import hub

    hub.COMMENT_EVERY = 1.0
    serving.post_worker_init(worker)
