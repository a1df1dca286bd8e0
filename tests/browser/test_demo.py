"""The demo in a real browser: a picture is uploaded, boxes appear, the slider hides them, and the density shows.

Needs Chromium and its driver; `make browser` runs it. With DRMM_SCREENSHOTS set to a folder, each step is kept there.
"""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
    return os.environ.get("DRMM_DEMO_PICTURE", str(path))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folders of two models; of others if the environment names them."""
    if "DRMM_DEMO_MODELS" in os.environ:
        return os.environ["DRMM_DEMO_MODELS"].split(os.pathsep)
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        folders.append(str(tmp_path_factory.mktemp("model")))
        DrmmForObjectDetection(tiny_config()).save_pretrained(folders[-1])
        DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, score_threshold=0.0).save_pretrained(
            folders[-1]
        )
    return folders


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    """Start the demo and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "demo.log"
    command = [sys.executable, "-m", "drmm_hf", "demo", *models, "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser(address):
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1500"):
        options.add_argument(option)
    browser = webdriver.Chrome(options)
    browser.get(address)
    yield browser
    keep(browser, "last")
    browser.quit()


def keep(browser, name):
    if "DRMM_SCREENSHOTS" in os.environ:
        browser.save_screenshot(str(Path(os.environ["DRMM_SCREENSHOTS"]) / f"{name}.png"))


def wait(browser, condition):
    return WebDriverWait(browser, 120, poll_frequency=0.3).until(lambda _: condition())


def pictures(browser, kind):
    """Return the addresses of the drawn pictures that are shown: of `boxes` or `density`."""
    images = browser.find_elements(By.CSS_SELECTOR, f"[id^={kind}-] img")
    return [image.get_attribute("src") for image in images if image.is_displayed()]


def listed(browser):
    """Return the numbers that the tables of boxes show."""
    text = " ".join(table.text for table in browser.find_elements(By.CSS_SELECTOR, "[id^=table-]"))
    return re.findall(r"\d+\.\d+", text)


def set_threshold(browser, value):
    """Type a number beside the slider, again if the page drew the field anew meanwhile."""

    def typed():
        field = browser.find_element(By.CSS_SELECTOR, "input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value)
        return field.get_attribute("value") == value

    wait(browser, typed)
    browser.find_element(By.CSS_SELECTOR, "input[type=number]").send_keys(Keys.TAB)


def test_upload_slider_and_density(browser, models, picture):
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    keep(browser, "1_start")
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(picture)
    wait(browser, lambda: len(pictures(browser, "boxes")) == len(models))
    wait(browser, lambda: listed(browser))
    before = pictures(browser, "boxes")
    keep(browser, "2_boxes")

    set_threshold(browser, "1")
    wait(browser, lambda: not listed(browser))
    wait(browser, lambda: not set(pictures(browser, "boxes")) & set(before))
    keep(browser, "3_nothing_above")
    none = pictures(browser, "boxes")
    set_threshold(browser, "0.001")  # both models have boxes above: a picture without any is known already
    wait(browser, lambda: listed(browser) and not set(pictures(browser, "boxes")) & set(none))

    after = pictures(browser, "boxes")
    browser.find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
    wait(browser, lambda: not set(pictures(browser, "boxes")) & set(after))
    keep(browser, "4_hard_sides")

    next(tab for tab in browser.find_elements(By.CSS_SELECTOR, "[role=tab]") if tab.text == "Density").click()
    wait(browser, lambda: len(pictures(browser, "density")) == len(models))
    keep(browser, "5_density")
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if "favicon" not in message and "net::" not in message]
