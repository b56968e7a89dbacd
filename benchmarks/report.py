"""The README's table of speeds, from the results that `pytest benchmarks/ --benchmark-only --save-results` left.

python benchmarks/report.py        writes it between the marks in README.md
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent
README = ROOT.parent / "README.md"
RESULTS = ROOT / "results" / "AMD-EPYC.csv"
BEGIN, END = "<!-- speeds: benchmarks/report.py -->", "<!-- end of speeds -->"

# (case, opponent in the results, what the README calls it)
LINES = [
    ("step", "eager", "a row: `a*x + b*m + c*torch.randn_like(x)`"),
    ("step", "eager, preallocated", "a row: the same with `normal_`, `out=` and no allocation"),
    ("step", "torch.compile of eager", "a row: `torch.compile` of the first"),
    ("step", "memory floor (torch.add)", "a row: `torch.add`, the same memory without the noise"),
    ("step, bf16 network", "eager", "a row with a bfloat16 network, its next input and the finiteness flag"),
    ("normal", "torch.randn", "normals: `torch.randn`"),
    ("perturb + dsm_loss + backward", "eager", "training: perturb, loss and backward, with their noise"),
    ("measured Langevin row", "eager", "a Langevin row with measured norms"),
    ("probe_dot, rademacher", "eager", "Hutchinson's ⟨v, Jv⟩, the probe drawn"),
    ("rk_error", "eager", "Dormand–Prince's step and error"),
]


def table(path: Path = RESULTS) -> str:
    """Their time in units of ours, the median of paired ratios."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    found = {(r["case"], r["opponent"], r["n"], r["threads"]): r["ratio_p50"] for r in rows}
    sizes = [("8192", "1"), ("196608", "1"), ("196608", "2"), ("16777216", "1"), ("16777216", "2")]
    heads = [f"n = {int(n):,}, {'one thread' if t == '1' else 'two'}" for n, t in sizes]
    lines = [f"| what a user would write instead | {' | '.join(heads)} |", "|---|" + "---|" * len(sizes)]
    for case, opponent, title in LINES:
        cells = [found.get((case, opponent, n, t)) for n, t in sizes]
        lines.append(f"| {title} | " + " | ".join("–" if c is None else f"{float(c):.1f}×" for c in cells) + " |")
    first = rows[0]
    provenance = (
        f"Measured at commit {first['commit']} on {first['date']}: {first['device']} (two cores with AVX-512), torch "
        f"{first['torch']}; `benchmarks/results/{path.name}` has the spread and the times."
    )
    return "\n".join([*lines, "", provenance])


def main() -> None:
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
