from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from facegen import doctor, hub

# In a fresh interpreter: every import of cv2 fails as it does without the system's libGL.
WITHOUT_LIBGL = """
import sys

class NoLibGL:
    def find_spec(self, name, path=None, target=None):
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

sys.meta_path.insert(0, NoLibGL())
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBGL + program], capture_output=True, text=True, timeout=300, check=False
    )


def states(name: str) -> list[doctor.Check]:
    return [check for check in doctor.examine() if check.name == name]


def test_every_check_says_what_was_found() -> None:
    checks = doctor.examine()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "gpu", "xformers", "onnxruntime", "insightface", "opencv", "gradio"} <= set(names)
    assert {"embedded model", "weights", "disk, here", "FACEGEN_HOME"} <= set(names)
    for check in checks:
        assert check.found
        assert "\n" not in check.found + check.mend
        assert (check.state == "ok") == (check.mend == "")


def test_facegen_loads_without_libgl() -> None:
    done = run(
        "import facegen, facegen.errors, facegen.images, facegen.hub, facegen.doctor, facegen.cli\n"
        "import facegen.face.analyze, facegen.face.embed, facegen.face.fuse, facegen.face.detect\n"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_libgl_the_doctor_says_how_to_mend_it() -> None:
    done = run("from facegen.doctor import main\nsys.exit(main(json_output=True))\n")
    assert done.returncode == 1, done.stderr[-2000:]
    opencv = next(check for check in json.loads(done.stdout) if check["name"] == "opencv")
    assert opencv["state"] == "fail"
    assert "libGL.so.1" in opencv["found"]
    assert "apt install libgl1" in opencv["mend"]
    assert "opencv-python-headless" in opencv["mend"]


def test_a_damaged_embedded_model_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    assert states("embedded model")[0].state == "fail"
    for file in hub.WEIGHTS["mini"].files:
        path = tmp_path / "mini" / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    assert states("embedded model")[0].state == "ok"
    hub.write_checksums(tmp_path / "mini")
    assert "checksums agree" in states("embedded model")[0].found
    (tmp_path / "mini" / "pack" / "det.onnx").write_bytes(b"weigths")
    damaged = states("embedded model")[0]
    assert damaged.state == "fail"
    assert "det.onnx" in damaged.found


def test_a_full_disk_and_a_bad_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 << 30, 9 << 30, 1 << 20))
    assert states("disk, here")[0].state == "warn"
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path / "file"))
    assert states("FACEGEN_HOME")[0].state == "fail"


def test_output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("python", "ok", "3.11")])
    assert doctor.main() == 0
    assert "All is well." in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("torch", "fail", "not there", "pip install torch")])
    assert doctor.main() == 1
    assert "torch: pip install torch." in capsys.readouterr().out
    assert doctor.main(json_output=True) == 1
    assert json.loads(capsys.readouterr().out)[0]["state"] == "fail"
