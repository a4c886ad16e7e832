"""Asks GitHub: the only outbound HTTP of the server's own, and every wait and size in it has a bound.

https://docs.github.com/en/rest/actions/workflows#create-a-workflow-dispatch-event
https://docs.github.com/en/rest/actions/workflow-runs
"""

import re
from collections.abc import Container
from datetime import UTC, datetime
from time import time
from typing import Any

import requests
from gevent import Timeout
from gevent.lock import BoundedSemaphore
from urllib3.exceptions import HTTPError

from webapp.config import Settings
from webapp.rules.pipeline import Pipeline
from webapp.rules.report import BadField, parse

CONNECT, READ, TOTAL = 3.05, 10, 15  # seconds
BOUND = 2 * TOTAL + 5  # seconds after which a dispatch that has no outcome was interrupted
LARGEST_ANSWER = 4 * 1024 * 1024  # bytes; a hundred runs have about two
LONGEST_PAUSE = 3600.0  # seconds; of a rate limit
HEADERS = {
    "Accept": "application/vnd.github+json",
    "X-GitHub-Api-Version": "2022-11-28",
    "User-Agent": "milepost",
}
_asking = BoundedSemaphore(4)  # fewer than gevent's ten threads, which look names up for everybody


class Refused(Exception):
    """GitHub did not do what was asked; the message names the cause and the cure.

    `retry_at` (Unix seconds) is the end of a rate limit.
    """

    def __init__(self, reason: str, retry_at: float = 0) -> None:
        super().__init__(reason)
        self.retry_at = retry_at


def workflow_of(pipeline: Pipeline, settings: Settings) -> str:
    """The workflow that a dispatch of this pipeline runs, its file or its number; safe in a path."""
    return pipeline.workflow or settings.dispatch_workflow  # the built-in pipeline alone may leave it open


def words(title: object) -> list[str]:
    """The words of a run's name; the last that is the id of a known job names the job that it is of."""
    return re.findall(r"[A-Za-z0-9._-]+", title) if isinstance(title, str) else []


def dispatch(settings: Settings, workflow: str, inputs: dict[str, str]) -> dict[str, Any]:
    """Start a run; its `id` and `html_url` where the server tells them. Raises Refused."""
    path = f"workflows/{workflow}/dispatches"
    body = {"ref": settings.dispatch_ref, "inputs": inputs}
    try:
        said = ask(settings, workflow, path, "POST", json=body | {"return_run_details": True})
    except Refused as refused:
        if "return_run_details" not in str(refused):  # Enterprise Server up to 3.19
            raise
        said = ask(settings, workflow, path, "POST", json=body)
    return {"id": said.get("workflow_run_id"), "html_url": said.get("html_url")}


def find_run(
    settings: Settings, workflow: str, job_id: str, since: float, known: Container[str] = ()
) -> dict[str, Any]:
    """The newest run since then whose name carries the job id, but none of those known; {} without one.

    Raises Refused.
    """
    created = datetime.fromtimestamp(since - 60, UTC).strftime(">=%Y-%m-%dT%H:%M:%SZ")  # clocks differ
    query = {"event": "workflow_dispatch", "created": created, "per_page": "100"}
    runs = ask(settings, workflow, f"workflows/{workflow}/runs", params=query).get("workflow_runs")
    for run in runs if isinstance(runs, list) else ():
        is_named = isinstance(run, dict) and job_id in words(run.get("display_title"))
        if is_named and str(run.get("id")) not in known:
            return dict(run)
    return {}


def ask(settings: Settings, about: str, path: str, method: str = "GET", **options: Any) -> dict[str, Any]:
    """The JSON object of a good answer, {} of one without a body; `about` is for words. Raises Refused."""
    answer, body = _send(settings, method, path, **options)
    if retry_at := _rate_limited_until(answer, body):
        until = datetime.fromtimestamp(retry_at, UTC).strftime("%H:%M:%S")
        raise Refused(f"GitHub's rate limit is used up; try again after {until} UTC", retry_at)
    try:
        said = parse(body) if len(body) <= LARGEST_ANSWER else {}
    except BadField:
        said = {}
    if answer.status_code == 204 or (answer.status_code == 200 and said):
        return said
    message = " ".join(str(said.get("message") or "").split())[:300]
    raise Refused(_reason(settings, about, answer.status_code, message))


def _send(settings: Settings, method: str, path: str, **options: Any) -> tuple[requests.Response, bytes]:
    url = f"{settings.dispatch_api_url}/repos/{settings.dispatch_repository}/actions/{path}"
    options["headers"] = HEADERS | {"Authorization": f"Bearer {settings.dispatch_token}"}
    options["auth"] = lambda request: request  # or a netrc would replace the token
    options["allow_redirects"] = False  # the token goes to this host alone
    try:
        with (
            Timeout(TOTAL, requests.Timeout("")),
            _asking,
            requests.request(method, url, timeout=(CONNECT, READ), stream=True, **options) as answer,
        ):
            return answer, answer.raw.read(LARGEST_ANSWER + 1, decode_content=True)
    except requests.Timeout:
        raise Refused(f"GitHub did not answer within {TOTAL} seconds; try again later") from None
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        kind = type(error).__name__
        raise Refused(f"GitHub cannot be reached ({kind}); check the network and DISPATCH_API_URL") from None


def _rate_limited_until(answer: requests.Response, body: bytes) -> float:
    """https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api"""
    if answer.status_code not in (403, 429):
        return 0
    now, headers = time(), answer.headers
    after, reset = headers.get("Retry-After", ""), headers.get("X-RateLimit-Reset", "")
    if re.fullmatch("[0-9]{1,9}", after):
        return now + min(int(after), LONGEST_PAUSE)
    if headers.get("X-RateLimit-Remaining") == "0" and re.fullmatch("[0-9]{1,11}", reset):
        return min(max(int(reset), now + 1), now + LONGEST_PAUSE)
    return now + 60 if answer.status_code == 429 or b"rate limit" in body[:10_000] else 0


_REASONS = {  # what an answer means here, by its status, and what to do
    200: "GitHub's answer was empty, too large or no JSON object: is it GitHub? Check DISPATCH_API_URL",
    401: "GitHub does not know DISPATCH_TOKEN (401): it is wrong, expired or revoked; set a valid one",
    403: "DISPATCH_TOKEN may not do this in {repository} (403): it needs actions: write; {message}",
    404: "GitHub shows DISPATCH_TOKEN no {workflow} in {repository} (404): check DISPATCH_WORKFLOW, "
    "DISPATCH_REPOSITORY, and what the token may see",
    422: "GitHub refused (422): {message}; {cure}",
}
_CURES = {  # of what a 422 says
    "workflow_dispatch' trigger": "{workflow} has no workflow_dispatch trigger on {ref}: add it there",
    "No ref found": "the repository has no branch or tag {ref}: set DISPATCH_REF to one",
    "disabled workflow": "{workflow} is disabled: enable it on the repository's Actions page",
    "Unexpected inputs": "{workflow} does not have all inputs that are sent: add them, or list its own as "
    "`inputs` in the pipeline's file",
    "Required input": "{workflow} requires an input that is not sent: make it optional",
    "not in the list of allowed values": "{workflow} allows other values for an input: add this one there",
    "parse": "{workflow} on {ref} is not a valid workflow: mend it",
    "": "check DISPATCH_REF and the inputs of {workflow}",
}


def _reason(settings: Settings, workflow: str, status: int, message: str) -> str:
    words = {"workflow": workflow, "repository": settings.dispatch_repository, "ref": settings.dispatch_ref}
    if 300 <= status < 400:
        reason = "{repository} has moved ({status}): set DISPATCH_REPOSITORY and DISPATCH_API_URL anew"
    else:
        reason = _REASONS.get(status, "GitHub answers {status}; try again later")
    cure = next(cure for said, cure in _CURES.items() if said.lower() in message.lower())
    return reason.format(**words, status=status, message=message, cure=cure.format(**words))
