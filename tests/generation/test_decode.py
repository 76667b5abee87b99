"""The decode loop: cached equals uncached, batched equals alone, nothing compiled twice, nothing computed for nothing."""

import gc
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest


from modelhub.core.tree import flatten, initial_value
from modelhub.families.gemma import Config, Decoder, Model
from modelhub.generation import decode
from modelhub.generation.decode import Engine, bucket
from modelhub.generation.sampling import Sampler

CONFIG = Config.from_hf(
    {
        "model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
        "sliding_window_pattern": 2, "max_position_embeddings": 512,
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
    return Engine(backend, SKELETON, "float32")


@pytest.fixture(scope="module")
def params(backend):
    return make_params(backend)


def run(engine, params, prompts, new=NEW, sampler=None, seed=0):
    """(B, new) tokens."""
    found = list(engine.run(params, prompts, new, sampler or Sampler(), seed))
    assert all(tokens.shape == (len(prompts),) and tokens.dtype == np.int32 for tokens in found)
    return np.stack(found, 1)


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
        assert tokens.tolist() == run(Engine(xp, SKELETON, "float32"), make_params(xp), PROMPTS, sampler=SAMPLED, seed=5).tolist()


def test_a_sampled_row_does_not_depend_on_its_neighbours(engine, params):
    together = run(engine, params, PROMPTS, sampler=SAMPLED, seed=5)
    others = run(engine, params, [PROMPTS[0], PROMPTS[2], PROMPTS[2]], sampler=SAMPLED, seed=5)
    assert together[0].tolist() == others[0].tolist() and together[2].tolist() == others[2].tolist()
    assert run(engine, params, PROMPTS[:1], sampler=SAMPLED, seed=5)[0].tolist() == together[0].tolist()
    twins = run(engine, params, [PROMPTS[0]] * 3, sampler=SAMPLED, seed=5)
    assert len({tuple(row) for row in twins.tolist()}) == 3  # the same prompt in several rows is not the same sample


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
    engine = Engine(backend, SKELETON, "float32")
    for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[0][:9], PROMPTS[0][:2]):  # one bucket
        run(engine, params, [prompt], 20)
    steps = [shape for shape in calls if shape == (1, 1)]
    if backend.name in ("jax", "tensorflow"):
        assert len(steps) == 1
    else:
        assert len(steps) == 4 * 19
    prefills = [shape for shape in calls if shape != (1, 1)]
    assert prefills == ([(1, n) for n in (13, 6, 9, 2)] if backend.eager else [(1, 16)])


def test_a_sampler_is_compiled_once_for_all_values(backend, params, monkeypatch):
    traces = []
    original = decode.sample

    def counted(*args, **kwargs):
        traces.append(kwargs["truncations"])
        return original(*args, **kwargs)

    monkeypatch.setattr(decode, "sample", counted)
    engine = Engine(backend, SKELETON, "float32")
    for sampler in (Sampler(temperature=0.5, top_k=3), Sampler(top_k=40), Sampler(temperature=2.0, top_k=7)):
        run(engine, params, PROMPTS[:1], 3, sampler)
    run(engine, params, PROMPTS[:1], 3, Sampler(top_p=0.5))
    expected = [("top_k",), ("top_p",)] if backend.name in ("jax", "tensorflow") else [("top_k",)] * 9 + [("top_p",)] * 3
    assert traces == expected


@pytest.fixture
def steps(engine, monkeypatch):
    """Counts the decode steps of `engine`."""
    seen = []
    original = engine._decode_step

    def counted(*args):
        seen.append(args[1].shape)
        return original(*args)

    monkeypatch.setattr(engine, "_decode_step", counted)
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
    found = np.stack(list(itertools.islice(running, taken)), 1)
    running.close()
    assert found.tolist() == whole[:, :taken].tolist()
    assert len(steps) <= taken  # an asynchronous backend is one ahead
    with pytest.raises(StopIteration):
        next(running)
    assert run(engine, params, PROMPTS).tolist() == whole.tolist()  # the engine is as it was


def test_two_runs_at_once_do_not_mix(engine, params):
    """Nothing of a run is kept in the engine."""
    one, other = (engine.run(params, [prompt], 6, Sampler(), 0) for prompt in (PROMPTS[0], PROMPTS[2]))
    tokens = np.array(list(zip(one, other, strict=True)))[..., 0]
    for column, prompt in ((0, PROMPTS[0]), (1, PROMPTS[2])):
        assert tokens[:, column].tolist() == run(engine, params, [prompt], 6)[0].tolist()


def test_new_weights_take_effect(engine, params, backend):
    changed = {name: -array if "mlp" in name else array for name, array in params.items()}
    before = run(engine, params, PROMPTS[:1])
    assert run(engine, changed, PROMPTS[:1]).tolist() != before.tolist()
    assert run(engine, params, PROMPTS[:1]).tolist() == before.tolist()


def test_weights_are_freed_with_the_engine(backend):
    """Neither the programs nor a cache of them keeps a model alive."""
    if backend.name == "tensorflow":
        pytest.skip("TensorFlow's tensors take no weak references")
    engine, params = Engine(backend, SKELETON, "float32"), make_params(backend)
    run(engine, params, PROMPTS[:1], 2)
    run(engine, params, PROMPTS[:1], 2, SAMPLED)
    engine.logits(params, np.array([PROMPTS[0]], np.int32))
    watched = [weakref.ref(array) for array in params.values()]
    del engine, params
    gc.collect()
    assert [ref() for ref in watched if ref() is not None] == []


# Sizes.


def test_bucket():
    assert [bucket(n) for n in (1, 15, 16, 17, 32, 33, 500, 512, 513)] == [16, 16, 16, 32, 32, 64, 512, 512, 1024]


@pytest.mark.parametrize("eager", [True, False])
def test_slots_hold_the_prompt_its_padding_and_the_answer(eager):
    engine = object.__new__(Engine)
    engine.xp = SimpleNamespace(eager=eager)
    sizes = set()
    for longest, new in itertools.product([*range(1, 70), 500, 511, 512, 513, 600, 1024, 1025, 3000], [1, 7, 64, 500]):
        slots = engine._slots(longest, new)
        sizes.add(slots)
        assert slots >= longest + new
        for first in range(0, longest, decode.CHUNK):
            time = min(decode.CHUNK, longest - first)
            assert slots >= first + (time if eager else bucket(time))  # JAX moves a write that would not fit
        assert slots <= 1.5 * (longest + new) + 64 + (0 if eager else 512)
    assert len(sizes) < 30  # each is a compilation
