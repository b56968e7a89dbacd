"""`make gpu` without a GPU: the same motions on small numbers."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS = "device threads group case opponent n metric ours theirs ratio_p20 ratio_p50 ratio_p80 rounds commit torch version date"
OPERATIONS = {
    "step", "step, mixed", "step, bf16 network", "normal", "rademacher", "perturb", "dsm_loss", "perturb + dsm_loss + backward",
    "measured Langevin row", "probe_dot, rademacher", "probe_dot, normal", "rk_error", "timestep_embedding",
}  # fmt: skip
NETWORKS = {
    "MLP 256x2x1x1 float32", "MLP 256x2x1x1 bfloat16", "demo U-Net 16x1x8x8 float32", "demo U-Net 16x1x8x8 bfloat16",
    "analytic 64x3x32x32 float32",
}  # fmt: skip


@pytest.mark.slow
def test_every_part_leaves_its_numbers_or_says_why_not(tmp_path):
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--quick", "--out", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd="/", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (table,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == COLUMNS.split()
    assert {row["group"] for row in rows} == {"gpu ops", "gpu loops"}
    assert {row["threads"] for row in rows} == {"1"}

    checks = [row for row in rows if row["metric"] == "numbers unlike the reference's"]
    assert len(checks) == 4
    assert {row["ours"] for row in checks} == {"0"}
    timed = [row for row in rows if row["metric"] in ("us", "us per step")]
    assert {row["case"] for row in timed} == OPERATIONS | NETWORKS
    for row in timed:
        assert float(row["ours"]) > 0
        assert float(row["theirs"]) > 0
        assert float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
        assert int(row["rounds"]) >= 4
    for case in OPERATIONS:
        ours = {row["metric"]: float(row["ours"]) for row in rows if row["case"] == case}
        copied = 100 * ours["GB/s"] / ours["percent of copy"]
        assert math.isclose(copied, float(next(row["ours"] for row in rows if row["case"] == "copy_")), rel_tol=1e-3)

    told = ran.stdout
    assert " skipped" in told.partition("== benchmarks")[0] or " passed" in told.partition("== benchmarks")[0]
    for part in ("tests marked gpu", "benchmarks"):
        assert f"== {part} (" in told
        assert f"-- {part}: passed" in told
    assert "left out of a quick run" in told
    assert "left out without a CUDA device" in told
    assert "aten::addmm" in told.partition("test_profile")[2]


def test_no_time_is_said(tmp_path):
    """What would not end in time is skipped with its reason, and the rest is saved as it comes."""
    arguments = [
        "benchmarks",
        "--quick",
        "--minutes",
        "0",
        "--out",
        tmp_path,
        "-k",
        "test_bits",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "left out for want of time: it may take 10 s, 0 s are left" in ran.stdout
    assert not list(tmp_path.glob("*.csv"))
