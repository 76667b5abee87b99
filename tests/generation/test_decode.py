"""The decode loop: cached equals uncached, batched equals alone, nothing compiled twice, nothing computed for nothing."""

import gc
import itertools
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from modelhub.core.tree import flatten, initial_value
from modelhub.errors import InputError
from modelhub.families.gemma import Config, Decoder, Model
from modelhub.generation import decode
from modelhub.generation.decode import GenerationEngine, bucket
from modelhub.generation.sampling import Sampler

CONFIG = Config.from_hf(
    {
        "model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
        "sliding_window_pattern": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }
)  # fmt: skip
SKELETON = Model.abstract(CONFIG)
SAMPLED = Sampler(temperature=1.2, top_k=30, top_p=0.95)
PROMPTS = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in (13, 1, 6)]
NEW = 12


def make_params(xp):
    # Ten times the usual spread, so that the logits differ and the tokens vary.
    return {name: xp.array(10 * initial_value(name, spec, 0)) for name, spec in flatten(SKELETON).items()}


@pytest.fixture(scope="module")
def engine(backend):
    return GenerationEngine(backend, SKELETON, "float32")


@pytest.fixture(scope="module")
def params(backend):
    return make_params(backend)


def run(engine, params, prompts, new=NEW, sampler=None, seed=0, **options):
    """(B, new) tokens."""
    found = list(engine.run(params, prompts, new, sampler or Sampler(), seed, **options))
    rows = len(prompts) * options.get("copies", 1)
    for tokens, logprobs in found:
        assert tokens.shape == logprobs.shape == (rows,)
        assert tokens.dtype == np.int32 and logprobs.dtype == np.float32
    return np.stack([tokens for tokens, _ in found], 1)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_greedy_is_the_argmax_of_uncached_logits(engine, params):
    """In a batch of different lengths, past the sliding window."""
    tokens = run(engine, params, PROMPTS)
    assert tokens.shape == (3, NEW) and len(set(tokens.ravel().tolist())) > 5
    for prompt, row in zip(PROMPTS, tokens.tolist(), strict=True):
        logits = engine.logits(params, np.array([prompt + row], np.int32))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row


def test_batch_equals_alone(engine, params):
    together = run(engine, params, PROMPTS)
    for index in (0, 2):
        assert run(engine, params, [PROMPTS[index]])[0].tolist() == together[index].tolist()


def test_prompts_in_chunks(engine, params, monkeypatch):
    monkeypatch.setattr(decode, "CHUNK", 16)
    prompts = [np.random.default_rng(length).integers(0, 97, length).tolist() for length in (40, 16, 17)]
    for prompt, row in zip(prompts, run(engine, params, prompts, 3).tolist(), strict=True):
        logits = engine.logits(params, np.array([prompt + row], np.int32))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row


# Sampling.


def test_same_seed_same_tokens_on_every_backend(engine, params):
    tokens = run(engine, params, PROMPTS, sampler=SAMPLED, seed=5)
    assert tokens.tolist() == run(engine, params, PROMPTS, sampler=SAMPLED, seed=5).tolist()
    assert tokens.tolist() != run(engine, params, PROMPTS, sampler=SAMPLED, seed=6).tolist()
    assert tokens.tolist() != run(engine, params, PROMPTS).tolist()
    if engine.xp.name != "numpy":
        from modelhub.core.backends import get_backend

        xp = get_backend("numpy", "cpu")
        assert (
            tokens.tolist()
            == run(
                GenerationEngine(xp, SKELETON, "float32"), make_params(xp), PROMPTS, sampler=SAMPLED, seed=5
            ).tolist()
        )


def test_a_sampled_row_does_not_depend_on_its_neighbours(engine, params):
    together = run(engine, params, PROMPTS, sampler=SAMPLED, seed=5)
    others = run(engine, params, [PROMPTS[0], PROMPTS[2], PROMPTS[2]], sampler=SAMPLED, seed=5)
    assert together[0].tolist() == others[0].tolist() and together[2].tolist() == others[2].tolist()
    assert run(engine, params, PROMPTS[:1], sampler=SAMPLED, seed=5)[0].tolist() == together[0].tolist()
    twins = run(engine, params, [PROMPTS[0]] * 3, sampler=SAMPLED, seed=5)
    assert len({tuple(row) for row in twins.tolist()}) == 3  # the same prompt in several rows is not the same sample


def test_copies_are_rows_with_random_numbers_of_their_own(engine, params):
    prompts = [PROMPTS[0], PROMPTS[2]]
    tokens = run(engine, params, prompts, sampler=SAMPLED, seed=5, copies=3)
    assert tokens.shape == (6, NEW)
    assert (
        tokens.tolist() == run(engine, params, [p for p in prompts for _ in range(3)], sampler=SAMPLED, seed=5).tolist()
    )
    assert len({tuple(row) for row in tokens.tolist()}) == 6


def test_log_probabilities(engine, params):
    """Of the tokens that were chosen, greedily or not, under the model itself."""
    for sampler in (Sampler(), SAMPLED):
        found = list(engine.run(params, PROMPTS, NEW, sampler, 3, logprobs=True))
        tokens, logprobs = (np.stack(part, 1) for part in zip(*found, strict=True))
        for prompt, row, scores in zip(PROMPTS, tokens.tolist(), logprobs, strict=True):
            exact = log_softmax(engine.logits(params, np.array([prompt + row], np.int32))[0, len(prompt) - 1 : -1])
            np.testing.assert_allclose(scores, exact[np.arange(NEW), row], atol=1e-4)


def test_penalties_count_prompt_and_answer(engine, params):
    """A greedy model that repeats itself does so no more, and what it avoids is what it has said."""
    prompt = PROMPTS[0]
    free = run(engine, params, [prompt], 30)[0].tolist()
    assert len(set(free)) < 30
    once = run(engine, params, [prompt], 30, Sampler(presence_penalty=1e6))[0].tolist()
    assert len(set(once)) == 30
    never = run(engine, params, [prompt], 30, Sampler(repetition_penalty=1e6))[0].tolist()
    assert len(set(never)) == 30 and not set(never) & set(prompt)
    biased = run(engine, params, [prompt], 5, Sampler(logit_bias={42: 1e6}))[0].tolist()
    assert biased == [42] * 5


@pytest.mark.parametrize("length", [1, 20, 65, 130])
def test_token_logprobs(engine, params, length):
    """The head runs on pieces of 64 positions: no text may be cut, shifted or read twice."""
    ids = np.random.default_rng(length).integers(0, 97, (2, length)).astype(np.int32)
    found = engine.token_logprobs(params, ids)
    exact = log_softmax(engine.logits(params, ids)[:, :-1])
    assert found.shape == (2, length - 1) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.take_along_axis(exact, ids[:, 1:, None], -1)[..., 0], atol=1e-4)


# A sampler of the user's own.


def test_custom_sampler_in_either_form(engine, params, backend):
    logits_seen = []

    def in_the_framework(logits):
        logits_seen.append(logits)
        return backend.argmax(logits)

    def written_once(xp, logits, uniform):
        assert xp is backend and tuple(uniform.shape) == (3,)
        return xp.argmax(-logits)

    likeliest = run(engine, params, PROMPTS)
    assert run(engine, params, PROMPTS, custom=in_the_framework).tolist() == likeliest.tolist()
    assert all(backend.owns(x) and tuple(x.shape) == (3, 97) and backend.dtype(x) == "float32" for x in logits_seen)
    unlikeliest = run(engine, params, PROMPTS, custom=written_once)
    first = [engine.logits(params, np.array([prompt], np.int32))[0, -1].argmin() for prompt in PROMPTS]
    assert unlikeliest[:, 0].tolist() == first
    assert run(engine, params, PROMPTS, 3, custom=lambda logits: np.array([5, 6, 7])).tolist() == [
        [5] * 3,
        [6] * 3,
        [7] * 3,
    ]


@pytest.mark.parametrize(
    "answer, message",
    [
        (np.zeros(2, np.int32), r"3 token ids.*shape \(3,\).*int32 of shape \(2,\)"),
        (np.zeros(3, np.float32), "float32 of shape"),
        (np.array([0, 97, 1]), r"\[0, 97, 1\]; the vocabulary goes from 0 to 96"),
        (np.array([0, -1, 1]), "vocabulary"),
    ],
)
def test_custom_sampler_that_returns_no_tokens(engine, params, answer, message):
    with pytest.raises(InputError, match=message):
        run(engine, params, PROMPTS, 2, custom=lambda logits: answer)


# What a prompt shares with the last one is not computed again.


@pytest.fixture(scope="module")
def second_engine(backend):
    return GenerationEngine(backend, SKELETON, "float32")


@pytest.fixture
def fresh(second_engine):
    second_engine._kept = None
    return second_engine


@pytest.fixture
def shared(fresh, engine, calls):
    """Runs a prompt; gives the answer, checked against one without reuse, and how many prompt positions it computed."""

    def check(params, prompt, new=6):
        calls.clear()
        tokens = run(fresh, params, [prompt], new)[0].tolist()
        computed = calls[0][1] if calls else None
        engine._kept = None
        assert tokens == run(engine, params, [prompt], new)[0].tolist()
        return tokens, computed

    return check


@pytest.fixture
def counts(backend):
    if not backend.eager:
        pytest.skip("a compiled model does not show how much it runs")


def test_a_conversation_goes_on_where_it_stopped(fresh, shared, params, counts):
    prompt = PROMPTS[0]
    answer, computed = shared(params, prompt)
    assert computed == 13
    # The last token of the answer was never run through the model: it and the new turn are computed.
    turn = [1, 2, 3]
    answer, computed = shared(params, prompt + answer + turn)
    assert computed == 1 + len(turn)
    _, computed = shared(params, prompt + [90, 91])  # another branch of it
    assert computed == 2
    _, computed = shared(params, prompt + [90, 91])  # the same again: one token has to run
    assert computed == 1
    _, computed = shared(params, prompt[:5])  # a part of it
    assert computed == 1
    _, computed = shared(params, [96] + prompt)  # nothing in common
    assert computed == 14


def test_a_longer_answer_than_the_kept_cache_holds(fresh, shared, params, counts):
    shared(params, PROMPTS[0], 4)
    _, computed = shared(params, PROMPTS[0] + [5], 120)
    assert computed == 1


def test_what_was_closed_early_is_kept_and_right(fresh, shared, params, counts):
    running = fresh.run(params, [PROMPTS[0]], NEW, Sampler())
    answer = [int(tokens[0]) for tokens, _ in itertools.islice(running, 4)]
    running.close()
    _, computed = shared(params, PROMPTS[0] + answer + [7])
    assert computed == 2


def test_nothing_is_kept_of_other_weights_of_batches_or_of_failures(fresh, shared, params, counts):
    run(fresh, params, [PROMPTS[0]])
    changed = {name: -array if "mlp" in name else array for name, array in params.items()}
    assert shared(changed, PROMPTS[0] + [5])[1] == 14
    run(fresh, params, PROMPTS)
    assert shared(params, PROMPTS[0] + [5])[1] == 14
    failing = fresh.run(params, [PROMPTS[0]], NEW, Sampler())
    next(failing)
    with pytest.raises(RuntimeError):
        failing.throw(RuntimeError("the device is gone"))
    assert shared(params, PROMPTS[0] + [5])[1] == 14


def test_reuse_over_several_turns(shared, params, monkeypatch):
    """On all backends, across chunks and growing caches."""
    monkeypatch.setattr(decode, "CHUNK", 16)
    prompt = PROMPTS[0]
    for turn in range(4):
        answer, _ = shared(params, prompt, 20)
        prompt = prompt + answer + [turn]


# What is compiled and what is computed.


@pytest.fixture
def calls(monkeypatch):
    """The (B, T) of every call of the model: each execution on eager backends, each trace on compiling ones."""
    seen = []
    original = Decoder.__call__

    def counted(self, xp, ids, *args, **kwargs):
        seen.append(tuple(ids.shape))
        return original(self, xp, ids, *args, **kwargs)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return seen


def test_nothing_is_compiled_per_token_or_per_prompt_length(backend, params, calls):
    engine = GenerationEngine(backend, SKELETON, "float32")
    for index, length in enumerate((13, 6, 9, 2)):  # one bucket; no common beginnings
        run(engine, params, [[index] * length], 20)
    steps = [shape for shape in calls if shape == (1, 1)]
    if backend.name in ("jax", "tensorflow"):
        assert len(steps) == 1
    else:
        assert len(steps) == 4 * 19
    prefills = [shape for shape in calls if shape != (1, 1)]
    assert prefills == ([(1, n) for n in (13, 6, 9, 2)] if backend.eager else [(1, 16)])


def test_choosing_is_compiled_once_for_all_values(backend, params, monkeypatch):
    traces = []
    original = decode.choose

    def counted(*args, **kwargs):
        traces.append(sorted(kwargs["features"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(decode, "choose", counted)
    engine = GenerationEngine(backend, SKELETON, "float32")
    for sampler in (Sampler(temperature=0.5, top_k=3), Sampler(top_k=40), Sampler(temperature=2.0, top_k=7)):
        run(engine, params, PROMPTS[:1], 3, sampler)
    run(engine, params, PROMPTS[:1], 3, Sampler(top_p=0.5))
    # On its own after the prompt, then as a part of the step.
    times = (2, 2) if backend.name in ("jax", "tensorflow") else (9, 3)
    assert traces == [["sample", "top_k"]] * times[0] + [["sample", "top_p"]] * times[1]


@pytest.fixture
def steps(engine, monkeypatch):
    """Counts the decode steps of `engine`."""
    seen = []
    original = engine._program

    def counted(function, *args, **kwargs):
        program = original(function, *args, **kwargs)

        def call(*args):
            seen.append(args[1].shape)
            return program(*args)

        return call if function is decode._next else program

    monkeypatch.setattr(engine, "_program", counted)
    return seen


def test_one_token_takes_no_step(engine, params, steps):
    assert run(engine, params, PROMPTS, 1).shape == (3, 1)
    assert steps == []


def test_as_many_steps_as_tokens_less_one(engine, params, steps):
    run(engine, params, PROMPTS, 5)
    assert len(steps) == 4


@pytest.mark.parametrize("taken", [1, 3])
def test_closed_early(engine, params, steps, taken):
    whole = run(engine, params, PROMPTS)
    steps.clear()
    running = engine.run(params, PROMPTS, NEW, Sampler(), 0)
    found = np.stack([tokens for tokens, _ in itertools.islice(running, taken)], 1)
    running.close()
    assert found.tolist() == whole[:, :taken].tolist()
    assert len(steps) <= taken  # an asynchronous backend is one ahead
    with pytest.raises(StopIteration):
        next(running)
    assert run(engine, params, PROMPTS).tolist() == whole.tolist()  # the engine is as it was


def test_two_runs_at_once_do_not_mix(engine, params):
    """Nothing of a run is kept in the engine."""
    one, other = (engine.run(params, [prompt], 6, Sampler(), 0) for prompt in (PROMPTS[0], PROMPTS[2]))
    steps = list(zip(one, other, strict=True))
    for column, prompt in ((0, PROMPTS[0]), (1, PROMPTS[2])):
        assert [int(step[column][0][0]) for step in steps] == run(engine, params, [prompt], 6)[0].tolist()


def test_several_threads(engine, params):
    """As a server runs one model: the cache of a shared beginning belongs to one run at a time."""
    prompts = [PROMPTS[0] + [index] for index in range(4)]
    alone = [run(engine, params, [prompt], 6)[0].tolist() for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: run(engine, params, [prompts[index % 4]], 6)[0].tolist(), range(16)))
    assert found == alone * 4


def test_new_weights_take_effect(engine, params, backend):
    changed = {name: -array if "mlp" in name else array for name, array in params.items()}
    before = run(engine, params, PROMPTS[:1])
    assert run(engine, changed, PROMPTS[:1]).tolist() != before.tolist()
    assert run(engine, params, PROMPTS[:1]).tolist() == before.tolist()


def test_weights_are_freed_with_the_engine(backend):
    """Neither the programs nor a cache of them keeps a model alive."""
    if backend.name == "tensorflow":
        pytest.skip("TensorFlow's tensors take no weak references")
    engine, params = GenerationEngine(backend, SKELETON, "float32"), make_params(backend)
    run(engine, params, PROMPTS[:1], 2)
    run(engine, params, PROMPTS[:1], 2, SAMPLED)
    engine.logits(params, np.array([PROMPTS[0]], np.int32))
    watched = [weakref.ref(array) for array in params.values()]
    del engine, params
    gc.collect()
    assert sum(ref() is not None for ref in watched) == 0


# Sizes.


def test_bucket():
    assert [bucket(n) for n in (1, 15, 16, 17, 32, 33, 500, 512, 513)] == [16, 16, 16, 32, 32, 64, 512, 512, 1024]


@pytest.mark.parametrize("eager", [True, False])
def test_slots_hold_the_prompt_its_padding_and_the_answer(eager):
    engine = object.__new__(GenerationEngine)
    engine.xp = SimpleNamespace(eager=eager)
    sizes = set()
    lengths = [*range(1, 70), 500, 511, 512, 513, 600, 1024, 1025, 3000]
    for longest, new, reused in itertools.product(lengths, [1, 7, 64, 500], [0, 5, 300, 2999]):
        if reused >= longest:
            continue
        slots = engine._slots(longest, new, reused)
        sizes.add(slots)
        assert slots >= longest + new
        for first in range(reused, longest, decode.CHUNK):
            time = min(decode.CHUNK, longest - first)
            assert slots >= first + (time if eager else bucket(time))  # JAX moves a write that would not fit
        assert slots <= 1.5 * (longest + new) + 64 + (0 if eager else 512)
    assert len(sizes) < 30  # each is a compilation


def test_two_threads_never_get_one_cache(engine, params):
    """What takes the last prompt's cache consumes it: on some backends its memory is written to, on others gone."""

    class Slow(GenerationEngine):
        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            if name == "_kept":
                time.sleep(0.05)  # between looking at it and taking it
            return found

    prompt = PROMPTS[0]
    slow = Slow(engine.xp, SKELETON, "float32")
    wanted = run(slow, params, [prompt])
    lengths = np.array([len(prompt)], np.int32)
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(slow._cache_for, params, [prompt], lengths, NEW) for _ in range(2)]
    assert sorted(future.result()[1] for future in taken) == [0, len(prompt) - 1]
    run(slow, params, [prompt])
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(run, slow, params, [prompt]) for _ in range(2)]
    for answer in answers:
        np.testing.assert_array_equal(answer.result(), wanted)
