"""The command line: instant help, one sentence for what goes wrong, exit codes, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import metadata
from facegen.cli import commands, main

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m", "facegen"]
HEAVY = ("torch", "diffusers", "transformers", "insightface", "cv2", "gradio", "onnxruntime", "numpy", "PIL")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("facegen: ")
    return lines[0]


@pytest.fixture
def quick(tiny_sd15: Path, tiny_pack: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that takes no time."""
    where = ["--model", str(tiny_sd15), "--pack", str(tiny_pack), "--device", "cpu", "--dtype", "float32"]
    return [*where, "--steps", "2", "--seed", "5", "--output", str(tmp_path / "out")]


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], *([verb, "--help"] for verb in commands())])
def test_help_is_instant(words: list[str]) -> None:
    code = (
        "import sys\nfrom facegen.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(repr([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "[]"
    assert "facegen" in run.stdout


def test_every_flag_is_told_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--num-inference-steps N, --steps N How many denoising steps (from 1 to 1000; default 30)" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generat"], "perhaps you mean 'generate'"),
        (["generate", "--promt", "x"], "perhaps you mean '--prompt'"),
        (["generate", "--steps", "many"], "num_inference_steps must be a whole number, not 'many'"),
        (["generate", "--guidance", "nan"], "finite"),
        (["generate", "--scheduler", "eulr"], "perhaps you mean 'euler'"),
        (["generate", "--prompt"], "expected one argument"),
        (["generate", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["generate", "-o", "x.jpg"], "only PNG holds the metadata"),
        (["generate", "--model", "/nowhere/model"], "/nowhere/model"),
        (["look"], "at least one photo"),
        (["look", "nowhere.jpg"], "does not exist"),
        (["compare", "one.jpg"], "second must be given"),
        (["read", "nowhere.png"], "does not exist"),
        (["read"], "required"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    sentence = told(capsys)
    assert says in sentence
    assert sentence.endswith(".")


def test_our_mistake_is_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(arguments: object) -> int:
        raise KeyError("shoe")

    import facegen.cli as cli

    monkeypatch.setattr(cli, "HELLO", cli.Command(about="x", run=stumble))
    assert main(["hello"]) == 1
    assert "A mistake in facegen: KeyError: 'shoe'" in told(capsys)
    assert main(["hello", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_generate_then_read_then_run_again(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompt", "it's a portrait", "--count", "2", "--json", *quick]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = [Path(line["path"]) for line in lines]
    assert [path.name for path in paths] == ["generate-5.png", "generate-6.png"]
    assert lines[1]["report"]["provenance"]["seed"] == 6

    assert main(["read", str(paths[1])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("facegen generate --prompt 'it'\"'\"'s a portrait' --num-images-per-prompt 2 --seed 5")
    assert main(["read", str(paths[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["prompt"] == "it's a portrait"

    again = tmp_path / "again.png"
    assert main(["read", str(paths[1]), "--run", "-o", str(again)]) == 0
    assert "the same picture to the last bit" in capsys.readouterr().out
    with Image.open(paths[1]) as before, Image.open(again) as now:
        assert np.array_equal(np.asarray(before), np.asarray(now))
    assert metadata.read(again).request == metadata.read(paths[1]).request


def test_run_again_takes_as_many_threads_as_then(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = tmp_path / "out" / "generate-5.png", tmp_path / "again.png"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert main(["generate", "--quiet", *quick]) == 0
        assert metadata.read(path).loaded["threads"] == 3
        torch.set_num_threads(1)
        assert main(["read", str(path), "--run", "-o", str(again)]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "the same picture to the last bit" in capsys.readouterr().out
    assert metadata.read(again).loaded["threads"] == 3


@pytest.mark.parametrize(
    ("then", "said"), [({"threads": 10**9}, "number of threads"), ({"torch": "1.13"}, "version of PyTorch")]
)
def test_run_again_tells_what_the_last_bit_hangs_on(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], then: dict[str, Any], said: str
) -> None:
    assert main(["generate", "--quiet", *quick]) == 0
    path = tmp_path / "out" / "generate-5.png"
    record = metadata.read(path)
    with Image.open(path) as image:
        metadata.Picture.of(image, replace(record, loaded={**record.loaded, **then})).save(path)
    capsys.readouterr()
    assert main(["read", str(path), "--run", "-o", str(tmp_path / "again.png")]) == 0
    assert f"another {said} than then" in capsys.readouterr().out


def test_an_older_picture_is_not_overwritten_unless_named(quick: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["generate", "--quiet", *quick]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["generate-5-2.png", "generate-5.png"]


def test_an_unwritable_place_is_known_before_the_work(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["generate", *quick[:-1], str(tmp_path / "file" / "deeper")]) == 2
    assert "Cannot write to" in told(capsys)


def test_a_command_that_fails_leaves_no_folder(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *quick[:-1], str(tmp_path / "new" / "deeper"), "--adapters", "nothing_of_this_name"]) == 2
    assert "nothing_of_this_name" in told(capsys)
    assert not (tmp_path / "new").exists()


def test_a_picture_without_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    assert main(["read", str(tmp_path / "plain.png")]) == 2
    assert "carries no facegen metadata" in told(capsys)


def test_a_photo_that_changed_is_not_run_again(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--quiet", *quick]) == 0
    path = tmp_path / "out" / "generate-5.png"
    record = metadata.read(path)
    gone = {**record.request, "faces": [{"path": str(tmp_path / "me.jpg"), "sha256": "0" * 64}]}
    with Image.open(path) as image:
        metadata.Picture.of(image, replace(record, request=gone)).save(tmp_path / "other.png")
    capsys.readouterr()
    assert main(["read", str(tmp_path / "other.png"), "--run"]) == 2
    assert "is not there any more" in told(capsys)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_leaves_nothing_half_written(quick: list[str], tmp_path: Path) -> None:
    words = ["generate", "--count", "1000", *quick[:-6], "--steps", "20", "--seed", "5"]
    process = subprocess.Popen(
        [*PYTHON, *words, "--output", str(tmp_path / "out")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(str(tmp_path / "out"))  # the first picture is finished
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=180)
    assert process.returncode == 130
    assert complaint.strip().splitlines() == [
        "facegen: Stopped; what was finished is whole, nothing half-written is left."
    ]
    written = sorted((tmp_path / "out").iterdir())
    assert written
    for path in written:
        assert metadata.read(path).pipeline == "generate"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_while_loading(quick: list[str], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = (
        "import sys, pathlib\nfrom facegen import cli\nload = cli._load\n"
        f"def told(*arguments):\n    pathlib.Path({str(begun)!r}).touch()\n    return load(*arguments)\n"
        "cli._load = told\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", *quick]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=180)
    # A shell shows 130 for both: Python ends by the signal itself when it came while a C library ran Python code.
    assert process.returncode in (130, -signal.SIGINT)
    assert len(complaint.strip().splitlines()) == 1
