"""What this machine has of all that facegen needs, and for each lack the sentence that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from facegen import hub

State = Literal["ok", "warn", "fail"]

_MARKS = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}
_NEEDED = 2 << 30  # bytes: outputs and caches
_LIBGL = (
    "install the system library (Debian, Ubuntu: apt install libgl1 libglib2.0-0), or replace opencv-python by "
    "opencv-python-headless"
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str  # what is there
    mend: str = ""  # what to do; empty when all is well


def examine() -> list[Check]:
    """Look at everything; changes nothing and touches no network."""
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python, _torch, _xformers, _libraries, _opencv, _onnxruntime, _mini, _weights, _disk, _home,
    )  # fmt: skip
    return [check for look in looks for check in look()]


def main(*, json_output: bool = False) -> int:
    """Write the checks to stdout; 1 when one of them fails."""
    checks = examine()
    if json_output:
        lines = [json.dumps([asdict(check) for check in checks])]
    else:
        lines = [f"{_MARKS[check.state]}  {check.name:14} {check.found}" for check in checks]
        mends = [f"      {check.name}: {check.mend}." for check in checks if check.mend]
        lines += ["", *mends] if mends else ["", "All is well."]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if any(check.state == "fail" for check in checks) else 0


def _python() -> Iterator[Check]:
    # An older Python cannot install facegen at all.
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a CUDA build without its libraries raises OSError
        yield Check("torch", "fail", f"cannot be loaded ({_first(error)})", "install torch again: pip install torch")
        return
    yield Check("torch", "ok", torch.__version__)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Check("gpu", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    elif torch.version.cuda:
        yield Check(
            "gpu", "warn", "torch is built for CUDA, but no GPU can be used", "check the driver with nvidia-smi"
        )
    else:
        yield Check("gpu", "ok", "none; the CPU does the work (the embedded model is made for it)")


def _xformers() -> Iterator[Check]:
    if importlib.util.find_spec("xformers") is None:
        yield Check("xformers", "ok", "not installed; torch's own attention is used")
        return
    try:
        importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:
        mend = "install the xformers release that belongs to this torch, or uninstall it"
        yield Check("xformers", "warn", f"does not load ({_first(error)})", mend)
        return
    yield Check("xformers", "ok", _version("xformers"))


def _libraries() -> Iterator[Check]:
    for name in ("diffusers", "transformers", "peft", "accelerate", "insightface", "gradio", "skimage"):
        package = {"skimage": "scikit-image"}.get(name, name)
        if importlib.util.find_spec(name) is None:
            yield Check(name, "fail", "not installed", f"pip install {package}")
        else:
            yield Check(name, "ok", _version(package))


def _opencv() -> Iterator[Check]:
    try:
        import cv2  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        system = "lib" in str(error) and ".so" in str(error)
        mend = _LIBGL if system else "pip install opencv-python-headless"
        yield Check("opencv", "fail", f"cannot be loaded ({_first(error)})", mend)
        return
    yield Check("opencv", "ok", str(cv2.__version__))


def _onnxruntime() -> Iterator[Check]:
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        yield Check("onnxruntime", "fail", f"cannot be loaded ({_first(error)})", "pip install onnxruntime")
        return
    providers = onnxruntime.get_available_providers()
    found = f"{onnxruntime.__version__}: {', '.join(name.removesuffix('ExecutionProvider') for name in providers)}"
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) != "version unknown"]
    if len(installed) == 2:
        mend = "keep only one of onnxruntime and onnxruntime-gpu; installed together, one hides the other"
        yield Check("onnxruntime", "warn", found, mend)
    elif _has_gpu() and "CUDAExecutionProvider" not in providers:
        mend = "face analysis runs on the CPU; for the GPU replace onnxruntime by onnxruntime-gpu"
        yield Check("onnxruntime", "warn", found, mend)
    else:
        yield Check("onnxruntime", "ok", found)


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def _mini() -> Iterator[Check]:
    folder = hub.ASSETS / "mini"
    lacking = [file.path for file in hub.WEIGHTS["mini"].files if not (folder / file.path).is_file()]
    again = "install facegen again (pip install --force-reinstall --no-deps facegen), or check out its files anew"
    if lacking:
        yield Check("embedded model", "fail", f"lacks {', '.join(lacking)} in {folder}", again)
        return
    problems = hub.check_checksums(folder)
    if problems:
        yield Check("embedded model", "fail", problems[0], again)
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    checked = "checksums agree" if (folder / hub.CHECKSUMS).is_file() else "no checksums beside it"
    yield Check("embedded model", "ok", f"{size / 1e6:.0f} MB, {checked}")


def _weights() -> Iterator[Check]:
    there = [row.weights.name for row in hub.listing() if row.path is not None and row.weights.name != "mini"]
    found = ", ".join(there) if there else "none besides the embedded model; `facegen weights` lists them"
    yield Check("weights", "ok", found)


def _disk() -> Iterator[Check]:
    for name, place in (("disk, here", Path.cwd()), ("disk, weights", hub.home())):
        folder = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        found = f"{free / 2**30:.1f} GiB free at {folder}"
        if free < _NEEDED:
            yield Check(name, "warn", found, f"free some space at {folder}; pictures and caches want 2 GiB")
        else:
            yield Check(name, "ok", found)


def _home() -> Iterator[Check]:
    folder = hub.home()
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    if not nearest.is_dir():
        yield Check("FACEGEN_HOME", "fail", f"{nearest} is a file", "set FACEGEN_HOME to a folder")
    elif not _writable(nearest):
        yield Check("FACEGEN_HOME", "warn", f"{nearest} is not writable", "set FACEGEN_HOME to a folder of your own")
    else:
        yield Check("FACEGEN_HOME", "ok", f"{folder}{'' if folder.exists() else ' (made when first needed)'}")


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
