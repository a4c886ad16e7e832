"""nginx and Caddy, as .github/deploy sets them up, on a port of this machine."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.browser import PATH
from tests.support.server import ROOT, free_port

DEPLOY = ROOT / ".github" / "deploy"
NGINX = """
daemon off; pid {folder}/pid; error_log stderr; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{ {temporary} include {folder}/site.conf; }}
"""


def make_certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1 by nobody; its key stands beside it."""
    certificate = folder / "certificate.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    files = ["-out", str(certificate), "-keyout", str(folder / "key.pem")]
    subprocess.run(["openssl", "req", "-x509", *names, *kind, *files], check=True, capture_output=True)
    return certificate


@contextmanager
def nginx(folder: Path, pages: int, machines: int, below: str) -> Iterator[str]:
    """nginx before two servers, given by their ports; its address."""
    site, port = (DEPLOY / "nginx.conf").read_text(), free_port()
    for was, now in {
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/letsencrypt/live/milepost.example/fullchain.pem": str(make_certificate(folder)),
        "/etc/letsencrypt/live/milepost.example/privkey.pem": f"{folder}/key.pem",
        "127.0.0.1:8000": f"127.0.0.1:{pages}",
        "127.0.0.1:8001": f"127.0.0.1:{machines}",
        "location /api/ {": f"location {below}/api/ {{",
        "location / {": f"location {below or '/'} {{",
    }.items():
        assert was in site, was
        site = site.replace(was, now)
    (folder / "site.conf").write_text(site)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, temporary=temporary, user=user))
    with _running(["nginx", "-c", str(config), "-p", str(folder)], {}):
        yield f"https://127.0.0.1:{port}"


@contextmanager
def caddy(folder: Path, pages: int, machines: int, below: str) -> Iterator[str]:
    """Caddy before two servers, given by their ports; its address."""
    address = f"https://127.0.0.1:{free_port()}"
    own = f"{{\n\tadmin off\n\tauto_https disable_redirects\n\tstorage file_system {folder}\n}}\n"
    begin, site = "{$SITE:milepost.example} {\n", (DEPLOY / "Caddyfile").read_text()
    assert begin in site
    tls = f"{begin}\ttls {make_certificate(folder)} {folder}/key.pem\n"
    config = folder / "Caddyfile"
    config.write_text(own + site.replace(begin, tls))
    settings = {"SITE": address, "PAGES": f"127.0.0.1:{pages}", "MACHINES": f"127.0.0.1:{machines}"}
    settings |= {"BELOW": below} if below else {}
    with _running(["caddy", "run", "--config", str(config)], {"HOME": str(folder), **settings}):
        yield address


@contextmanager
def _running(command: list[str], settings: dict[str, str]) -> Iterator[None]:
    environ = {"PATH": PATH, **settings}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)
