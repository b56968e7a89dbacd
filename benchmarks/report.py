"""What people read of benchmarks/results/: a table in README.md, all tables in docs/RESULTS.md, and a picture.

    python benchmarks/report.py

README.md has one machine's best rivals, between its marks; RESULTS.md has all that was measured on any machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from peers import PEERS
from recorder import RESULTS, ROOT, read

README, TABLES = ROOT / "README.md", ROOT / "docs" / "RESULTS.md"
PICTURE = ROOT / "docs" / "pictures" / "speeds.png"
MACHINE = RESULTS / "AMD-EPYC.csv"  # of the README
BEGIN, END = "<!-- speeds -->", "<!-- /speeds -->"
Row = dict[str, str]

OUTSIDE, WHOLE = "us outside the network per step", "us per step"
IMAGES, VECTORS = "analytic 64x3x32x32", "MLP 256x2"
INEXACT = {(peer.sampler, peer.opponent) for peer in PEERS if not peer.exact}
DAGGER = "† draws other noise or rounds otherwise: only the mean and the spread of its samples were compared with ours."
# what the README calls those that are no library
PLAIN = {"as printed (papers.py)": "PyTorch, as printed", "in place, by hand": "PyTorch, in place"}
# (case, opponent in the results, what the tables call it)
OPERATIONS = [
    ("step", "eager", "a row: `a*x + b*m + c*torch.randn_like(x)`"),
    ("step", "eager, preallocated", "a row: the same with `normal_`, `out=` and no allocation"),
    ("step", "torch.compile of eager", "a row: `torch.compile` of the first, its own noise"),
    ("step", "torch.compile, fallback_random", "a row: `torch.compile` of the first, torch's noise"),
    ("step", "memory floor (torch.add)", "a row: `torch.add`, the same memory without the noise"),
    ("step, bf16 network", "eager", "a row with a bfloat16 network, its next input and the finiteness flag"),
    ("normal", "torch.randn", "normals: `torch.randn`"),
    ("perturb + dsm_loss + backward", "eager", "training: perturb, loss and backward, with their noise"),
    ("measured Langevin row", "eager", "a Langevin row with measured norms"),
    ("probe_dot, rademacher", "eager", "Hutchinson's ⟨v, Jv⟩, the probe drawn"),
    ("rk_error", "eager", "Dormand–Prince's step and error"),
]
# group of solvers that choose their steps -> its title, and what is said of it
CHOOSING = {
    "likelihood": (
        "Log-likelihoods at equal error",
        "Trained networks under VP, Hutchinson's estimate with one probe, t from 1e-5 to 1, at equal measured error: "
        "score_sde_pytorch at its default tolerance, fastdiff at the loosest up to which its mean error in nats is not above "
        "that, both against a solution at 1e-8 in float64. `couple=True` takes one step size for the batch, as "
        "score_sde_pytorch does, and shares what the network makes of the time. Pairs are fastdiff : score_sde_pytorch; "
        "evaluations are of the ODE's right-hand side, the mean over the samples, calls are of the network, forward.",
    ),
    "rk45": (
        "The sampler rk45 at equal error",
        "As above for samples from t = 1 to 1e-3, against score_sde_pytorch's `get_ode_sampler`; the error is the root mean "
        "square over the numbers of the samples.",
    ),
}
SOLVERS = (
    "A mixture of eight Gaussians with its exact score, 256 samples of 2 numbers, VP from t = 1 to 1e-3 on Karras' levels: the "
    "end states' distance from the flow's, root mean square over the numbers. `rk45` chooses its steps, one size for all "
    "samples: the least error of its tolerances within so many calls."
)
COUNTS = (
    "large operations per step", "small operations per step", "host reads per step", "draws per step", "states held at once",
)  # fmt: skip


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ratio(row: Row | None) -> str:
    """Their time in units of ours, if its pairs agree to a factor of two."""
    if row is None:
        return "–"
    if float(row["ratio_p80"]) > 2 * float(row["ratio_p20"]):
        return "unsteady"
    value, mark = float(row["ratio_p50"]), "†" if (row["case"], row["opponent"]) in INEXACT else ""
    return f"{value:.1f}×{mark}" if value >= 2 else f"{value:.2f}×{mark}"


def best(rows: Sequence[Row], group: str, metric: str) -> dict[str, Row]:
    """sampler -> the row of its fastest rival, on one thread; the samplers most ahead of theirs first."""
    rows = [r for r in rows if (r["group"], r["metric"], r["threads"]) == (group, metric, "1")]
    found = [min((r for r in rows if r["case"] == case), key=_value) for case in dict.fromkeys(r["case"] for r in rows)]
    return {row["case"]: row for row in sorted(found, key=_value, reverse=True)}


def _value(row: Row) -> float:
    return float(row["ratio_p50"])


def _against(row: Row) -> str:
    return f"{ratio(row)} {PLAIN.get(row['opponent'], row['opponent'])}"


def summary(path: Path = MACHINE) -> str:
    """What stands in the README."""
    rows = read(path)
    images, vectors = best(rows, IMAGES, OUTSIDE), best(rows, VECTORS, WHOLE)
    lines = [
        [case, f"{float(row['ours']):.0f} µs", _against(row), _against(vectors[case])] for case, row in images.items()
    ]
    heads = ["sampler", "fastdiff, a step", "best rival, outside the network", "best rival, whole run with a small MLP"]
    return "\n\n".join([
        markdown(heads, lines),
        f"![how many times as long the best rival of each sampler takes]({PICTURE.relative_to(ROOT)})",
        "How many times as long the fastest rival takes for the same levels and network calls, on one thread: outside the "
        "network for 64 images of 3×32×32, and in all for 256 vectors with a small MLP. Fed the same noise it gives the same "
        f"samples, checked before timing; {DAGGER} \"As printed\" is the paper's algorithm, \"in place\" a loop by hand. With a "
        f"large network only the network matters. {provenance(rows, path)} [All results](docs/RESULTS.md).",
    ])  # fmt: skip


def operations(rows: Sequence[Row]) -> str:
    """Their time in units of ours, the median of paired ratios, by size and threads."""
    found = {(r["case"], r["opponent"], r["n"], r["threads"]): r for r in rows if r["group"] == "ops"}
    sizes = [("8192", "1"), ("196608", "1"), ("196608", "2"), ("16777216", "1"), ("16777216", "2")]
    heads = [f"n = {int(n):,}, {'one thread' if t == '1' else 'two'}" for n, t in sizes]
    lines = [[title, *(ratio(found.get((case, name, *size))) for size in sizes)] for case, name, title in OPERATIONS]
    return markdown(["what a user would write instead", *heads], lines)


def runs(rows: Sequence[Row], metric: str) -> str:
    """A line for each sampler: our microseconds a step, the median over the pairs with all opponents, and each opponent's
    time in units of ours, by its own pairs."""
    rows = [r for r in rows if r["metric"] == metric]
    opponents, lines = list(dict.fromkeys(r["opponent"] for r in rows)), []
    for sampler in dict.fromkeys(r["case"] for r in rows):
        of_it = {r["opponent"]: r for r in rows if r["case"] == sampler}
        ours = statistics.median(float(r["ours"]) for r in of_it.values())
        shown = f"{ours:,.0f} µs" if ours >= 100 else f"{ours:.1f} µs"
        lines.append([sampler, shown, *(ratio(of_it.get(name)) for name in opponents)])
    return markdown(["sampler", "fastdiff", *opponents], lines)


def counts(rows: Sequence[Row]) -> str:
    """What a step asks of torch: fastdiff's number, theirs."""
    pair: Callable[[Row], str] = lambda r: f"{float(r['ours']):.3g} : {float(r['theirs']):.3g}"  # noqa: E731
    return _pivot(rows, ["sampler", "fastdiff : opponent"], COUNTS, pair)


def solvers(rows: Sequence[Row]) -> str:
    """A line for each solver: its error by network calls, and its time outside the network."""
    errors = dict.fromkeys(r["metric"] for r in rows if r["metric"].startswith("error"))
    ours: Callable[[Row], str] = lambda r: format(float(r["ours"]), ".1e" if r["metric"] in errors else ".1f")  # noqa: E731
    return _pivot(rows, ["solver", "against"], [*errors, "us outside the network per call"], ours)


def solutions(rows: Sequence[Row]) -> str:
    """A line for each problem: our time, their time in units of ours, and what either took to which error."""
    forms = {"calls": ",.0f", "evaluations": ",.0f", "error": ".1e", "tolerance": ".0e"}

    def cell(row: Row) -> str:
        if row["metric"] == "ms":
            return f"{float(row['ours']):,.0f} ms, {ratio(row)}"
        return " : ".join(format(float(row[who]), forms[row["metric"]]) for who in ("ours", "theirs"))

    return _pivot(rows, ["problem; steps", "against"], ["ms", *forms], cell)


def _pivot(rows: Sequence[Row], heads: list[str], metrics: Sequence[str], cell: Callable[[Row], str]) -> str:
    """A line for each case and opponent, a column for each metric."""
    found = {(r["case"], r["opponent"], r["metric"]): cell(r) for r in rows if r["metric"] in metrics}
    keys = dict.fromkeys(key[:2] for key in found)
    return markdown(
        [*heads, *metrics], [[*key, *(found.get((*key, metric), "–") for metric in metrics)] for key in keys]
    )


def plain(rows: Sequence[Row], columns: Sequence[str]) -> str:
    return markdown(columns, [[r[column] or "–" for column in columns] for r in rows])


def provenance(rows: Sequence[Row], path: Path) -> str:
    at = ", ".join(dict.fromkeys(f"{r['commit'] or 'an unknown commit'} on {r['date']}" for r in rows))
    packages = dict.fromkeys(
        f"{r['opponent']} {r['version']}" for r in rows if r["version"] and "Python" not in r["version"]
    )
    here = next((r["version"] for r in rows if "Python" in r["version"]), "")
    against = f"; against {', '.join(packages)}" if packages else ""
    return (
        f"Measured at commit {at}: {', '.join(filter(None, (rows[0]['device'], here)))}, torch {rows[0]['torch']}{against}. "
        f"`benchmarks/results/{path.name}` has the spread and the times."
    )


def section(group: str, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(title, text) of what RESULTS.md says of a group of one machine's rows."""
    if group == "ops":
        return [("Operations", operations(rows))]
    if group in CHOOSING:
        title, said = CHOOSING[group]
        return [(title, f"{said}\n\n{solutions(rows)}")]
    if group == "solvers":
        return [("Deterministic solvers by network calls", f"{SOLVERS}\n\n{solvers(rows)}")]
    if group.startswith("gpu"):
        return [(group, plain(rows, ("case", "opponent", "n", "metric", "ours", "theirs", "ratio_p50")))]
    parts = []
    for threads in dict.fromkeys(r["threads"] for r in rows):
        there, on = (
            [r for r in rows if r["threads"] == threads],
            "one thread" if threads == "1" else f"{threads} threads",
        )
        parts.append((f"{group}, outside the network, {on}", runs(there, OUTSIDE)))
        parts.append((f"{group}, end to end, {on}", runs(there, WHOLE)))
    if any(r["metric"] in COUNTS for r in rows):
        parts.append((f"{group}, what a step asks of torch", counts(rows)))
    return parts


def results() -> str:
    """RESULTS.md: every machine that left a file."""
    parts = [
        "# Speeds\n\nWritten by `benchmarks/report.py`. Ratios are medians of paired runs in one process: how many times as "
        f"long the other takes; `unsteady` where the pairs differ by more than a factor of two. {DAGGER} One thread: its CPU "
        "time; two: the clock on the wall. Whole runs: set-up is within the time, ours with the table that an earlier run "
        "planned; the making of time features counts as outside the network; the heap keeps its memory (glibc's default adds "
        "page faults to whoever allocates in a step). Outside a large network fastdiff's figure is mostly set-up, as the run has "
        "ten steps. \"As printed\" is our transcription of the papers in plain PyTorch.",
        f"![how many times as long the best rival of each sampler takes]({PICTURE.relative_to(TABLES.parent)})",
    ]  # fmt: skip
    for path in sorted(RESULTS.glob("*.csv")):
        if path.stem == "aot":
            continue
        rows = read(path)
        parts += [f"## {rows[0]['device']}", provenance(rows, path)]
        for group in dict.fromkeys(r["group"] for r in rows):
            for title, text in section(group, [r for r in rows if r["group"] == group]):
                parts.append(f"### {title}\n\n{text}")
    compiled = [r for r in read(RESULTS / "aot.csv") if r["target"] == "sm_90"]
    columns = ("kernel", "variant", "registers", "spills", "instructions_per_element", "loads_128", "stores_128")
    parts.append(
        "## The Triton kernels as compiled for sm_90\n\nNot timed on a GPU: what the compiler makes of them "
        f"(`tests/aot.py`).\n\n{plain(compiled, columns)}"
    )
    return "\n\n".join(parts) + "\n"


def plot(path: Path = MACHINE, to: Path = PICTURE) -> None:
    """How many times as long the best rival of each sampler takes outside the network, a bar each."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is missing")
        return
    rows = list(best(read(path), IMAGES, OUTSIDE).values())
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([r["case"] for r in rows], [_value(r) for r in rows], color="#2a6fbb", height=0.68)
    axes.bar_label(bars, [_against(r) for r in rows], padding=4, fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.text(1.06, -0.6, "fastdiff", fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -1.1)
    axes.set_xlim(0, 1.25 * max(map(_value, rows)))
    axes.set_xlabel(
        "time of each sampler's fastest rival outside the network, fastdiff = 1\n64 images of 3×32×32, one CPU thread\n"
        "† only the mean and spread of the samples were compared"
    )
    axes.spines[["top", "right"]].set_visible(False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=120)


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{summary()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    TABLES.write_text(results(), encoding="utf-8")
    plot()


if __name__ == "__main__":
    main()
