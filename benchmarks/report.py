"""What people read of benchmarks/results/: a table in README.md, all tables in docs/RESULTS.md, and a picture.

    python benchmarks/report.py

README.md has one machine's best rivals, RESULTS.md all that was measured on any machine: both between their marks, around which
stands what people write.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from peers import PEERS
from provenance import RESULTS, ROOT
from recorder import read

README, TABLES = ROOT / "README.md", ROOT / "docs" / "RESULTS.md"
PICTURE = ROOT / "docs" / "pictures" / "speeds.png"
MACHINE = RESULTS / "Intel-R-Xeon-R-Processor.csv"  # of the README
BEGIN, END = "<!-- speeds -->", "<!-- /speeds -->"
Row = dict[str, str]

OUTSIDE, WHOLE = "us outside the network per step", "us per step"
IMAGES, VECTORS = "analytic 64x3x32x32", "MLP 256x2"
INEXACT = {(peer.sampler, peer.opponent) for peer in PEERS if not peer.exact}
DAGGER = "† draws other noise or rounds otherwise: only the mean and the spread of its samples were compared with ours."
# what the README calls those that are no library
PLAIN = {"as printed (papers.py)": "PyTorch, as printed", "in place, by hand": "PyTorch, in place"}
SIZES = [("8192", "1"), ("196608", "1"), ("196608", "2"), ("16777216", "1"), ("16777216", "2")]
# metric -> the form of "ours : theirs"
ASKED = ("large operations per step", "small operations per step", "host reads per step", "draws per step")
COUNTS = dict.fromkeys((*ASKED, "states held at once"), ".3g")
CHOICES = {"calls": ",.0f", "evaluations": ",.0f", "error": ".1e", "tolerance": ".0e"}
FOUND = {"distance in that of two exact sets": ".3g", "calls of the network": ".0f"}
PAIRS = {**COUNTS, **CHOICES, **FOUND}
# of which each row has a metric of its own: (title, what a row is of)
PARTS = {
    "training": ("A step of training", "step"),
    "inverse problems": ("A call of a guided network", "network, method"),
    "networks": ("A network's call and its training's step, at equal weights", "network, precision"),
}
# of solvers that choose their steps, and of those that do not
CHOOSING = {"likelihood": "Log-likelihoods at equal error", "rk45": "The sampler rk45 at equal error"}
PER_CALL = "us outside the network per call"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *lines])


def value(row: Row) -> float:
    return float(row["ratio_p50"])


def ratio(row: Row | None) -> str:
    """Their time in units of ours, if its pairs agree to a factor of two."""
    if row is None:
        return "–"
    if float(row["ratio_p80"]) > 2 * float(row["ratio_p20"]):
        return "unsteady"
    mark = "†" if (row["case"], row["opponent"]) in INEXACT else ""
    return f"{value(row):.{1 if value(row) >= 2 else 2}f}×{mark}"


def against(row: Row) -> str:
    return f"{ratio(row)} {PLAIN.get(row['opponent'], row['opponent'])}"


def cell(row: Row) -> str:
    """A measurement as its metric is read."""
    metric, ours = row["metric"], float(row["ours"])
    if metric in PAIRS:
        return " : ".join(format(float(row[who]), PAIRS[metric]) for who in ("ours", "theirs"))
    if metric == "ms":
        return f"{ours:,.0f} ms, {ratio(row)}"
    return format(ours, ".1e" if metric.startswith("error") else ".1f")


def pivot(rows: Sequence[Row], heads: Sequence[str], metrics: Sequence[str]) -> str:
    """A line for each case and opponent, a column for each metric."""
    found = {(r["case"], r["opponent"], r["metric"]): cell(r) for r in rows if r["metric"] in metrics}
    lines = [[*key, *(found.get((*key, m), "–") for m in metrics)] for key in dict.fromkeys(key[:2] for key in found)]
    return markdown([*heads, *metrics], lines)


def plain(rows: Sequence[Row], columns: Sequence[str]) -> str:
    return markdown(columns, [[r[column] or "–" for column in columns] for r in rows])


def operations(rows: Sequence[Row]) -> str:
    found = {(r["case"], r["opponent"], r["n"], r["threads"]): r for r in rows}
    heads = [f"n = {int(n):,}, {'one thread' if threads == '1' else 'two'}" for n, threads in SIZES]
    lines = {key[:2]: [*key[:2], *(ratio(found.get((*key[:2], *size))) for size in SIZES)] for key in found}
    return markdown(["operation", "instead of it", *heads], [line for line in lines.values() if set(line[2:]) != {"–"}])


def runs(rows: Sequence[Row], metric: str) -> str:
    """A line for each sampler: our microseconds a step, the median over the pairs with all opponents, and each opponent's
    time in units of ours, by its own pairs."""
    rows = [r for r in rows if r["metric"] == metric]
    opponents, lines = list(dict.fromkeys(r["opponent"] for r in rows)), []
    for sampler in dict.fromkeys(r["case"] for r in rows):
        of_it = {r["opponent"]: r for r in rows if r["case"] == sampler}
        ours = statistics.median(float(r["ours"]) for r in of_it.values())
        shown = f"{ours:,.{0 if ours >= 100 else 1}f} µs"
        lines.append([sampler, shown, *(ratio(of_it.get(name)) for name in opponents)])
    return markdown(["sampler", "fastdiff", *opponents], lines)


def sections(group: str, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """(title, text) of what RESULTS.md says of a group of one machine's rows."""
    if group == "ops":
        yield "Operations", operations(rows)
    elif group == "launches":
        yield (
            "Launches of the Triton kernels, without a GPU",
            plain(rows, ("case", "opponent", "ours", "theirs", "ratio_p50")),
        )
    elif group in CHOOSING:
        yield CHOOSING[group], pivot(rows, ["problem; steps", "against"], ["ms", *CHOICES])
    elif group in PARTS:
        title, of = PARTS[group]
        lines = [[r["case"], r["opponent"], f"{float(r['ours']):,.1f}", ratio(r), r["metric"]] for r in rows]
        yield title, markdown([of, "against", "fastdiff", "theirs", "of"], lines)
    elif group == "posteriors":
        yield "Posteriors that are known", pivot(rows, ["problem, and how", "against"], list(FOUND))
    elif group == "solvers":
        errors = dict.fromkeys(r["metric"] for r in rows if r["metric"].startswith("error"))
        yield "Deterministic solvers by network calls", pivot(rows, ["solver", "against"], [*errors, PER_CALL])
    elif group.startswith("gpu"):
        yield group, plain(rows, ("case", "opponent", "n", "metric", "ours", "theirs", "ratio_p50"))
    else:
        for threads in dict.fromkeys(r["threads"] for r in rows):
            there, on = (
                [r for r in rows if r["threads"] == threads],
                "one thread" if threads == "1" else f"{threads} threads",
            )
            yield f"{group}, outside the network, {on}", runs(there, OUTSIDE)
            yield f"{group}, end to end, {on}", runs(there, WHOLE)
        if any(r["metric"] in COUNTS for r in rows):
            yield f"{group}, what a step asks of torch", pivot(rows, ["sampler", "fastdiff : opponent"], list(COUNTS))


def provenance(rows: Sequence[Row], path: Path) -> str:
    days: dict[str, dict[str, None]] = {}
    for r in rows:
        days.setdefault(r["commit"] or "an unknown commit", {})[r["date"]] = None
    at = ", ".join(f"{commit} on {' and '.join(dates)}" for commit, dates in days.items())
    versions = [(r["opponent"], r["version"]) for r in rows if r["version"]]
    packages = dict.fromkeys(f"{name} {version}" for name, version in versions if "Python" not in version)
    here = [version for _, version in versions if "Python" in version][:1]
    theirs = f"; against {', '.join(packages)}" if packages else ""
    return (
        f"Measured at commit {at}: {', '.join([rows[0]['device'], *here])}, torch {rows[0]['torch']}{theirs}. "
        f"`benchmarks/results/{path.name}` has the spread and the times."
    )


def best(rows: Sequence[Row], group: str, metric: str) -> dict[str, Row]:
    """sampler -> the row of its fastest rival, on one thread; the samplers most ahead of theirs first."""
    rows = [r for r in rows if (r["group"], r["metric"], r["threads"]) == (group, metric, "1")]
    found = [min((r for r in rows if r["case"] == case), key=value) for case in dict.fromkeys(r["case"] for r in rows)]
    return {row["case"]: row for row in sorted(found, key=value, reverse=True)}


def summary(path: Path = MACHINE) -> str:
    """What stands in the README."""
    rows = read(path)
    images, vectors = best(rows, IMAGES, OUTSIDE), best(rows, VECTORS, WHOLE)
    lines = [[case, f"{float(r['ours']):.0f} µs", against(r), against(vectors[case])] for case, r in images.items()]
    heads = ["sampler", "fastdiff, a step", "best rival, outside the network", "best rival, whole run with a small MLP"]
    return "\n\n".join([
        markdown(heads, lines),
        f"![how many times as long the best rival of each sampler takes]({PICTURE.relative_to(ROOT)})",
        "How many times as long the fastest rival takes for the same levels and network calls, on one thread: outside the "
        "network for 64 images of 3×32×32, and in all for 256 vectors with a small MLP. The step is as it was timed beside that "
        "rival; beside others it differs by some per cent. Fed the same noise it gives the same "
        f"samples, checked before timing; {DAGGER} \"As printed\" is the paper's algorithm, \"in place\" a loop by hand. With a "
        f"large network only the network matters. {provenance(rows, path)} [All results](docs/RESULTS.md).",
    ])  # fmt: skip


def results() -> str:
    """The tables of RESULTS.md: every machine that left a file."""
    parts = []
    compiled = RESULTS / "aot.csv"
    for path in sorted(set(RESULTS.glob("*.csv")) - {compiled}):
        rows = read(path)
        parts += [f"## {rows[0]['device']}", provenance(rows, path)]
        for group in dict.fromkeys(r["group"] for r in rows):
            parts += [f"### {t}\n\n{text}" for t, text in sections(group, [r for r in rows if r["group"] == group])]
    columns = ("kernel", "variant", "registers", "spills", "instructions_per_element", "loads_128", "stores_128")
    lines = plain([r for r in read(compiled) if r["target"] == "sm_90"], columns)
    return "\n\n".join([*parts, f"## The Triton kernels as compiled for sm_90\n\n{lines}"])


def plot(path: Path = MACHINE, to: Path = PICTURE) -> None:
    """How many times as long the best rival of each sampler takes outside the network, a bar each."""
    from matplotlib.figure import Figure

    rows = list(best(read(path), IMAGES, OUTSIDE).values())
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([r["case"] for r in rows], [value(r) for r in rows], color="#2a6fbb", height=0.68)
    axes.bar_label(bars, [against(r) for r in rows], padding=4, fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.text(1.06, -0.6, "fastdiff", fontsize=9)
    axes.set(ylim=(len(rows) - 0.5, -1.1), xlim=(0, 1.25 * max(map(value, rows))))
    axes.set_xlabel(
        "time of each sampler's fastest rival outside the network, fastdiff = 1\n64 images of 3×32×32, one CPU thread\n"
        "† only the mean and spread of the samples were compared"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=120)


def main() -> None:
    for path, text in ((README, summary()), (TABLES, results())):
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    plot()


if __name__ == "__main__":
    main()
