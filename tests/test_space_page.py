"""The page of a Space: what it says in words, and a browser that clicks through it."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_datasets import picture
from test_space import APP, ROOT, save_models

from trainers.space import Explorer, read_upload
from trainers.space_page import build_page

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def explorer(models) -> Explorer:
    return Explorer(models / "stack")


def texts(explorer: Explorer) -> str:
    """All that the page says in Markdown."""
    components = build_page(explorer).get_config_file()["components"]
    return "\n".join(each["props"]["value"] for each in components if each["type"] == "markdown")


def test_what_a_model_does_not_have_is_said_in_a_sentence(models):
    said = texts(Explorer(models / "sjea"))
    assert f"`{models / 'sjea'}`: S-JEA stack of 2 levels, 0." in said and "images of 32x32 pixels" in said
    assert "SJeaModel, which gives no attention maps" in said
    assert "**Level 1.** A map of patches needs features on a grid" in said
    said = texts(Explorer(models / "one"))
    assert "C-JEPA encoder, 0.0" in said and "This model has one level" in said and "gives no" not in said


@contextmanager
def served(model: Path, log: Path):
    """The page's address, while a process serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(log.parent / "gradio"), "CJEPA_GALLERY": "",
    }  # fmt: skip
    command = [sys.executable, APP, model, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while "Running on local URL" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def opened(address: str, folder: Path):
    """The page in a browser, and what its console, its errors and its requests elsewhere were."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            folder, executable_path=CHROMIUM, headless=False, args=FLAGS, viewport={"width": 1280, "height": 1000}
        )
        page, complaints = browser.pages[0], []
        page.set_default_timeout(15_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:"))
                else complaints.append(request.url))  # fmt: skip
        page.goto(address)
        yield page, complaints
        browser.close()


def pictures(page, selector: str) -> list[np.ndarray]:
    """The pictures that are shown there, as they were sent."""
    addresses = page.locator(f"{selector} img").evaluate_all("images => images.map(image => image.src)")
    return [np.array(Image.open(io.BytesIO(urllib.request.urlopen(each).read())).convert("RGB")) for each in addresses]


def wait_for(page, selector: str, expected: list[np.ndarray]):
    """Waits until just these pictures are shown there; none of them is of one colour."""
    deadline = time.monotonic() + 15
    while True:
        found = pictures(page, selector)
        if len(found) == len(expected) and all(map(np.array_equal, found, expected)):
            assert all(each.std() > 5 for each in found)
            return
        assert time.monotonic() < deadline, f"{selector}: {[each.shape for each in found]}"
        page.wait_for_timeout(100)


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no chromium to open the page with")
def test_a_browser_clicks_through_the_page(models, explorer, tmp_path):
    mine, broken = tmp_path / "mine.png", tmp_path / "broken.png"
    picture(7, (60, 80)).save(mine)
    broken.write_bytes(b"no image")
    first, fifth, uploaded = explorer.examples[0], explorer.examples[5], read_upload(mine)
    with served(models / "stack", tmp_path / "log") as address, opened(address, tmp_path / "b") as (page, complaints):
        attention(page, explorer, first, fifth, uploaded, mine, broken)
        page.get_by_role("tab", name="PCA").click()
        wait_for(page, "#pca", explorer.components(explorer.examples, 1)[0])
        panel(page).get_by_label("Level 0").click()
        wait_for(page, "#pca", explorer.components(explorer.examples, 0)[0])
        panel(page).locator("input[type=file]").set_input_files([mine, mine])
        wait_for(page, "#pca", explorer.components([uploaded, uploaded], 0)[0])

        page.get_by_role("tab", name="Nearest").click()
        wait_for(page, "#nearest", [np.array(image) for image, _ in explorer.nearest(first)[1]])
        panel(page).locator(".examples button").nth(5).click()
        wait_for(page, "#query", [explorer.seen(fifth)])
        found = explorer.nearest(fifth)[1]
        wait_for(page, "#nearest", [np.array(image) for image, _ in found])
        assert page.locator("#nearest .caption-label").all_inner_texts() == [text for _, text in found]

        page.get_by_role("tab", name="Levels").click()
        panel(page).locator("input[type=file]").set_input_files(mine)
        for level, found in enumerate(explorer.nearest(uploaded)):
            wait_for(page, f"#pca{level}", explorer.components([uploaded, *explorer.examples], level)[0][:1])
            wait_for(page, f"#nearest{level}", [np.array(image) for image, _ in found])
        assert complaints == []


def panel(page):
    """The tab that is open."""
    return page.locator("[role=tabpanel]:visible")


def click(image, x: float, y: float):
    """Clicks on an image, at shares of its width and height."""
    box = image.bounding_box()
    image.click(position={"x": x * box["width"], "y": y * box["height"]})


def attention(page, explorer: Explorer, first, fifth, uploaded, mine: Path, broken: Path):
    """Clicks through the first tab."""

    def shows(image, *which):
        for selector, expected in zip(("#seen", "#attention"), explorer.attention(image, *which), strict=True):
            wait_for(page, selector, [expected])

    shows(first, 1, 0)
    # in row 2, column 1 of four by three
    click(page.locator("#seen img"), 0.5, 0.6)
    shows(first, 1, 0, (2, 1))
    panel(page).get_by_label("Level 0").click()
    shows(first, 0, 1)
    panel(page).get_by_role("slider").focus()
    page.keyboard.press("ArrowLeft")
    shows(first, 0, 0)
    click(page.locator("#attention img"), 0.98, 0.02)
    shows(first, 0, 0, (0, 5))
    page.get_by_role("button", name="From all patches").click()
    shows(first, 0, 0)
    panel(page).locator(".examples button").nth(5).click()
    shows(fifth, 0, 0)
    panel(page).locator("input[type=file]").set_input_files(broken)
    sentence = "broken.png cannot be read (not an image); give an image, such as JPEG or PNG."
    page.get_by_text(sentence).wait_for()
    shows(fifth, 0, 0)
    panel(page).locator("input[type=file]").set_input_files(mine)
    shows(uploaded, 0, 0)
