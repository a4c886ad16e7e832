"""Apprise, which speaks to mail, Slack, ntfy and many more: https://appriseit.com.

It takes 60 MB and half a second to import, so only those do who have something to send.
"""

import logging
from collections.abc import Collection, Iterable

from apprise import Apprise, AppriseAsset
from gevent import Timeout

WITHIN = 30  # seconds for one service
LONGEST = 200  # characters of a reason
ASSET = AppriseAsset(app_id="Milepost", async_mode=False)
logging.getLogger("apprise").propagate = False  # it quotes addresses, and they hold secrets


def read_services(addresses: Iterable[str]) -> dict[str, Apprise]:
    """A sender for each address, by a name that tells no secret; raises ValueError."""
    found = {}
    for place, address in enumerate(addresses, 1):
        service = Apprise.instantiate(address, asset=ASSET)
        if not service:
            raise ValueError(f"must be Apprise addresses such as mailto://…: number {place} is none")
        sender = found[f"{service.service_name} {service.url_id()}"] = Apprise(asset=ASSET)  # type: ignore[no-untyped-call]
        sender.add(service)
    return found


def send(
    services: dict[str, Apprise], title: str, body: str, kind: str, only: Collection[str] = ()
) -> dict[str, str]:
    """Why services could not be told, by their names; `only` those, where there are any of that name."""
    problems = {}
    for name in [each for each in services if each in only] or list(services):
        try:
            with Timeout(WITHIN):
                said = services[name].notify(body, title, notify_type=kind, body_format="text")
        except Timeout:
            problems[name] = f"no answer within {WITHIN} s"
        except Exception as error:  # a plugin's own
            problems[name] = type(error).__name__
        else:
            if not said:
                told = [str(entry.message) for entry in said.logs()]
                problems[name] = (told or ["refused"])[-1][:LONGEST]
    return problems
