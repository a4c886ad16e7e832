"""Asks GitHub: the only outbound HTTP of the server, and every wait in it has a bound.

https://docs.github.com/en/rest/actions/workflows#create-a-workflow-dispatch-event
https://docs.github.com/en/rest/actions/workflow-runs
"""

import re
from collections.abc import Container
from datetime import UTC, datetime
from time import time
from typing import Any
from urllib.parse import quote

import requests
from gevent import Timeout

from webapp.config import Settings

CONNECT, READ, TOTAL = 3.05, 10, 15  # seconds
BOUND = 2 * TOTAL + 5  # seconds after which a dispatch that has no outcome was interrupted


class Refused(Exception):
    """GitHub did not do what was asked; the message names the cause and the cure.

    `retry_at` (Unix seconds) is the end of a rate limit.
    """

    def __init__(self, reason: str, retry_at: float = 0) -> None:
        super().__init__(reason)
        self.retry_at = retry_at


def words(title: object) -> list[str]:
    """The words of a run's name; the last that is the id of a known job names the job that it is of."""
    return re.findall(r"[A-Za-z0-9._-]+", title) if isinstance(title, str) else []


def dispatch(settings: Settings, inputs: dict[str, str]) -> dict[str, Any]:
    """Start a run; returns `workflow_run_id` and `html_url` where the server tells them. Raises Refused."""
    path = f"workflows/{quote(settings.dispatch_workflow, safe='')}/dispatches"
    body = {"ref": settings.dispatch_ref, "inputs": inputs}
    answer = _ask(settings, "POST", path, json=body | {"return_run_details": True})
    if answer.status_code == 422 and "return_run_details" in answer.text:  # Enterprise Server up to 3.19
        answer = _ask(settings, "POST", path, json=body)
    return _read(settings, answer)


def find_run(settings: Settings, job_id: str, since: float, known: Container[str] = ()) -> dict[str, Any]:
    """The newest run since then whose name carries the job id, but none of those known; {} without one.

    Raises Refused.
    """
    path = f"workflows/{quote(settings.dispatch_workflow, safe='')}/runs"
    created = datetime.fromtimestamp(since - 60, UTC).strftime(">=%Y-%m-%dT%H:%M:%SZ")  # clocks differ
    query = {"event": "workflow_dispatch", "created": created, "per_page": "100"}
    runs = _read(settings, _ask(settings, "GET", path, params=query)).get("workflow_runs", [])
    named = (run for run in runs if job_id in words(run.get("display_title")))
    return next((run for run in named if str(run.get("id")) not in known), {})


def get_run(settings: Settings, run_id: str) -> dict[str, Any]:
    """A run as its latest attempt stands. Raises Refused."""
    return _read(settings, _ask(settings, "GET", f"runs/{run_id}"))


def _ask(settings: Settings, method: str, path: str, **options: Any) -> requests.Response:
    def prove(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {settings.dispatch_token}"  # a netrc would come before
        return request

    url = f"{settings.dispatch_api_url}/repos/{settings.dispatch_repository}/actions/{path}"
    headers = {
        "Accept": "application/vnd.github+json",
        "X-GitHub-Api-Version": "2022-11-28",
        "User-Agent": "milepost",
    }
    try:
        with Timeout(TOTAL, requests.Timeout("")):
            return requests.request(
                method,
                url,
                headers=headers,
                auth=prove,
                timeout=(CONNECT, READ),
                allow_redirects=False,  # the token goes to this host alone
                **options,
            )
    except requests.Timeout:
        raise Refused(f"GitHub did not answer within {TOTAL} seconds; try again later") from None
    except requests.RequestException as error:
        kind = type(error).__name__
        raise Refused(f"GitHub cannot be reached ({kind}); check the network and DISPATCH_API_URL") from None


def _read(settings: Settings, answer: requests.Response) -> dict[str, Any]:
    """The object that GitHub answered with, {} without one. Raises Refused."""
    try:
        said = answer.json() if answer.content else {}
    except ValueError:
        said = {}
    said = said if isinstance(said, dict) else {}
    if answer.status_code in (200, 204):
        return said
    retry_at = _rate_limited_until(answer, str(said.get("message")))
    if retry_at:
        until = datetime.fromtimestamp(retry_at, UTC).strftime("%H:%M:%S")
        raise Refused(f"GitHub's rate limit is used up; try again after {until} UTC", retry_at)
    raise Refused(_reason(settings, answer.status_code, str(said.get("message", ""))[:200]))


def _rate_limited_until(answer: requests.Response, message: str) -> float:
    """https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api"""
    headers = answer.headers
    if answer.status_code not in (403, 429):
        return 0
    if headers.get("Retry-After", "").isdecimal():
        return time() + int(headers["Retry-After"])
    if headers.get("X-RateLimit-Remaining") == "0" and headers.get("X-RateLimit-Reset", "").isdecimal():
        return int(headers["X-RateLimit-Reset"])
    return time() + 60 if answer.status_code == 429 or "rate limit" in message else 0


def _reason(settings: Settings, status: int, message: str) -> str:
    """What an error answer of GitHub's means here, and what to do."""
    repository, workflow = settings.dispatch_repository, settings.dispatch_workflow
    if status == 401:
        return "GitHub does not know DISPATCH_TOKEN (401): it is wrong, expired or revoked; set a valid one"
    if status == 403:
        return f"DISPATCH_TOKEN may not do this in {repository} (403): it needs actions: write; {message}"
    if status == 404:
        missing = f"GitHub shows DISPATCH_TOKEN no workflow {workflow} in {repository} (404)"
        return f"{missing}: check DISPATCH_WORKFLOW, DISPATCH_REPOSITORY, and what the token may see"
    if 300 <= status < 400:
        return f"{repository} has moved ({status}): set DISPATCH_REPOSITORY and DISPATCH_API_URL anew"
    if status == 422 and "workflow_dispatch" in message:
        return f"{workflow} has no workflow_dispatch trigger on {settings.dispatch_ref} (422): add it there"
    if status == 422:
        return f"GitHub refused (422): {message}; check DISPATCH_REF and the inputs that {workflow} has there"
    return f"GitHub answers {status}; try again later"
