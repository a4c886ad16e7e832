"""The progress page in Firefox: a short run, for what only Chromium is asked elsewhere."""

import time
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.firefox.service import Service

from tests.support.browser import find_firefox, geckodriver
from tests.support.server import Server, wait_until

pytestmark = [pytest.mark.one_database, pytest.mark.browser]


@pytest.fixture(scope="module")
def firefox() -> Iterator[webdriver.Firefox]:
    options = webdriver.FirefoxOptions()
    options.add_argument("-headless")
    options.binary_location = find_firefox() or "firefox"
    driver = webdriver.Firefox(options=options, service=Service(geckodriver()))
    yield driver
    driver.quit()


def test_firefox_follows_a_run_keeps_what_is_selected_and_reads_alike(
    server: Server, job_id: str, firefox: webdriver.Firefox
) -> None:
    def text(selector: str) -> str:
        return firefox.find_element(By.CSS_SELECTOR, selector).text

    server.report(job_id, "ansible_started", repository="acme/fleet", workflow_run_id=1)
    firefox.get(server.link(job_id))
    assert text("#now") == "Configuring the agent"
    wait_until(lambda: not firefox.find_elements(By.ID, "unstarted"))
    firefox.execute_script("""window.loads = 1
      getSelection().selectAllChildren(document.getElementById("run"))""")
    before = firefox.find_element(By.ID, "signal").get_attribute("datetime")
    server.report(job_id, "heartbeat")
    wait_until(lambda: firefox.find_element(By.ID, "signal").get_attribute("datetime") != before)
    place = firefox.find_element(By.ID, "cover").rect["y"]
    server.report(job_id, "ansible_complete")
    wait_until(lambda: text("#now") == "Finishing the set-up")
    assert firefox.title == f"Step 5 of 5 · {job_id}"
    assert firefox.execute_script("return getSelection().toString()").startswith("View the run on GitHub")
    assert abs(firefox.find_element(By.ID, "cover").rect["y"] - place) <= 4
    server.report(job_id, "running", result_url="https://example.com/agent", sent_at=time.time())
    wait_until(lambda: firefox.find_elements(By.ID, "result"))
    assert firefox.execute_script("return window.loads") == 1
    assert not firefox.find_elements(By.CSS_SELECTOR, "[aria-current=step]")
