""".github/docs/provisioning.md, held against the workflow and the stand-ins."""

import json
import re
import tomllib

import pytest
import yaml

from tests.provisioning.clouds import Clouds
from tests.provisioning.steps import Steps
from tests.support.server import ROOT

PAGE = (ROOT / ".github/docs/provisioning.md").read_text()
WORKFLOWS = [
    (ROOT / ".github/workflows" / name).read_text()
    for name in ("provision-agent.yml", "destroy-agent.yml", "sweep.yml")
]


def first_column(heading: str) -> list[str]:
    """The names in the first column of the table under a heading."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_page_names_every_secret_and_variable_and_no_other() -> None:
    for heading, context in (("Secret", "secrets"), ("Variable", "vars")):
        used = set(re.findall(rf"{context}\.(\w+)", "".join(WORKFLOWS)))
        assert set(first_column(heading)) == used


def test_the_page_has_the_regions_that_the_run_has() -> None:
    regions = tomllib.loads((ROOT / ".github/provisioning/regions.toml").read_text())
    table = PAGE.split("| Region |")[1].split("\n\n")[0]
    rows = [
        [re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:4]] for row in table.splitlines()[2:]
    ]
    assert {name: {"locations": places, "types": types} for (name,), places, types in rows} == regions


def test_the_access_policy_of_the_page_lets_a_run_through(steps: Steps, clouds: Clouds) -> None:
    policy = json.loads(PAGE.split("```json")[1].split("```")[0])
    clouds.tailnet.owners = policy["tagOwners"]
    (runner,) = policy["grants"][0]["src"]
    assert f"with the one tag `{runner}`" in PAGE
    clouds.tailnet.tags = [runner]
    assert steps.create().code == 0
    assert [device["tags"] for device in clouds.devices.values()] == [policy["grants"][0]["dst"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=["provision", "destroy", "sweep"])
def test_the_page_calls_a_workflow_and_its_inputs_by_their_names(workflow: str) -> None:
    read = yaml.safe_load(workflow)
    assert f"*Actions → {read['name']}" in PAGE
    for name, of in read[True]["workflow_dispatch"]["inputs"].items():  # YAML reads `on` as true
        if of.get("type") == "boolean":
            said = of["description"].split(";")[0].split(",")[0]
            assert said in PAGE.replace("\n   ", " "), name
