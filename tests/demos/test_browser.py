"""The demo in a real Chromium: generate, upload, stop, wrong files; nothing outside this machine is asked for.

FACEGEN_SCREENSHOTS names a folder to leave screenshots in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from facegen import metadata

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
PATIENCE = 120_000  # milliseconds: a busy machine is no failure


@pytest.fixture(scope="module")
def address(tiny_sd15: Path, tiny_pack: Path) -> Iterator[str]:
    """The demo over a tiny random model, on a free port."""
    from facegen.demos.app import launch

    page = launch(str(tiny_sd15), port=None, options={"pack": str(tiny_pack)}, block=False)
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(chromium: Any, address: str) -> Iterator[Any]:
    """One window on the demo for all tests; what it asked other machines for fails them."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(PATIENCE)
    strangers: list[str] = []

    def asked(one: Any) -> None:
        if not one.url.startswith((address, "data:", "blob:")):
            strangers.append(one.url)

    opened = context.new_page()
    opened.on("request", asked)
    opened.goto(address)
    opened.wait_for_selector("#generate-people img")
    yield opened
    context.close()
    assert not strangers


@pytest.fixture
def page(window: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The window on its first tab, with no message open."""
    window.get_by_role("tab", name="Generate").click()
    yield window
    if folder := os.environ.get("FACEGEN_SCREENSHOTS"):
        window.screenshot(path=str(Path(folder) / f"{request.node.name}.png"), full_page=True)
    # In one go: a message may leave by itself while a click on it is under way.
    window.evaluate("() => document.querySelectorAll('.toast-close').forEach((button) => button.click())")
    window.wait_for_function("() => !document.querySelector('.toast-body')")  # it takes a moment to fade


def _steps(page: Any, count: int) -> None:
    page.locator("#generate-field-num_inference_steps input[type=number]").fill(str(count))
    page.locator("#generate-field-num_inference_steps input[type=number]").press("Tab")


def _field(page: Any, name: str, value: str) -> None:
    page.locator(f"#generate-field-{name} textarea, #generate-field-{name} input").first.fill(value)


def _finished(page: Any) -> None:
    page.wait_for_function("() => !document.querySelector('#generate-go').disabled", timeout=PATIENCE)


def _toast(page: Any) -> str:
    page.wait_for_selector(".toast-body")
    return str(page.locator(".toast-body").first.inner_text())


def test_generates_pictures_that_carry_their_call(page: Any, tmp_path: Path) -> None:
    _steps(page, 4)
    _field(page, "seed", "7")
    _field(page, "prompt", "a portrait, red hair")
    page.locator("#generate-field-num_images_per_prompt input[type=number]").fill("2")
    page.locator("#generate-field-num_images_per_prompt input[type=number]").press("Tab")
    page.click("#generate-go")
    page.wait_for_selector("#generate-report tr:nth-of-type(3)")
    _finished(page)
    assert page.inner_text("#generate-status").strip() == "2 pictures"
    assert page.locator("#generate-pictures .gallery-item").count() == 2
    assert "seed 7" in page.inner_text("#generate-pictures")

    saved = tmp_path / "downloaded.png"
    source = page.locator("#generate-pictures .gallery-item img").first.get_attribute("src")
    saved.write_bytes(page.request.get(source).body())
    record = metadata.read(saved)
    assert record.request["prompt"] == "a portrait, red hair"
    assert record.request["seed"] == 7
    assert Image.open(saved).info["Comment"] == metadata.AI_GENERATED


def test_stops_in_mid_run_and_starts_again(page: Any) -> None:
    _steps(page, 60)
    page.locator("#generate-field-num_images_per_prompt input[type=number]").fill("12")
    page.locator("#generate-field-num_images_per_prompt input[type=number]").press("Tab")
    page.click("#generate-go")
    page.click("#generate-stop")  # waits until it can be clicked, which is while the run is under way
    _finished(page)
    assert page.inner_text("#generate-status").startswith("Stopped")
    _steps(page, 4)
    page.locator("#generate-field-num_images_per_prompt input[type=number]").fill("1")
    page.locator("#generate-field-num_images_per_prompt input[type=number]").press("Tab")
    page.click("#generate-go")
    page.wait_for_function("() => document.querySelector('#generate-status').innerText.startsWith('1 picture')")


def test_choosing_an_example_person_is_said(page: Any) -> None:
    page.get_by_role("tab", name="Example people").click()
    page.locator("#generate-people button").nth(2).click()
    page.wait_for_function("() => document.querySelector('#generate-whom').innerText.includes('example:3')")


def test_upload_shows_the_photo_and_takes_the_place_of_the_example(page: Any, tmp_path: Path) -> None:
    me = tmp_path / "me.png"
    Image.new("RGB", (64, 64), (200, 120, 90)).save(me)
    page.get_by_role("tab", name="Your photos").click()
    page.locator("#generate-field-faces input[type=file]").set_input_files(str(me))
    page.wait_for_function("() => document.querySelector('#generate-whom').innerText.includes('your photo')")


def test_a_file_that_is_no_picture_is_named(page: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes.png"
    notes.write_text("not a picture")
    page.get_by_role("tab", name="Your photos").click()
    page.locator("#generate-field-faces input[type=file]").set_input_files(str(notes))
    said = _toast(page)
    assert "notes.png" in said
    assert "/gradio/" not in said


def test_a_wrong_value_is_refused_in_a_sentence(page: Any) -> None:
    _field(page, "seed", "seven")
    page.click("#generate-go")
    assert "seed must be a whole number" in _toast(page)
    _finished(page)
    assert page.locator("#generate-go").is_enabled()
    _field(page, "seed", "")


def test_look_says_what_is_wrong_with_a_file(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 and no more")
    page.get_by_role("tab", name="Look").click()
    page.locator("#look-photo input[type=file]").set_input_files(str(broken))
    assert "broken.jpg" in _toast(page)


def test_look_finds_a_face(page: Any, tmp_path: Path) -> None:
    photo = Image.new("RGB", (640, 640), (90, 90, 90))
    photo.paste((220, 60, 40), (192, 320, 224, 352))
    photo.save(tmp_path / "red.png")
    page.get_by_role("tab", name="Look").click()
    page.locator("#look-photo input[type=file]").set_input_files(str(tmp_path / "red.png"))
    page.wait_for_function("() => /1 face|[0-9] faces/.test(document.querySelector('#look-told').innerText)")


def test_read_refuses_a_picture_of_somebody_else(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    page.get_by_role("tab", name="Read").click()
    page.locator("#read-picture input[type=file]").set_input_files(str(tmp_path / "plain.png"))
    assert "no facegen metadata" in _toast(page)
