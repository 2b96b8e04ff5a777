"""The scripts for a GPU run to their end in Triton's interpreter and uncompiled, and what they measure is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # ahead of the first import of Triton
from tests.bench.bench_attention import TINY, backward, table, tune
from tests.bench.bench_generate import ROOT
from tests.bench.sheet import Sheet


def test_the_kernel_s_tables_are_written(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the fused kernel is an optional extra")
    sheet = Sheet(tmp_path / "attention.md")
    assert sheet.out is not None
    table(TINY, [torch.float32], 1, sheet)
    rows = [line.split(" | ") for line in sheet.out.read_text("utf-8").splitlines() if "| triton |" in line]
    assert len(rows) == len(TINY)
    assert all(float(row[-1].rstrip(" |")) < 1e-5 for row in rows)
    backward(TINY[:1], torch.float32, 1, sheet)
    tune(TINY[:1], torch.float32, 1, sheet)
    text = sheet.out.read_text("utf-8")
    assert text.count("| tiny | sdpa |") == 1
    assert text.count("| 16 | 16 | 16 | 4 | 1 |") == 1


def test_the_sides_of_a_gpu_make_diffusers_picture() -> None:
    if torch.cuda.is_available():
        pytest.skip("in bfloat16 the last bits differ")
    code = (
        "from tests.bench.bench_generate import Setup, compare; from tests.bench.cases import SMALL; "
        "rows = compare(Setup(SMALL, 'instantid', 2, 1, None), ('diffusers', 'compiled', 'graphs'), 1); "
        "assert len(rows) == 3; assert all(row['difference'] < 1e-4 for row in rows), rows"
    )
    # What is marked and copied stays, compiling does not; in a process of its own, for what was left uncompiled once
    # stays so.
    env = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=300)
