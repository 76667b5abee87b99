"""Sampling against transformers' warpers, and as a distribution; the same tokens on every backend."""

import functools

import numpy as np
import pytest

from modelhub.core.backends import get_backend
from modelhub.errors import InputError
from modelhub.generation.sampling import Sampler, draw, greedy, sample

SAMPLERS = [
    Sampler(temperature=1.0),
    Sampler(temperature=0.3),
    Sampler(temperature=2.5),
    Sampler(top_k=1),
    Sampler(top_k=7),
    Sampler(top_k=10_000),
    Sampler(top_p=0.0),
    Sampler(top_p=0.3),
    Sampler(top_p=0.95),
    Sampler(top_p=1.0),
    Sampler(min_p=0.02),
    Sampler(min_p=0.5),
    Sampler(min_p=1.0),
    Sampler(temperature=0.7, top_k=20, top_p=0.9),
    Sampler(temperature=1.3, top_k=40, top_p=0.8, min_p=0.1),
    Sampler(temperature=0.5, top_p=0.99, min_p=0.01),
]
SHAPES = {"flat": 1.0, "usual": 4.0, "peaked": 30.0}


def random_logits(vocabulary, spread, seed=0):
    return (np.random.default_rng(seed).standard_normal(vocabulary) * spread).astype(np.float32)


def transformers_probabilities(logits, sampler):
    """float64 (V,), by the warpers that `generate` of transformers applies, in its order."""
    import torch
    from transformers.generation import logits_process as warpers

    scores = torch.tensor(logits, dtype=torch.float64)[None]
    if sampler.temperature not in (None, 1.0):
        scores = warpers.TemperatureLogitsWarper(sampler.temperature)(None, scores)
    if sampler.top_k:
        scores = warpers.TopKLogitsWarper(sampler.top_k)(None, scores)
    if sampler.top_p not in (None, 1.0):
        scores = warpers.TopPLogitsWarper(sampler.top_p)(None, scores)
    if sampler.min_p:
        scores = warpers.MinPLogitsWarper(sampler.min_p)(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


@functools.cache
def compiled_sample(xp, truncations):
    return xp.compile(functools.partial(sample, xp, truncations=truncations))


def drawn(xp, logits, uniforms, sampler):
    """The tokens that `uniforms` (n,) pick from logits (V,) or (n, V)."""
    rows = np.broadcast_to(logits, (len(uniforms), logits.shape[-1]))
    fn = compiled_sample(xp, sampler.truncations)
    tokens = fn(xp.array(rows, "float32"), xp.array(uniforms, "float32"), xp.array(sampler.values()))
    assert xp.dtype(tokens) == "int32"
    return xp.get(tokens)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_tokens_and_shares_as_transformers(backend, sampler, shape):
    """A uniform in the middle of a token's share of [0, 1] picks that token: kept set and probabilities are equal."""
    logits = random_logits(200, SHAPES[shape])
    p = transformers_probabilities(logits, sampler)
    wide = np.flatnonzero(p > 1e-5)  # narrower shares are within the rounding of float32 sums
    middles = (np.cumsum(p) - p / 2)[wide]
    uniforms = np.pad(middles, (0, 200 - len(middles)), constant_values=0.5)  # one shape, one compilation
    assert drawn(backend, logits, uniforms, sampler)[: len(wide)].tolist() == wide.tolist()
    kept = np.flatnonzero(p)
    spread = drawn(backend, logits, np.linspace(0, 1 - 1e-6, 200), sampler)
    assert set(spread) <= set(kept)


def test_frequencies_match_the_probabilities(backend):
    sampler = Sampler(temperature=1.5, top_k=12)
    logits = random_logits(20, 2.0)
    p = transformers_probabilities(logits, sampler)
    n = 20_000
    tokens = drawn(backend, logits, draw([np.random.default_rng([0, row]) for row in range(n)]), sampler)
    counts, kept = np.bincount(tokens, minlength=20), p > 0
    assert counts[~kept].sum() == 0 and kept.sum() == 12
    chi_square = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()
    assert chi_square < 31.3  # 11 degrees of freedom, one in a thousand


@pytest.mark.parametrize("sampler", [Sampler(top_k=50), Sampler(top_p=0.9), Sampler(min_p=0.05)], ids=str)
def test_no_token_outside_the_kept_set_in_a_large_vocabulary(backend, sampler):
    """XLA sums prefixes in a tree, so that sums rise by rounding where a token without probability stands."""
    logits = random_logits(32768, 4.0)
    p = transformers_probabilities(logits, sampler)
    kept = np.flatnonzero(p)
    mass = backend.get(backend.cumsum(backend.array(p.astype(np.float32)[None])))[0]
    edges = (mass / mass[-1])[kept][:40]
    uniforms = np.concatenate([edges, np.nextafter(edges, np.float32(0))]).clip(0, 1 - 1e-6).astype(np.float32)
    assert set(drawn(backend, logits, uniforms, sampler)) <= set(kept)


def test_the_first_and_the_last_share(backend):
    logits = np.array([-np.inf, 0.0, 1.0, -1e30, 0.5, -np.inf], np.float32)  # masked tokens at both ends
    tokens = drawn(backend, logits, np.array([0.0, 1 - 1e-6], np.float32), Sampler(temperature=1.0))
    assert tokens.tolist() == [1, 4]


def test_rows_are_independent(backend):
    logits = np.stack([random_logits(50, 3.0, seed) for seed in range(6)])
    uniforms = np.linspace(0.05, 0.95, 6).astype(np.float32)
    sampler = Sampler(temperature=0.9, top_k=9, top_p=0.8)
    together = drawn(backend, logits, uniforms, sampler)
    alone = [drawn(backend, logits[[row]], uniforms[[row]], sampler)[0] for row in range(6)]
    assert together.tolist() == alone


@pytest.mark.parametrize("sampler", [Sampler(temperature=1.0), Sampler(temperature=0.8, top_k=40, top_p=0.95)], ids=str)
def test_same_tokens_on_every_backend(backend, sampler):
    logits = np.stack([random_logits(5000, 3.0, seed) for seed in range(64)])
    uniforms = draw([np.random.default_rng([3, row]) for row in range(64)])
    wanted = drawn(get_backend("numpy", "cpu"), logits, uniforms, sampler)
    assert drawn(backend, logits, uniforms, sampler).tolist() == wanted.tolist()
    assert len(set(wanted)) > 30


def test_ties_at_a_threshold_are_all_kept(backend):
    logits = np.array([1.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    tokens = drawn(backend, logits, np.array([0.1, 0.5, 0.9], np.float32), Sampler(top_k=2))
    assert tokens.tolist() == [1, 2, 3]


def test_greedy(backend):
    logits = np.stack([random_logits(500, 3.0, seed) for seed in range(4)])
    logits[0, [7, 9]] = 100.0  # the first of equals
    found = greedy(backend, backend.array(logits))
    assert backend.dtype(found) == "int32"
    assert backend.get(found).tolist() == [7, *logits[1:].argmax(-1)]


def test_draw_never_reaches_one():
    class Top:
        def random(self, dtype):
            return np.nextafter(np.float32(1), np.float32(0))

    highest = draw([Top()])
    assert highest.dtype == np.float32 and highest[0] < 1
    for mass in np.float32([1e-30, 0.1, 1.0, 3.7, 262144.0]):
        assert highest[0] * mass < mass


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.1}, "temperature must be 0 .* -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k must be a whole number.* -1"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": float("nan")}, "top_k"),
        ({"top_k": float("inf")}, "top_k"),
        ({"top_p": 1.01}, "top_p must lie between 0 and 1, got 1.01"),
        ({"top_p": -0.01}, "top_p"),
        ({"min_p": 1.5}, "min_p must lie between 0 and 1, got 1.5"),
        ({"min_p": float("nan")}, "min_p"),
    ],
)
def test_values_that_make_no_sense(values, message):
    with pytest.raises(InputError, match=message):
        Sampler(**values)


def test_what_counts_as_greedy_and_as_a_truncation():
    assert Sampler().greedy and Sampler(temperature=0).greedy and Sampler(temperature=0.0, top_k=5).greedy
    for sampler in (Sampler(temperature=1.0), Sampler(top_k=5), Sampler(top_p=0.5), Sampler(min_p=0.1)):
        assert not sampler.greedy
    assert Sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0).truncations == ()
    assert Sampler(top_k=3, top_p=0.0, min_p=0.1).truncations == ("top_k", "top_p", "min_p")
    assert Sampler(top_k=3).values().tolist() == [1.0, 3.0, 0.0, 0.0]
