"""The tables and the picture of the speeds, from the results that `make bench` and `make gpu` leave in benchmarks/results/.

    python benchmarks/report.py        writes them between the marks in README.md, in benchmarks/RESULTS.md and docs/pictures/

README.md has the short of one machine, RESULTS.md all that was measured on any.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent
README = ROOT.parent / "README.md"
RESULTS = ROOT / "RESULTS.md"
PICTURE = ROOT.parent / "docs" / "pictures" / "speeds.png"
MACHINE = ROOT / "results" / "AMD-EPYC.csv"  # of the README
BEGIN, END = "<!-- speeds: benchmarks/report.py -->", "<!-- end of speeds -->"
Row = dict[str, str]

# (case, opponent in the results, what the README calls it)
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
OUTSIDE, WHOLE = "us outside the network per step", "us per step"
LIKELIHOOD = (
    "Trained networks under VP, Hutchinson's estimate with one probe, t from 1e-5 to 1, at equal measured error: "
    "score_sde_pytorch at its default tolerance, fastdiff at the loosest up to which its mean error in nats is not above that, "
    "both against a solution at 1e-8 in float64. `couple=True` takes one step size for the batch, as score_sde_pytorch does, and "
    "shares what the network makes of the time. Pairs are fastdiff : score_sde_pytorch; evaluations are of the ODE's right-hand "
    "side, the mean over the samples, calls are of the network, forward."
)
# group of solvers that choose their steps -> its title, and what is said of it
CHOOSING = {
    "likelihood": ("Log-likelihoods at equal error", LIKELIHOOD),
    "rk45": (
        "The sampler rk45 at equal error",
        "As above for samples from t = 1 to 1e-3, against score_sde_pytorch's `get_ode_sampler`; the error is the root mean "
        "square over the numbers of the samples.",
    ),
}
COUNTS = (
    "large operations per step", "small operations per step", "host reads per step", "draws per step", "states held at once",
)  # fmt: skip


def read(path: Path) -> list[Row]:
    return list(csv.DictReader(path.read_text().splitlines()))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        [
            f"| {' | '.join(heads)} |",
            "|---|" + "---|" * (len(heads) - 1),
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def ratio(row: Row | None) -> str:
    """Their time in units of ours, if its pairs agree to a factor of two."""
    if row is None:
        return "–"
    if float(row["ratio_p80"]) > 2 * float(row["ratio_p20"]):
        return "unsteady"
    value = float(row["ratio_p50"])
    return f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def operations(rows: Sequence[Row]) -> str:
    """Their time in units of ours, the median of paired ratios, by size and threads."""
    found = {(r["case"], r["opponent"], r["n"], r["threads"]): r for r in rows if r["group"] == "ops"}
    sizes = [("8192", "1"), ("196608", "1"), ("196608", "2"), ("16777216", "1"), ("16777216", "2")]
    heads = [
        "what a user would write instead",
        *(f"n = {int(n):,}, {'one thread' if t == '1' else 'two'}" for n, t in sizes),
    ]
    lines = []
    for case, opponent, title in OPERATIONS:
        lines.append([title, *(ratio(found.get((case, opponent, n, t))) for n, t in sizes)])
    return markdown(heads, lines)


def loops(rows: Sequence[Row], group: str, metric: str, threads: str = "1") -> str:
    """A line for each sampler: our microseconds a step, the median over the pairs with all opponents, and each opponent's
    time in units of ours, by its own pairs."""
    rows = [r for r in rows if (r["group"], r["metric"], r["threads"]) == (group, metric, threads)]
    opponents = list(dict.fromkeys(r["opponent"] for r in rows))
    lines = []
    for sampler in dict.fromkeys(r["case"] for r in rows):
        own = {r["opponent"]: r for r in rows if r["case"] == sampler}
        ours = statistics.median(float(r["ours"]) for r in own.values())
        shown = f"{ours:,.0f} µs" if ours >= 100 else f"{ours:.1f} µs"
        lines.append([sampler, shown, *(ratio(own.get(name)) for name in opponents)])
    return markdown(["sampler", "fastdiff", *opponents], lines)


def solutions(rows: Sequence[Row], group: str) -> str:
    """A line for each problem: our time, their time in units of ours, and what either took to which error."""
    rows = [r for r in rows if r["group"] == group]
    found = {(r["case"], r["metric"]): r for r in rows}
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        time = found[case, "ms"]
        pairs = [
            f"{float(row['ours']):{form}} : {float(row['theirs']):{form}}"
            for metric, form in (("calls", ",.0f"), ("evaluations", ",.0f"), ("error", ".1e"), ("tolerance", ".0e"))
            for row in [found[case, metric]]
        ]
        lines.append([case, f"{float(time['ours']):,.0f} ms", ratio(time), *pairs])
    heads = ["problem; steps", "fastdiff", "score_sde_pytorch", "calls", "evaluations", "error", "rtol = atol"]
    return markdown(heads, lines)


def solvers(rows: Sequence[Row]) -> str:
    """A line for each solver: its error by network calls, and its time outside the network."""
    rows = [r for r in rows if r["group"] == "solvers"]
    found = {(r["case"], r["metric"]): float(r["ours"]) for r in rows}
    metrics = dict.fromkeys(r["metric"] for r in rows if r["metric"].startswith("error"))
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        errors = [f"{found[case, metric]:.1e}" if (case, metric) in found else "–" for metric in metrics]
        lines.append([case, *errors, f"{found[case, 'us outside the network per call']:.1f} µs"])
    return markdown(["solver", *metrics, "outside the network, per call"], lines)


def counts(rows: Sequence[Row]) -> str:
    """What a step asks of torch: fastdiff's number, theirs."""
    rows = [r for r in rows if r["metric"] in COUNTS]
    found = {
        (r["case"], r["opponent"], r["metric"]): f"{float(r['ours']):.3g} : {float(r['theirs']):.3g}" for r in rows
    }
    keys = dict.fromkeys((r["case"], r["opponent"]) for r in rows)
    return markdown(
        ["sampler", "fastdiff : opponent", *COUNTS],
        [[*key, *(found.get((*key, m), "–") for m in COUNTS)] for key in keys],
    )


def provenance(rows: Sequence[Row], path: Path) -> str:
    marks = dict.fromkeys((r["commit"], r["date"]) for r in rows)
    at = ", ".join(f"{commit or 'an unknown commit'} on {date}" for commit, date in marks)
    packages = dict.fromkeys(
        f"{r['opponent']} {r['version']}" for r in rows if r["version"] and "Python" not in r["version"]
    )
    here = next((r["version"] for r in rows if "Python" in r["version"]), "")
    against = f"; against {', '.join(packages)}" if packages else ""
    return (
        f"Measured at commit {at}: {', '.join(filter(None, (rows[0]['device'], here)))}, torch {rows[0]['torch']}{against}. "
        f"`benchmarks/results/{path.name}` has the spread and the times."
    )


def summary(path: Path = MACHINE) -> str:
    """What stands in the README."""
    rows = read(path)
    return "\n\n".join([
        "Whole runs on one thread, 64 states of 3×32×32, the time outside the network. Both sides stand on the same levels and "
        "call the network as often, and for the same noise the samples are the same, checked before anything is timed; some "
        "libraries draw noise that DDIM or Heun do not use. \"As printed\" is our transcription of the papers in plain PyTorch.",
        loops(rows, "analytic 64x3x32x32", OUTSIDE),
        "The same samplers end to end with a small network of `fastdiff.models`, an MLP on 256 vectors, whose time features "
        "fastdiff makes once for all rows:",
        loops(rows, "MLP 256x2", WHOLE),
        "The same network as a module of the user's own, of whose time features fastdiff knows nothing:",
        loops(rows, "own MLP 256x2", WHOLE),
        f"![microseconds per step outside the network]({PICTURE.relative_to(README.parent)})",
        f"Log-likelihoods. {LIKELIHOOD}",
        solutions(rows, "likelihood"),
        f"Samples by `rk45`. {CHOOSING['rk45'][1]}",
        solutions(rows, "rk45"),
        "Single operations on eight samples of n numbers in all. The memory's own limit is `torch.add`; at 16,777,216 most of "
        "the first line is fresh memory's page faults, which the second avoids:",
        operations(rows),
        provenance(rows, path) + " [All results](benchmarks/RESULTS.md).",
    ])  # fmt: skip


def results() -> str:
    """RESULTS.md: every machine that left a file."""
    parts = [
        "# Speeds\n\nWritten by `benchmarks/report.py`. Ratios are medians of paired runs in one process: how many times as "
        "long the other takes; `unsteady` where the pairs differ by more than a factor of two. One thread: the thread's CPU "
        "time; two: the clock on the wall. Whole runs: set-up is within the time, ours with the table that an earlier run "
        "planned; the making of time features counts as outside the network; the heap keeps "
        "its memory (glibc's default adds page faults to whoever allocates in a step). Outside a large network fastdiff's "
        "figure is mostly set-up, as the run has ten steps.",
        f"![microseconds per step outside the network](../{PICTURE.relative_to(README.parent)})",
    ]
    for path in sorted((ROOT / "results").glob("*.csv")):
        rows = read(path)
        if path.stem == "aot":
            continue
        parts.append(
            f"## {rows[0]['device']}\n\n{provenance(rows, path)}" if rows[0]["threads"] else f"## {rows[0]['device']}"
        )
        groups = list(dict.fromkeys(r["group"] for r in rows))
        for group in groups:
            own = [r for r in rows if r["group"] == group]
            if group == "ops":
                parts.append(f"### Operations\n\n{operations(rows)}")
            elif group in CHOOSING:
                title, said = CHOOSING[group]
                parts.append(f"### {title}\n\n{said}\n\n{solutions(rows, group)}")
            elif group == "solvers":
                parts.append(
                    "### Deterministic solvers by network calls\n\nA mixture of eight Gaussians with its exact score, 256 "
                    "samples of 2 numbers, VP from t = 1 to 1e-3 on Karras' levels: the end states' distance from the flow's, "
                    "root mean square over the numbers. `rk45` chooses its steps, one size for all samples: the least error "
                    f"of its tolerances within so many calls.\n\n{solvers(rows)}"
                )
            elif group.startswith("gpu"):
                parts.append(f"### {group}\n\n{_plain(own)}")
            else:
                parts += _of_runs(group, rows, own)
    parts.append(
        "## The Triton kernels as compiled for sm_90\n\nNot timed on a GPU: what the compiler makes of them "
        f"(`benchmarks/aot.py`).\n\n{_compiled()}"
    )
    return "\n\n".join(parts) + "\n"


def _of_runs(group: str, rows: Sequence[Row], own: Sequence[Row]) -> list[str]:
    parts = []
    for threads in dict.fromkeys(r["threads"] for r in own):
        for metric, title in ((OUTSIDE, "outside the network"), (WHOLE, "end to end")):
            title = f"### {group}, {title}, {'one thread' if threads == '1' else threads + ' threads'}"
            parts.append(f"{title}\n\n{loops(rows, group, metric, threads)}")
    if any(r["metric"] in COUNTS for r in own):
        parts.append(f"### {group}, what a step asks of torch\n\n{counts(own)}")
    return parts


def _plain(rows: Sequence[Row]) -> str:
    columns = ("case", "opponent", "n", "metric", "ours", "theirs", "ratio_p50")
    return markdown(columns, [[r[c] or "–" for c in columns] for r in rows])


def _compiled() -> str:
    rows = [r for r in read(ROOT / "results" / "aot.csv") if r["target"] == "sm_90"]
    columns = ("kernel", "variant", "registers", "spills", "instructions_per_element", "loads_128", "stores_128")
    return markdown(columns, [[r[c] for c in columns] for r in rows])


def plot(path: Path = MACHINE, to: Path = PICTURE) -> None:
    """Microseconds a step outside the network, by sampler and library, on a logarithmic axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is missing")
        return
    rows = [
        r for r in read(path) if (r["group"], r["metric"], r["threads"]) == ("analytic 64x3x32x32", OUTSIDE, "1")
    ]  # fmt: skip
    samplers = list(dict.fromkeys(r["case"] for r in rows))
    names = ["fastdiff", *dict.fromkeys(r["opponent"] for r in rows)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    value: Callable[[str, str], list[float]] = lambda sampler, name: [  # noqa: E731
        float(r["ours"] if name == "fastdiff" else r["theirs"])
        for r in rows
        if r["case"] == sampler and name in ("fastdiff", r["opponent"])
    ]
    for k, name in enumerate(names):
        points = [
            (statistics.median(found), i) for i, sampler in enumerate(samplers) if (found := value(sampler, name))
        ]
        style = {"marker": "D", "s": 90, "zorder": 3} if name == "fastdiff" else {"marker": "o", "s": 45}
        axes.scatter(*zip(*points), label=name, color=f"C{k}", **style)
    axes.set_xscale("log")
    axes.set_yticks(range(len(samplers)), samplers)
    axes.invert_yaxis()
    axes.set_xlabel("µs per step outside the network, 64×3×32×32, one thread (less is better)")
    axes.grid(axis="both", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


def main() -> None:
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{summary()}\n{END}{rest.split(END)[1]}")
    RESULTS.write_text(results())
    plot()


if __name__ == "__main__":
    main()
