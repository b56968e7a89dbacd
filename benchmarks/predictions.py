"""What was predicted of a GPU before any had run fastdiff; printed beside what is measured, and never recorded as that.

For commit 5bb0823 as Triton 3.6 compiled it: SASS instructions counted, a queue model of one scheduler, a copy of 3.0 TB/s
on an H100 and of 4.3 TB/s on an H200. Whole loops by counting kernels.
"""

from collections.abc import Iterable
from typing import Any

LARGE = 16_777_216
Range = tuple[float, float]
# operation: µs on an H100, percent of what a copy reaches there, and on an H200
KERNELS: dict[str, tuple[Range, Range, Range]] = {
    "step": ((70, 73), (92, 96), (85, 93)),
    "step, mixed": ((70, 74), (91, 96), (82, 91)),
    "step, bf16 network": ((71, 76), (88, 94), (78, 88)),
    "step, float32 network": ((93, 97), (92, 96), (88, 94)),
    "step without noise, bf16 network": ((69, 72), (93, 97), (92, 96)),
    "normal": ((27, 31), (72, 83), (50, 60)),
    "rademacher": ((24, 26), (86, 93), (80, 90)),
    "perturb": ((47, 50), (89, 95), (82, 92)),
    "dsm_loss": ((73, 78), (86, 92), (78, 88)),
    "rk_error": ((183, 190), (94, 98), (94, 98)),
    "probe_dot alone, normal": ((42, 48), (47, 53), (33, 38)),
    "probe_dot alone, rademacher": ((28, 32), (70, 80), (50, 58)),
    "measure_langevin alone": ((61, 69), (65, 73), (45, 52)),
}
ALONE = "us of the kernels alone (CUPTI)"
ISSUE, MEMORY = "percent of issue slots busy (ncu)", "percent of the memory's throughput (ncu)"
MLP, UNET, LARGE_UNET = "MLP 256x2x1x1 float32", "demo U-Net 16x1x8x8 float32", "U-Net 35.4M 64x3x32x32 float32"
Key = tuple[str, int, str, str]  # case, n, metric, and the opponent of a ratio

ANYWHERE: dict[Key, Range] = {
    ("step", 8_192, "us in a graph", ""): (2.3, 3.2),
    ("step", 196_608, "us in a graph", ""): (2.3, 3.2),
    ("step", 8_192, "us", ""): (45, 60),  # the host's
}
H100: dict[Key, Range] = {
    **{(name, LARGE, metric, ""): us for name, (us, _, _) in KERNELS.items() for metric in ("us in a graph", ALONE)},
    **{(name, LARGE, "percent of copy", ""): percent for name, (_, percent, _) in KERNELS.items()},
    ("step", LARGE, ISSUE, ""): (45, 60),
    ("step", LARGE, MEMORY, ""): (88, 100),
    (MLP, 512, "us per step", ""): (22, 26),
    (MLP, 512, "us per step", "eager loop"): (4.5, 6),
    (MLP, 512, "us per step", "reduce-overhead loop"): (2.5, 3.5),
    (UNET, 1_024, "us per step", "eager loop"): (3, 4),
    (UNET, 1_024, "us per step", "reduce-overhead loop"): (0.5, 0.8),
    (LARGE_UNET, 196_608, "percent of a step outside the network", ""): (0, 0.5),
}
H200 = {(name, LARGE, "percent of copy", ""): percent for name, (_, _, percent) in KERNELS.items()}


def beside(device: str, rows: Iterable[dict[str, Any]]) -> dict[Key, str]:
    """A line for each prediction of which these rows of a Recorder measure something; for other devices the H100's."""
    card = "H200" if "H200" in device else "H100"
    predicted = {**ANYWHERE, **(H200 if card == "H200" else H100)}
    lines: dict[Key, str] = {}
    for row in rows:
        for opponent, column in (("", "ours"), (row["opponent"], "ratio_p50")):
            key = (row["case"], row["n"], row["metric"], opponent)
            if key not in predicted or row[column] == "":
                continue
            value, (low, high) = float(row[column]), predicted[key]
            found = "below" if value < low else "above" if value > high else "within"
            of = "predicted" if card in device else "predicted elsewhere"
            what = f"x as fast as the {opponent}" if opponent else row["metric"]
            line = (
                f"{row['case']:32} {row['n']:>10,}  {what:38} {value:7.4g} {found}: {of} {low:g} to {high:g} ({card})"
            )
            lines.setdefault(key, line)
    return lines
