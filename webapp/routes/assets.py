"""Static files: fingerprinted, compressed at the start, cached for a year; htmx comes out of its package."""

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flask import Flask, Response, abort, request

from webapp.config import ROOT

HTMX = ("htmx-2.min.js", "ext/hx-sse-2.min.js")
COMPRESSIBLE = ("text/html", "image/svg+xml")


@dataclass(frozen=True)
class Asset:
    """A file as it is sent; its address changes with its content."""

    url: str
    mimetype: str
    plain: bytes
    gzipped: bytes


def set_up(app: Flask, below: str) -> None:
    """Serve `static/` and htmx; `asset(name)` gives templates the address, unknown names are errors.

    `below` is the path of PUBLIC_URL.
    """
    contents = {path.name: path.read_bytes() for path in (ROOT / "static").iterdir() if path.is_file()}
    contents["htmx.js"] = htmx()
    assets = {name: _asset(name, content) for name, content in contents.items()}
    by_url = {asset.url: asset for asset in assets.values()}

    def static(name: str) -> Response:
        asset = by_url.get(request.path) or abort(404)
        response = Response(asset.plain, mimetype=asset.mimetype)
        if request.accept_encodings["gzip"]:
            response.data = asset.gzipped
            response.headers["Content-Encoding"] = "gzip"
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        response.vary.add("Accept-Encoding")
        return response

    app.add_url_rule("/static/<name>", view_func=static)
    app.after_request(compress)
    app.jinja_env.globals["asset"] = lambda name: below + assets[name].url


def htmx() -> bytes:
    """htmx 2 and its SSE extension, as the package django-htmx carries them, in one file: one request."""
    spec = find_spec("django_htmx")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the package django-htmx is not installed")
    folder = Path(spec.submodule_search_locations[0], "static", "django_htmx")
    return b";\n".join((folder / name).read_bytes() for name in HTMX)


def compress(response: Response) -> Response:
    """A page or picture in gzip, for a client that takes it; never a stream, never the operator's pages.

    Those say back what was asked for beside a secret (csrf), which its compressed length would betray:
    https://www.breachattack.com/
    """
    is_secret = request.blueprint in ("operator", "sign_in")
    if is_secret or response.mimetype not in COMPRESSIBLE or "Content-Encoding" in response.headers:
        return response
    response.vary.add("Accept-Encoding")
    if not response.is_streamed and response.data and request.accept_encodings["gzip"]:
        response.data = gzip.compress(response.data, 6, mtime=0)
        response.headers["Content-Encoding"] = "gzip"
    return response


def _asset(name: str, content: bytes) -> Asset:
    fingerprint = hashlib.sha256(content).hexdigest()[:12]
    stem, dot, ending = name.rpartition(".")
    mimetype = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Asset(
        f"/static/{stem}.{fingerprint}{dot}{ending}", mimetype, content, gzip.compress(content, mtime=0)
    )
