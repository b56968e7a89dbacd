"""The runner on tables written by hand, against a loop in float64 that knows nothing of it."""

from __future__ import annotations

import pytest
import torch

from fastdiff import native, runner
from fastdiff.reference import noise, row
from fastdiff.table import Level, Row, StepTable

SEED = 2**63 + 12345


def table(rows):
    """Rows with a multistep history, a base state that lies several rows back, rows without a call, scaled inputs."""
    lines = []
    for k in range(rows):
        calls = k % 5 != 3
        reach = min(k, 2)
        lines.append(
            Row(
                Level(1 - k / rows, 1.0, 1.0), "made up", a=0.6, e=0.2 if k else 0.0, c=0.1 * (k % 3), time=k,
                b=((0.1,) if calls else ()) + (0.05, -0.03)[:reach], calls=calls, pushes=calls, opens=k % 4 == 0,
                in_scale=1.0 if k % 2 else 0.5, p=0.25 if k % 7 == 2 else 0.0, q=1.0,
            )
        )  # fmt: skip
    return StepTable("by hand", tuple(lines), Level(0.0, 1.0, 0.0), 1.0)


def network(k, x):
    return x * 0.5 + (k % 10) * 0.01


def by_hand(rows, x, first_sample):
    """The same, with lists and no buffers."""
    base, history, states, inputs = x, [], [], []
    for k, line in enumerate(rows.rows):
        base = x if line.opens else base
        used = list(history)
        if line.calls:
            inputs.append(line.in_scale * x)
            h = line.p * x + line.q * network(k, inputs[-1])
            used.insert(0, h)
        z = noise.normal(
            len(x), x.shape[1:], seed=SEED, draw=k, first_sample=first_sample, stream=noise.SAMPLER
        ).double()
        x = line.a * x + line.e * base + sum(b * v for b, v in zip(line.b, used)) + line.c * z
        history = used if line.pushes else history
        states.append(x)
    return states, inputs


@pytest.mark.parametrize("operations", [native, row], ids=["cpu", "reference"])
def test_runs_are_the_loop_by_hand(operations):
    rows = table(1100)  # more than the rows of one block of cursors
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, inputs = by_hand(rows, x, 7)
    seen = []

    def watched(k, given):
        seen.append(given)  # the very tensor: it must stay as it is
        return network(k, given), None

    run = runner.run(
        rows, operations, watched, x.clone(), 0.5 * x, seed=SEED, first_sample=7, noise=None, check="final"
    )
    for k, (ours, theirs) in enumerate(zip(run, expected)):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), k
    assert len(seen) == len(inputs) == rows.calls
    for ours, theirs in zip(seen, inputs):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
