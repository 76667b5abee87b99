"""Sampling against transformers' warpers, and as a distribution; the same tokens on every backend."""

import functools

import numpy as np
import pytest

from modelhub.core.backends import get_backend
from modelhub.errors import InputError
from modelhub.generation.sampling import Sampler, choose, draw, sample

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


def name(sampler):
    return " ".join(f"{key}={value}" for key, value in vars(sampler).items() if value not in (None, {}))


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
def compiled_sample(xp, features):
    return xp.compile(functools.partial(sample, xp, features=features))


def drawn(xp, logits, uniforms, sampler):
    """The tokens that `uniforms` (n,) pick from logits (V,) or (n, V)."""
    rows = np.broadcast_to(logits, (len(uniforms), logits.shape[-1]))
    fn = compiled_sample(xp, sampler.features)
    tokens = fn(xp.array(rows, "float32"), xp.array(uniforms, "float32"), xp.array(sampler.values()))
    assert xp.dtype(tokens) == "int32"
    return xp.get(tokens)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
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


@pytest.mark.parametrize("sampler", [Sampler(top_k=50), Sampler(top_p=0.9), Sampler(min_p=0.05)], ids=name)
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


@pytest.mark.parametrize(
    "sampler", [Sampler(temperature=1.0), Sampler(temperature=0.8, top_k=40, top_p=0.95)], ids=name
)
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


# choose: penalties before, log-probabilities beside.


def chosen(xp, sampler, logits, uniforms, seen=None, counts=None, logprobs=False):
    """Tokens, log-probabilities and new counts of logits (B, V), as numpy arrays."""
    nothing = np.zeros((1, 1), np.float32)
    bias = sampler.bias(logits.shape[1]) if sampler.logit_bias else nothing
    fn = xp.compile(functools.partial(choose, xp, features=sampler.features, logprobs=logprobs), hot=False)
    seen, counts = (nothing if x is None else np.asarray(x, np.float32) for x in (seen, counts))
    inputs = (logits, np.asarray(uniforms, np.float32), sampler.values(), bias, seen, counts)
    token, logprob, counts = fn(*(xp.array(x, "float32") for x in inputs))
    assert (xp.dtype(token), xp.dtype(logprob)) == ("int32", "float32")
    return xp.get(token), xp.get(logprob), xp.get(counts)


def test_greedy(backend):
    logits = np.stack([random_logits(500, 3.0, seed) for seed in range(4)])
    logits[0, [7, 9]] = 100.0  # the first of equals
    tokens, logprobs, _ = chosen(backend, Sampler(), logits, np.zeros(4))
    assert tokens.tolist() == [7, *logits[1:].argmax(-1)]
    assert logprobs.tolist() == [0, 0, 0, 0]  # not asked for


SEEN = np.random.default_rng(0).random((3, 40)) < 0.3
COUNTS = np.random.default_rng(1).integers(0, 4, (3, 40)) * (np.random.default_rng(2).random((3, 40)) < 0.4)


def penalised(sampler, logits):
    """float32 (B, V), by transformers' processors where it has them."""
    import torch
    from transformers.generation import logits_process as processors

    rows = []
    for row, row_logits in enumerate(logits):
        x = torch.tensor(row_logits)[None]
        context = torch.tensor(np.flatnonzero(SEEN[row] | (COUNTS[row] > 0)))[None]
        if sampler.logit_bias:
            bias = {(token,): float(amount) for token, amount in sampler.logit_bias.items()}
            x = processors.SequenceBiasLogitsProcessor(bias)(context, x)
        if sampler.repetition_penalty:
            x = processors.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)(context, x)
        rows.append(x[0].numpy())
    presence, frequency = sampler.presence_penalty or 0.0, sampler.frequency_penalty or 0.0
    return np.stack(rows) - presence * (COUNTS > 0) - frequency * COUNTS


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -2.0, "frequency_penalty": -0.5},
        {"logit_bias": {3: 4.0, 17: -100.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {5: 2.0}},
    ],
    ids=str,
)
def test_penalties(backend, options):
    logits = np.stack([random_logits(40, 2.0, seed) for seed in range(3)])
    wanted = penalised(Sampler(**options), logits)
    tokens, _, counts = chosen(backend, Sampler(**options), logits, np.zeros(3), SEEN, COUNTS)
    assert tokens.tolist() == wanted.argmax(-1).tolist()
    if Sampler(**options).counts_tokens:
        assert counts.tolist() == (COUNTS + np.eye(40)[tokens]).tolist()
    hot = Sampler(**options, temperature=0.8)
    uniforms = np.array([0.2, 0.5, 0.8])
    cumulative = np.cumsum(np.stack([transformers_probabilities(row, Sampler(temperature=0.8)) for row in wanted]), -1)
    tokens, _, _ = chosen(backend, hot, logits, uniforms, SEEN, COUNTS)
    assert tokens.tolist() == (cumulative > uniforms[:, None]).argmax(-1).tolist()


def test_penalties_change_what_is_chosen():
    """Or the test above proves nothing."""
    logits = np.stack([random_logits(40, 2.0, seed) for seed in range(3)])
    for options in ({"repetition_penalty": 1.7}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.8}):
        assert penalised(Sampler(**options), logits).argmax(-1).tolist() != logits.argmax(-1).tolist()


def test_log_probabilities_are_the_models_own(backend):
    """Before penalties, temperature and truncation."""
    logits = np.stack([random_logits(40, 2.0, seed) for seed in range(3)])
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    for sampler in (Sampler(), Sampler(temperature=0.3, top_k=5), Sampler(repetition_penalty=2.0, logit_bias={1: 5.0})):
        tokens, logprobs, _ = chosen(backend, sampler, logits, [0.1, 0.5, 0.9], SEEN, COUNTS, logprobs=True)
        np.testing.assert_allclose(logprobs, exact[np.arange(3), tokens], rtol=1e-5)


def test_bias_for_a_token_that_does_not_exist():
    assert Sampler(logit_bias={1: 2.5}).bias(3).tolist() == [0, 2.5, 0]
    for token in (-1, 3):
        with pytest.raises(InputError, match=f"logit_bias has the token id {token}; .* 0 to 2"):
            Sampler(logit_bias={token: 1.0}).bias(3)


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
        ({"top_p": 1.01}, "top_p must be between 0 and 1, got 1.01"),
        ({"top_p": -0.01}, "top_p"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1, got 1.5"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite number"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ],
)
def test_values_that_make_no_sense(values, message):
    with pytest.raises(InputError, match=message):
        Sampler(**values)


def test_what_counts_as_greedy_and_as_a_feature():
    assert Sampler().greedy and Sampler(temperature=0).greedy and Sampler(temperature=0.0, top_k=5).greedy
    for sampler in (Sampler(temperature=1.0), Sampler(top_k=5), Sampler(top_p=0.5), Sampler(min_p=0.1)):
        assert not sampler.greedy
    assert Sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0).features == {"sample"}
    assert Sampler(top_k=3, top_p=0.0, min_p=0.1).features == {"sample", "top_k", "top_p", "min_p"}
    assert Sampler(temperature=0, top_k=3, presence_penalty=0.1).features == {"presence_penalty"}
    assert Sampler().features == Sampler(presence_penalty=0.0, logit_bias={}).features == set()
    assert Sampler(top_k=3).values().tolist() == [1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
