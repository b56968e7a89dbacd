"""FDN1: known answers, the distribution, and independence of everything but (seed, stream, sample, draw, element)."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import fastdiff
from fastdiff.execution import noise

# Random123's kat_vectors for philox4x32 10
PHILOX = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0xA4093822 | 0x299F31D0 << 32,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# the definition's own table: (seed, draw, sample, stream) -> the bits of the first eight normals
NORMALS = {
    (0, 0, 0, 0): "bfaa74c2 be817cd6 3f2345e7 bee8faea 3e02ddd6 be4cb922 3d4be7a9 bf5a7844",
    (1, 0, 0, 0): "3ef37fd7 bda29d09 bee807ca bf6e03ef be335f21 3f5fcef0 bf208480 bf85d56c",
    (0, 1, 0, 0): "bfa7b7d6 be351270 3d66c8e9 bfa1353d be5dddc4 bfa46113 3dd0919a be135f01",
    (0, 0, 1, 0): "bddebfa3 3f927009 3fdc873c bfd2094e bf2a8474 be22f508 3f6e2714 3f3d2992",
    (0x123456789ABCDEF0, 999, 49999, 1): "3fc3f121 3f3b6075 bf6a3999 bfaa187a bf4f5c2f c0132ffc 3f32316e be890911",
}


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in noise.philox(counter, key)) == expected


@pytest.mark.parametrize("key", NORMALS)
def test_normal_known_answers(key):
    seed, draw, sample, stream = key
    z = fastdiff.normal(1, (8,), seed=seed, draw=draw, first_sample=sample, stream=stream)
    assert " ".join(f"{b & 0xFFFFFFFF:08x}" for b in z[0].view(torch.int32).tolist()) == NORMALS[key]


def _double_normals(n, seed):
    """Box-Muller in float64 from the same words: what the float32 polynomials approximate."""
    r0, r1, r2, r3 = (
        w[0].double() for w in noise.words(1, n // 4, seed=seed, draw=0, first_sample=0, stream=0, device=None)
    )
    pairs = []
    for even, odd in ((r0, r1), (r2, r3)):
        radius = torch.sqrt(-2 * torch.log(((even // 2) + 0.5) * 2.0**-31))
        signed = torch.where(odd >= 2**31, odd - 2**32, odd)
        angle = signed * 2.0**-32 * math.pi / 2
        sign, swap = 1 - 2 * (odd % 2), (odd // 2) % 2 == 1
        c, s = torch.cos(angle) * sign, torch.sin(angle)
        pairs += [radius * torch.where(swap, s, c), radius * torch.where(swap, c, s)]
    return torch.stack(pairs, -1).flatten()


def test_normals_are_box_muller_of_the_words():
    n = 1 << 18
    assert (fastdiff.normal(1, (n,), seed=3)[0].double() - _double_normals(n, 3)).abs().max() < 2e-5


def test_fma_emulation_is_exact_where_it_is_used():
    """A strided sample of all words through exact rational arithmetic would be slow; round-to-odd is exact and fast."""
    from fastdiff.execution.reference import fma

    words = torch.arange(0, 2**32, 4099, dtype=torch.int64)
    u = (words >> 1).float()
    exact = fma(u, torch.full_like(u, 2.0**-31), torch.full_like(u, 2.0**-32))
    assert torch.equal(exact, noise._fma(u, 2.0**-31, 2.0**-32))
    s = (words.to(torch.int32).float() * 2.0**-32) ** 2
    p = torch.full_like(s, noise._SIN[0])
    q = p.clone()
    for c in noise._SIN[1:]:
        p, q = noise._fma(p, s, c), fma(q, s, torch.full_like(s, c))
    assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (4,), (5,), (1, 3, 7), (1023,), (3, 32, 32)])
def test_a_normal_depends_on_its_own_counter_alone(shape):
    whole = fastdiff.normal(7, shape, seed=11, draw=2, first_sample=40, stream=3)
    for i in range(7):
        assert torch.equal(whole[i], fastdiff.normal(1, shape, seed=11, draw=2, first_sample=40 + i, stream=3)[0])
    # the elements of a shorter sample are those of a longer one
    longer = fastdiff.normal(7, (4096,), seed=11, draw=2, first_sample=40, stream=3)
    assert torch.equal(whole.flatten(1), longer[:, : whole[0].numel()])


def test_seed_draw_sample_and_stream_all_matter():
    base = {"seed": 5, "draw": 5, "first_sample": 5, "stream": 5}
    seen = [fastdiff.normal(1, (64,), **base)]
    seen += [fastdiff.normal(1, (64,), **{**base, name: value}) for name in base for value in (4, 6)]
    seen.append(fastdiff.normal(1, (64,), **{**base, "seed": 5 + 2**32}))
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert (a == b).float().mean() < 0.1


def test_thread_count_does_not_matter():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastdiff.normal(33, (3, 33, 35), seed=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_normals_are_normal():
    n = 2_000_000
    z = fastdiff.normal(n // 1000, (1000,), seed=2026).double().flatten()
    assert stats.kstest(z.numpy()[:200_000], "norm").pvalue > 1e-4
    for k, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((z**k).mean() - moment) < 5 * math.sqrt(variance / n)
    for bound in (3.0, 4.0):
        expected = n * math.erfc(bound / math.sqrt(2))
        assert abs((z.abs() > bound).sum() - expected) < 5 * math.sqrt(expected)
    pairs = z.view(-1, 4)  # the four of one counter are uncorrelated, and so are their squares
    for i in range(4):
        for j in range(i):
            assert abs((pairs[:, i] * pairs[:, j]).mean()) < 5 / math.sqrt(n / 4)
            assert abs(((pairs[:, i] ** 2 - 1) * (pairs[:, j] ** 2 - 1)).mean()) < 5 * 2 / math.sqrt(n / 4)


def test_uniform_numbers_are_uniform():
    u = noise.uniform(1000, (200,), seed=1, stream=noise.TIMES).flatten()
    assert 0 <= u.min() < u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert torch.equal(u.view(1000, 200)[7], noise.uniform(1, (200,), seed=1, stream=noise.TIMES, first_sample=7)[0])


def test_permutation_is_a_permutation_and_unbiased():
    assert sorted(noise.permutation(1001, seed=0, draw=0).tolist()) == list(range(1001))
    first = torch.stack([noise.permutation(5, seed=0, draw=k) for k in range(4000)])
    counts = torch.stack([(first == value).sum(0) for value in range(5)]).double()  # [value, position]
    assert ((counts - 800).abs() < 5 * math.sqrt(800 * 0.8)).all()


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    fastdiff.normal(3, (4,), seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "bad", [{"seed": -1}, {"seed": 2**64}, {"seed": 1.0}, {"seed": True}, {"draw": 2**32}, {"shape": ()}]
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(fastdiff.errors.ConfigError, match=next(iter(bad))):
        fastdiff.normal(**{"num_samples": 1, "shape": (2,), "seed": 0, **bad})
