"""The demo in a real Chromium: generate, upload, stop, wrong files; nothing outside this machine is asked for.

FACEGEN_SCREENSHOTS names a folder to leave screenshots in.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

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
PATIENCE = 240_000  # milliseconds: a busy machine is no failure


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


@pytest.mark.slow
def test_the_brush_says_what_is_painted_anew(page: Any, tmp_path: Path) -> None:
    """A stroke over the face in a photo that is shown at another size: pixels change under it, and nowhere else."""
    generator = np.random.default_rng(0)
    photo = generator.integers(60, 200, (300, 480, 3), dtype=np.uint8)
    photo[120:180, 260:320] = generator.integers(0, 60, (60, 60, 3), dtype=np.uint8) + np.array([150, 0, 0], np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    page.get_by_role("tab", name="Inpaint").click()
    page.locator("#inpaint-field-image input[type=file]").set_input_files(str(tmp_path / "photo.png"))
    page.locator("#inpaint-field-mask canvas").last.scroll_into_view_if_needed()
    _until(page, lambda: _still(page) and _shown(_brushed(page)).mean() > 0.4)
    before, box = _brushed(page), page.locator("#inpaint-field-mask canvas").last.bounding_box()
    rows, columns = _inside(_shown(before))
    x = box["x"] + columns.start + (columns.stop - columns.start) * 0.55
    y = box["y"] + rows.start + (rows.stop - rows.start) * 0.45
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 10, steps=8)
    page.mouse.up()
    page.mouse.move(box["x"] + 5, box["y"] - 20)  # the brush's own ring goes with the mouse
    _until(page, lambda: _still(page) and int((_white(_brushed(page)) & _shown(before)).sum()) > 500)
    stroke = _white(_brushed(page)) & _shown(before)
    painted = np.asarray(Image.fromarray(stroke[rows, columns]).resize((480, 300), Image.Resampling.NEAREST))
    assert 0.3 < painted[120:180, 260:320].mean() < 1

    page.locator("#inpaint-field-num_inference_steps input[type=number]").fill("2")
    page.locator("#inpaint-field-num_inference_steps input[type=number]").press("Tab")
    page.locator("#inpaint-field-prompt textarea").fill("a face")
    page.click("#inpaint-go")
    page.wait_for_function("() => document.querySelector('#inpaint-status').innerText.trim() === '1 picture'")
    source = page.locator("#inpaint-pictures img").first.get_attribute("src")
    (tmp_path / "made.png").write_bytes(page.request.get(source).body())
    made = np.asarray(Image.open(tmp_path / "made.png").convert("RGB"))
    assert made.shape == photo.shape
    differ = (made != photo).any(-1)
    assert not differ[~_grown(painted, 4)].any()
    assert differ[~_grown(~painted, 4)].mean() > 0.9


def _brushed(page: Any) -> np.ndarray:
    """What the box with the brush shows, (H, W, 3) int16."""
    box = page.locator("#inpaint-field-mask canvas").last.bounding_box()
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB"), np.int16)


def _still(page: Any) -> bool:
    """Whether it shows the same for a moment: the editor fits what it shows into its place step by step."""
    first = _brushed(page)
    page.wait_for_timeout(300)
    return np.array_equal(first, _brushed(page))


def _until(page: Any, met: Callable[[], bool]) -> None:
    """Waits for what no event of the page tells."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not met():
        assert time.monotonic() < deadline, "The page did not get there in time."
        page.wait_for_timeout(200)


def _shown(canvas: np.ndarray) -> np.ndarray:
    """Where a canvas shows the photo: neither the page's white nor its light frame."""
    found: np.ndarray = canvas.max(2) < 225
    return found


def _white(canvas: np.ndarray) -> np.ndarray:
    found: np.ndarray = canvas.min(2) > 250
    return found


def _inside(shown: np.ndarray) -> tuple[slice, slice]:
    """The rows and the columns that a photo takes: buttons lie beside it."""
    rows, columns = (shown.mean(1) > 0.3).nonzero()[0], (shown.mean(0) > 0.3).nonzero()[0]
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _grown(mask: np.ndarray, radius: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * radius + 1))) > 0
