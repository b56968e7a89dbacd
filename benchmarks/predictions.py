"""What was predicted of a GPU before any had run fastdiff; printed beside what is measured, and never recorded as that.

A kernel takes the time that a copy takes for its bytes (3.0 TB/s on an H100, 4.3 TB/s on an H200) by the share of a copy's
speed that it reaches. The share depends on its load: how long its instructions take beside that time, where each of 528
schedulers begins a warp's next one in each cycle of 1/1.87 GHz. SHARES were predicted for the kernels of commit 5bb0823, by a
model of one scheduler and its queue for the memory, and widened by judgement. They are read, by straight lines between them,
at the loads of the present kernels, whose instructions are those of the shortest way through the SASS for sm_90, by Triton
3.9 (tests/aot.py counts them). What only writes reaches less. A sum launches a second kernel, of few numbers.

The host's time is what `pytest benchmarks/test_operations.py -k launching` says of `step`, and CUDA's part. Whole loops: by
counting kernels, for 5bb0823.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

LARGE = 16_777_216
Range = tuple[float, float]
COPY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second
CARDS = {
    "H100": "NVIDIA-H100-80GB-HBM3",
    "H200": "NVIDIA-H200",
}  # for which it is predicted: others of these names are slower
ISSUED = 32 * 528 * 1.87e9  # instructions of a thread, a second
# load: percent of a copy's speed
SHARES: dict[float, Range] = {
    0.2: (94, 98), 0.45: (92, 96), 0.58: (91, 96), 0.65: (88, 94), 0.75: (85, 93), 0.87: (81, 90), 1.03: (78, 87),
    1.21: (67, 77), 1.47: (56, 63), 1.7: (48, 55), 2.4: (35, 40),
}  # fmt: skip
WRITING: Range = (-6, -4)  # to the share of what only writes
SMALL: Range = (2.3, 3.2)  # µs in a graph of a kernel of few numbers


class Kernel(NamedTuple):
    """What an operation asks of the device for each number."""

    instructions: float
    bytes: int
    sums: bool = False
    reads: bool = True

    def predicted(self, card: str) -> tuple[Range, Range]:
        """µs, and percent of what a copy reaches there."""
        memory = LARGE * self.bytes / COPY[card] * 1e6
        least, most = share(LARGE * self.instructions / ISSUED * 1e6 / memory)
        if not self.reads:
            least, most = least + WRITING[0], most + WRITING[1]
        second = SMALL if self.sums else (0, 0)
        us = 100 * memory / most + second[0], 100 * memory / least + second[1]
        return (round(us[0]), round(us[1])), (round(100 * memory / us[1]), round(100 * memory / us[0]))


def share(load: float) -> Range:
    """SHARES at a load, or at the nearest of theirs."""
    known = sorted(SHARES)
    load = min(max(load, known[0]), known[-1])
    right = next(k for k in known[1:] if load <= k)
    left = known[known.index(right) - 1]
    along = (load - left) / (right - left)
    (a, b), (c, d) = SHARES[left], SHARES[right]
    return a + along * (c - a), b + along * (d - b)


KERNELS = {
    "step": Kernel(48.2, 12),
    "step, mixed": Kernel(51.9, 12),
    "step, bf16 network": Kernel(54.6, 12),
    "step, float32 network": Kernel(53.1, 16),
    "step without noise, bf16 network": Kernel(17.3, 12),
    "normal": Kernel(38.6, 4, reads=False),
    "rademacher": Kernel(7.9, 4, reads=False),
    "perturb": Kernel(43.7, 8),
    "dsm_loss": Kernel(56.1, 12, sums=True),
    "rk_error": Kernel(44.9, 32, sums=True),
    "probe_dot alone, normal": Kernel(48.2, 4, sums=True),
    "probe_dot alone, rademacher": Kernel(15.2, 4, sums=True),
    "measure_langevin alone": Kernel(60.1, 8, sums=True),
}
ALONE = "us of the kernels alone (CUPTI)"
ISSUE, MEMORY = "percent of issue slots busy (ncu)", "percent of the memory's throughput (ncu)"
MLP, UNET, LARGE_UNET = "MLP 256x2x1x1 float32", "demo U-Net 16x1x8x8 float32", "U-Net 35.4M 64x3x32x32 float32"
Key = tuple[str, int, str, str]  # case, n, metric, and the opponent of a ratio

ANYWHERE: dict[Key, Range] = {
    ("step", 8_192, "us in a graph", ""): SMALL,
    ("step", 196_608, "us in a graph", ""): SMALL,
    ("step", 8_192, "us", ""): (11, 20),  # the host's
}


def of_copy(card: str) -> dict[Key, Range]:
    return {(name, LARGE, "percent of copy", ""): kernel.predicted(card)[1] for name, kernel in KERNELS.items()}


H100: dict[Key, Range] = {
    **{
        (name, LARGE, metric, ""): kernel.predicted("H100")[0]
        for name, kernel in KERNELS.items()
        for metric in ("us in a graph", ALONE)
    },
    **of_copy("H100"),
    ("step", LARGE, ISSUE, ""): (33, 45),  # the time of its instructions beside that of all
    ("step", LARGE, MEMORY, ""): (88, 100),
    (MLP, 512, "us per step", ""): (22, 26),
    (MLP, 512, "us per step", "eager loop"): (4.5, 6),
    (MLP, 512, "us per step", "reduce-overhead loop"): (2.5, 3.5),
    (UNET, 1_024, "us per step", "eager loop"): (3, 4),
    (UNET, 1_024, "us per step", "reduce-overhead loop"): (0.5, 0.8),
    (LARGE_UNET, 196_608, "percent of a step outside the network", ""): (0, 0.5),
}
H200 = of_copy("H200")


def beside(device: str, rows: Iterable[dict[str, Any]]) -> dict[Key, str]:
    """A line for each prediction of which these rows of a Recorder measure something; for other devices the H100's."""
    card = "H200" if re.search(r"\bH200\b", device) else "H100"  # (a GH200 is neither)
    predicted = {**ANYWHERE, **(H200 if card == "H200" else H100)}
    lines: dict[Key, str] = {}
    for row in rows:
        for opponent, column in (("", "ours"), (row["opponent"], "ratio_p50")):
            key = (row["case"], row["n"], row["metric"], opponent)
            if key not in predicted or row[column] == "":
                continue
            value, (low, high) = float(row[column]), predicted[key]
            found = "below" if value < low else "above" if value > high else "within"
            of = "predicted" if device == CARDS[card] else "predicted elsewhere"
            what = f"x as fast as the {opponent}" if opponent else row["metric"]
            line = (
                f"{row['case']:32} {row['n']:>10,}  {what:38} {value:7.4g} {found}: {of} {low:g} to {high:g} ({card})"
            )
            lines.setdefault(key, line)
    return lines
