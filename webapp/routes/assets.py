"""Static files: fingerprinted, compressed at the start, cached for a year; htmx comes out of its package."""

import gzip
import hashlib
import mimetypes
from importlib.resources import files

from flask import Flask, Response, abort, g, request

from webapp.config import ROOT

HTMX = ("htmx-2.min.js", "ext/hx-sse-2.min.js")  # with its SSE extension, in one file: one request
COMPRESSIBLE = ("text/html", "image/svg+xml")


def set_up(app: Flask, below: str) -> None:
    """Serve `static/` and htmx; `asset(name)` gives templates the address, unknown names are errors.

    `below` is the path of PUBLIC_URL.
    """
    contents = {path.name: path.read_bytes() for path in (ROOT / "static").iterdir() if path.is_file()}
    package = files("django_htmx") / "static" / "django_htmx"
    contents["htmx.js"] = b";\n".join((package / name).read_bytes() for name in HTMX)
    addresses, served = {}, {}
    for name, content in contents.items():
        stem, _, ending = name.rpartition(".")
        addresses[name] = f"{stem}.{hashlib.sha256(content).hexdigest()[:12]}.{ending}"
        served[addresses[name]] = content, gzip.compress(content)

    def static(name: str) -> Response:
        content, g.gzipped = served.get(name) or abort(404)
        headers = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(content, mimetype=mimetypes.guess_type(name)[0], headers=headers)

    app.add_url_rule("/static/<name>", view_func=static)
    app.after_request(compress)
    app.jinja_env.globals["asset"] = lambda name: f"{below}/static/{addresses[name]}"


def compress(response: Response) -> Response:
    """A page, picture or asset in gzip, for a client that takes it; never a stream or an operator's page.

    Such a page says back what was asked for beside a secret (csrf), which its compressed length would betray:
    https://www.breachattack.com/
    """
    is_secret, gzipped = request.blueprint in ("operator", "sign_in"), g.get("gzipped")
    if is_secret or not (gzipped or response.mimetype in COMPRESSIBLE):
        return response
    response.vary.add("Accept-Encoding")
    if not response.is_streamed and response.data and request.accept_encodings["gzip"]:
        response.data = gzipped or gzip.compress(response.data, 6, mtime=0)
        response.headers["Content-Encoding"] = "gzip"
    return response
