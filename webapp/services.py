"""Apprise, which speaks to mail, Slack, ntfy and many more: https://appriseit.com.

It takes 60 MB and half a second to import, so only those do who have something to send.
"""

import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apprise import NotifyBase
    from apprise.logger import NotifyLogEntry

WITHIN = 30  # seconds for all services, which are told side by side
LONGEST = 200  # characters of a reason


def read_services(addresses: str) -> tuple["NotifyBase", ...]:
    """What speaks to each address, of which spaces separate several; raises ValueError."""
    from apprise import Apprise, AppriseAsset

    logging.getLogger("apprise").propagate = False  # it quotes addresses, and they hold secrets
    asset = AppriseAsset(app_id="Milepost")
    services = []
    for place, address in enumerate(addresses.split(), 1):
        if not (service := Apprise.instantiate(address, asset=asset)):
            raise ValueError(f"must be Apprise addresses such as mailto://…: number {place} is none")
        services.append(service)
    return tuple(services)


def send(
    services: Collection["NotifyBase"], title: str, body: str, kind: str, only: Collection[str] = ()
) -> dict[str, str]:
    """Why each could not be told, "" where it was, by names without secrets; `only` those, if any is left."""
    from apprise import Apprise

    names = [f"{each.service_name} {each.url_id()}" for each in services]  # type: ignore[no-untyped-call]
    left = [service for name, service in zip(names, services, strict=True) if name in only]
    said = Apprise(left or list(services)).notify(
        body, title, notify_type=kind, body_format="text", timeout=WITHIN
    )
    told = {f"{each.name} {each.url_id}": "" if each else _last(each.logs()) for each in said}
    return told or {"Apprise": _last(said.logs())}


def _last(logs: Iterable["NotifyLogEntry"]) -> str:
    return ["refused", *(str(entry.message) for entry in logs)][-1][:LONGEST]
