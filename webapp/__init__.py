"""Milepost: a live progress page for machines that a GitHub Actions workflow provisions.

Nothing of ours is imported here: gevent's patch (in `serving`) has to come before everything else.
"""

import os
import sys

if sys.stderr is None:  # closed: the next file or socket that is opened would get the log's lines
    sys.stderr = os.fdopen(os.dup2(os.open(os.devnull, os.O_WRONLY), 2), "w")
