"""The page about the API: what it says to type, typed."""

import os
import re
import subprocess

import pytest

from tests.support.server import KEY, OPERATOR_TOKEN, ROOT, Server

CALL = re.compile(r"^## [^\n]*: `(\w+) ([^`]+)`, (\d{3})\n(.*?)(?=^## |\Z)", re.M | re.S)
pytestmark = pytest.mark.one_database


def test_each_call_of_the_api_page_is_answered_as_it_says(dispatcher: Server) -> None:
    text = (ROOT / ".github" / "docs" / "api.md").read_text()
    calls = CALL.findall(text)
    rules = {f"{method} {path.replace('JOB_ID', '<id:job_id>')}" for method, path, *_ in calls}
    told = {
        f"{method} {rule}"
        for rule, methods in _routes(dispatcher)
        for method in methods
        if rule.startswith(("/api", "/metrics", "/healthz"))
    }
    assert rules == told
    environment = {**os.environ, "MILEPOST": dispatcher.url, "OPERATOR_TOKEN": OPERATOR_TOKEN}
    environment["GITHUB_CALLBACK_SECRET"] = KEY
    for method, path, status, section in calls:
        [block] = re.findall(r"```sh\n(.*?)```", section, re.S)
        watched = 'curl() { command curl --write-out "%{stderr}%{http_code}" "$@"; }\n' + block
        said = subprocess.run(
            ["bash", "-euc", watched], env=environment, capture_output=True, text=True, check=False
        )
        assert (said.returncode, said.stderr) == (0, status), f"{method} {path}: {said.stdout}"


def _routes(server: Server) -> list[tuple[str, list[str]]]:
    """(rule, methods) of each route of the app."""
    listed = server.flask("routes").stdout.splitlines()[2:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in listed]
    routes: list[tuple[str, list[str]]] = []
    for _, methods, rule in rows:
        for verb in re.findall(r"<any\((.*?)\):verb>", rule) or [""]:
            for each in verb.split(", "):
                plain = re.sub(r"<any\(.*?\):verb>", each, rule)
                routes.append((plain, methods.split(", ")))
    return routes
