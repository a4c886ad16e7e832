"""How a server is ordered and recognised: what Hetzner sells, and what Tailscale allows."""

import hashlib

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.hetzner import READ_ONLY_TOKEN, Answer, hetzner_error
from tests.provisioning.steps import Ended, Steps


def taken(end: Ended) -> str:
    assert end.code == 0, end.log
    return end.outputs["taken"]


@pytest.mark.parametrize(
    ("region", "is_taken"),
    [
        ("", "cx23 in nbg1"),
        ("EU-North", "cx23 in hel1"),
        ("SIN", "cpx11 in sin"),
        ("new1", "cpx11 in new1"),
        ("af-south", "cpx11 in new1"),
    ],
)
def test_a_region_in_any_case_gets_what_is_sold_there(
    region: str, is_taken: str, steps: Steps, clouds: Clouds
) -> None:
    assert taken(steps.create(REGION=region)) == is_taken
    (server,) = clouds.servers.values()
    assert f"{server['server_type']['name']} in {server['location']['name']}" == is_taken


def test_what_is_sold_out_is_passed_over_in_the_order_of_preference(steps: Steps, clouds: Clouds) -> None:
    clouds.hetzner.sold_out = {("cx23", "nbg1")}
    clouds.hetzner.gone = {("cx23", "fsn1"), ("cx23", "hel1")}
    end = steps.create()
    assert taken(end) == "cpx22 in nbg1"
    assert [line for line in end.log.splitlines() if "rder" in line or "Not available" in line] == [
        "Preparing the order",
        "Ordering a cx23 in fsn1",
        "Not available: cx23 in fsn1: error during placement",
        "Ordering a cx23 in hel1",
        "Not available: cx23 in hel1: error during placement",
        "Ordering a cpx22 in nbg1",
    ]


def test_where_nothing_can_be_ordered_the_reason_names_what_was_tried(steps: Steps, clouds: Clouds) -> None:
    clouds.hetzner.gone = {("cx23", place) for place in ("nbg1", "fsn1", "hel1")}
    assert "sold out: cx23 in nbg1: error during placement; " in steps.create(SERVER_TYPE="cx23").error
    said = steps.create(SERVER_TYPE="cx23, cx33", REGION="us-west").error
    assert "Hetzner has none of cx23, cx33 in hil now" in said
    assert "region is none of eu-central, eu-north, us-east" in steps.create(REGION="mars").error
    assert clouds.servers == {}
    assert taken(steps.create(SERVER_TYPE="cx99 cpx22")) == "cpx22 in nbg1"


@pytest.mark.parametrize(
    "fault",
    [
        hetzner_error(503, "unavailable", "a service or product is currently not available"),
        hetzner_error(500, "server_error", "an error occurred"),
        (502, None),
    ],
    ids=["503", "500", "502"],
)
def test_a_passing_fault_is_waited_out(steps: Steps, clouds: Clouds, fault: Answer) -> None:
    clouds.faults["POST servers"] = [fault]
    assert steps.create().code == 0
    assert len(clouds.servers) == 1


def test_a_lost_answer_does_not_make_a_second_server(steps: Steps, clouds: Clouds) -> None:
    clouds.lose_next_answer_to("POST servers")
    assert steps.create().code == 0
    assert len(clouds.servers) == len(clouds.devices) == 1


def test_a_refusal_is_told_in_the_words_of_hetzner(steps: Steps, clouds: Clouds) -> None:
    assert "unable to authenticate" in steps.create(HCLOUD_TOKEN="another").error
    assert "only allowed to perform GET" in steps.create(HCLOUD_TOKEN=READ_ONLY_TOKEN).error
    assert clouds.servers == {}


def test_an_oauth_client_may_only_give_what_its_own_tag_owns(steps: Steps, clouds: Clouds) -> None:
    tailnet = clouds.tailnet
    tailnet.tags = ["tag:ci", "tag:agent"]  # "for both tags" may ask for both at once, never for one
    tailnet.owners["tag:agent"] = []
    advice = steps.create().error
    assert "requested tags [tag:agent] are invalid or not permitted" in advice
    assert "exactly the runner's tag" in advice
    tailnet.tags = ["tag:ci"]
    assert "not permitted" in steps.create().error
    assert "not permitted" in steps.create(TAILSCALE_TAG="tag:unknown").error
    tailnet.owners["tag:agent"], tailnet.scopes = ["tag:ci"], ["devices:core"]
    assert "the scopes auth_keys and devices:core" in steps.create().error
    assert clouds.servers == {}
    tailnet.scopes.append("auth_keys")
    assert steps.create().code == 0
    (device,) = clouds.devices.values()
    assert device["tags"] == ["tag:agent"]


def test_a_device_is_the_server_by_more_than_its_name(steps: Steps, clouds: Clouds) -> None:
    clouds.tailnet.devices["0"] = {"id": "0", "nodeId": "n0CNTRL"}  # one that says nothing of itself
    name, genuine = f"agent-{hashlib.sha256(b'job-7').hexdigest()[:12]}", clouds.address
    insiders = clouds.tailnet.add(name, ["100.64.6.66"])
    assert steps.create().outputs["tailscale_ip"] == genuine
    (device,) = (d for d in clouds.devices.values() if "tags" in d)
    assert device["hostname"] == name and insiders in clouds.devices.values()
    clouds.tailnet.add(name, ["100.64.6.67"], tags=["tag:agent"])  # of somebody who may give the tag
    clouds.tailnet.add(name, ["100.64.6.68"], tags=["tag:agent"], age=3600)  # older than the server
    again = steps.create()
    assert again.outputs["tailscale_ip"] == genuine
    steps.make_ready(clouds)
    del clouds.devices[device["id"]]
    said = steps.create().error
    assert "its device is no longer in the Tailscale network" in said and "Destroy agent" in said
    assert len(clouds.servers) == 1


def test_of_two_devices_that_could_be_a_new_server_none_is_trusted(steps: Steps, clouds: Clouds) -> None:
    assert steps.create().code == 0
    (device,) = clouds.devices.values()
    (server,) = clouds.servers.values()
    del server["labels"]["milepost-node"]
    clouds.tailnet.add(device["hostname"], ["100.64.6.67"], tags=["tag:agent"])
    assert "none of them is trusted" in steps.create(JOIN_SECONDS="9").error


def test_a_package_key_that_is_not_tailscales_is_refused_before_the_order(
    steps: Steps, clouds: Clouds
) -> None:
    known = "2596A99EAAB33821893C0A79458CA832957F5868"
    end = steps.create(TAILSCALE_PACKAGES_FINGERPRINT="")
    assert f"has not the fingerprint {known}, but {clouds.fingerprint}" in end.error
    clouds.keyring *= 2
    assert "has not the fingerprint" in steps.create().error, "two keys are one too many"
    clouds.keyring = b"<html>"
    assert "but none" in steps.create().error
    assert "404" in steps.create(TAILSCALE_PACKAGES_URL=f"{clouds.url}/packages/x").error
    assert clouds.servers == {} and clouds.tailnet.devices == {}
