"""The head in pieces and blocks against torch's cross entropy of all logits at once, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modelhub.core import head, lora, nn
from modelhub.core.backends import get_backend, installed
from modelhub.core.tree import flatten
from modelhub.families import family_of

POSITIONS, WIDTH, ROWS, BLOCK = 24, 12, 8, 16
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "max_position_embeddings": 32,
}  # fmt: skip
# A vocabulary of 53 leaves one token after four blocks of 13; 50 makes five blocks of 10; 9 is less than a block.
CASES = {
    "tied": ("gemma3_text", 53), "capped": ("gemma2", 53), "capped, equal blocks": ("gemma2", 50),
    "untied": ("llama", 50), "with bias": ("llama", 53), "one block": ("llama", 9), "adapter": ("llama", 50),
}  # fmt: skip


def smoothed(xp):
    """A user's own loss: label smoothing of 0.1."""

    def loss(logits, labels):
        own = xp.take_along_axis(logits, xp.expand_dims(labels, 1), 1)[:, 0]
        return xp.logsumexp(logits, axis=1) - 0.9 * own - 0.1 * xp.mean(logits, axis=1)

    return loss


def make(case):
    """A skeleton without blocks, and its parameters."""
    kind, vocabulary = CASES[case]
    family = family_of(kind)
    more = {"final_logit_softcapping": 4.0} if kind == "gemma2" else {}
    skeleton = family.Model.abstract(
        family.Config.from_hf({"model_type": kind, "vocab_size": vocabulary} | SIZES | more)
    )
    if case == "with bias":
        skeleton.lm_head = nn.Linear.abstract(WIDTH, vocabulary, bias=True)
    if case == "adapter":
        skeleton, _ = lora.attach(skeleton, lora.LoRAConfig(2), ["lm_head"])
    skeleton.model.layers = []
    rng = np.random.default_rng(0)
    return skeleton, {name: rng.normal(size=s.shape).astype(np.float32) for name, s in flatten(skeleton).items()}


def oracle(skeleton, params, hidden, places, labels, smoothing):
    leaves = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in params.items()}
    hidden = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    tied = skeleton.lm_head is None
    logits = hidden @ leaves["model.embed_tokens.weight" if tied else "lm_head.weight"].T
    if "lm_head.bias" in leaves:
        logits = logits + leaves["lm_head.bias"]
    if "lm_head.lora.lora_A" in leaves:
        logits = logits + hidden @ leaves["lm_head.lora.lora_A"].T @ leaves["lm_head.lora.lora_B"].T
    if skeleton.softcap:
        logits = skeleton.softcap * torch.tanh(logits / skeleton.softcap)
    picked, labels = logits[torch.tensor(places).long()], torch.tensor(labels).long()
    loss = F.cross_entropy(picked, labels, reduction="sum", label_smoothing=smoothing)
    loss.backward()
    correct = int((picked.argmax(1) == labels).sum())
    wanted = {"hidden": hidden} | leaves
    return loss.item(), correct, {n: (torch.zeros_like(x) if x.grad is None else x.grad) for n, x in wanted.items()}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(head, "ROWS", ROWS)
    monkeypatch.setattr(head, "BLOCK", BLOCK)


def compiled(xp, skeleton, trainable, loss=None, gradients=True):
    def run(params, hidden, batch):
        return head.loss_and_gradients(
            xp, skeleton, params, hidden, batch, frozenset(trainable), loss, gradients=gradients
        )

    return xp.compile(run, training=True)


@pytest.mark.parametrize("name", installed())
@pytest.mark.parametrize("case", [*CASES, "user's loss"])
def test_equals_all_logits_at_once(small, name, case):
    xp = get_backend(name, "cpu")
    users = case == "user's loss"
    skeleton, params = make("capped" if users else case)
    if name == "numpy" and (users or case in ("with bias", "adapter")):
        pytest.skip("these take automatic differentiation")
    program = compiled(xp, skeleton, params, smoothed(xp) if users else None)
    arrays = {key: xp.array(array) for key, array in params.items()}
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(POSITIONS, WIDTH)).astype(np.float32)
    vocabulary = CASES.get(case, ("", 53))[1]
    for count in (0, 1, ROWS, ROWS + 3, POSITIONS):  # none, a part of a piece, exactly one, more than one, all
        places, labels = np.zeros((2, POSITIONS), np.int32)
        places[:count] = np.sort(rng.permutation(POSITIONS)[:count])
        labels[:count] = rng.integers(0, vocabulary, count)
        labels[: count // 2] = vocabulary - 1  # the last token of all, several times
        batch = {"places": places, "labels": labels, "count": np.int32(count)}
        batch = {key: xp.array(value, "int32") for key, value in batch.items()}
        given = xp.array(hidden)
        found, gradients = program(arrays, given, batch)
        loss, correct, wanted = oracle(
            skeleton, params, hidden, places[:count], labels[:count], 0.1 if users else 0.0
        )  # fmt: skip
        assert float(xp.get(found["loss"])) == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert int(xp.get(found["correct"])) == correct
        of_head = "lm_head" if skeleton.lm_head else "model.embed_tokens"
        assert gradients.keys() == {"hidden"} | {key for key in params if key.startswith(of_head)}
        for key, gradient in gradients.items():
            assert xp.dtype(gradient) == "float32"
            peak = max(float(wanted[key].abs().max()), 1e-3)
            np.testing.assert_allclose(
                xp.get(gradient), wanted[key].numpy(), atol=2e-6 * peak, rtol=1e-5, err_msg=f"{count} {key}"
            )
        np.testing.assert_array_equal(xp.get(given), hidden)  # what was given is not written to


@pytest.mark.parametrize("name", installed())
def test_what_is_not_trained_gets_no_gradient(small, name):
    xp = get_backend(name, "cpu")
    skeleton, params = make("capped")
    arrays = {key: xp.array(array) for key, array in params.items()}
    hidden = xp.array(np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32))
    batch = {"places": xp.arange(5), "labels": xp.arange(5), "count": xp.array(5, "int32")}
    whole, _ = compiled(xp, skeleton, params)(arrays, hidden, batch)
    frozen, gradients = compiled(xp, skeleton, [])(arrays, hidden, batch)
    assert gradients.keys() == {"hidden"}
    alone, none = compiled(xp, skeleton, params, gradients=False)(arrays, hidden, batch)
    assert none == {}
    assert float(xp.get(whole["loss"])) == float(xp.get(frozen["loss"])) == pytest.approx(float(xp.get(alone["loss"])))


@pytest.mark.parametrize("name", installed())
def test_16_bits(small, name):
    """Products in bfloat16, sums and the loss in float32: errors are those of rounding."""
    xp = get_backend(name, "cpu")
    skeleton, params = make("capped")
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(POSITIONS, WIDTH)).astype(np.float32)
    labels = rng.integers(0, 53, POSITIONS)
    batch = {"places": xp.arange(POSITIONS), "labels": xp.array(labels), "count": xp.array(POSITIONS, "int32")}
    arrays = {key: xp.array(array, "bfloat16") for key, array in params.items()}
    found, gradients = compiled(xp, skeleton, params)(arrays, xp.cast(xp.array(hidden), "bfloat16"), batch)
    loss, _, wanted = oracle(skeleton, params, hidden, np.arange(POSITIONS), labels, 0.0)
    assert xp.dtype(found["loss"]) == "float32"
    assert float(xp.get(found["loss"])) == pytest.approx(loss, rel=0.01)
    for key, gradient in gradients.items():
        difference = np.linalg.norm(xp.get(gradient) - wanted[key].numpy()) / np.linalg.norm(wanted[key].numpy())
        assert xp.dtype(gradient) == "float32" and difference < 0.03, key


@pytest.mark.parametrize("name", installed())
def test_large_logits(small, name):
    """exp of them is beyond float32."""
    xp = get_backend(name, "cpu")
    skeleton, params = make("untied")
    params = {key: array * 100 for key, array in params.items()}
    arrays = {key: xp.array(array) for key, array in params.items()}
    hidden = np.random.default_rng(1).normal(size=(6, WIDTH)).astype(np.float32) * 10
    batch = {"places": xp.arange(6), "labels": xp.arange(6), "count": xp.array(6, "int32")}
    found, gradients = compiled(xp, skeleton, params)(arrays, xp.array(hidden), batch)
    loss, _, wanted = oracle(skeleton, params, hidden, np.arange(6), np.arange(6), 0.0)
    assert loss > 1000 and float(xp.get(found["loss"])) == pytest.approx(loss, rel=1e-4)
    for key, gradient in gradients.items():
        np.testing.assert_allclose(xp.get(gradient), wanted[key].numpy(), atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in installed() if name != "numpy"])
def test_surrogate_hands_gradients_on(name):
    xp = get_backend(name, "cpu")
    rng = np.random.default_rng(0)
    x, slope = rng.normal(size=(2, 3, 4)).astype(np.float32)
    gradient = xp.array(slope)

    def run(variables):
        return head.surrogate(xp, {"y": variables["x"] * variables["x"], "unused": gradient}, {"y": gradient}), None

    (value, _), found = xp.value_and_grad(run)({"x": xp.array(x)})
    assert float(xp.get(value)) == pytest.approx(float((x * x * slope).sum()), rel=1e-5)
    np.testing.assert_allclose(xp.get(found["x"]), 2 * x * slope, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 9, 8192, 8193, 50257, 128256, 256000, 262144, 262145])
def test_blocks_cover_the_vocabulary(vocabulary):
    count, size = head._blocks(vocabulary)
    assert size <= head.BLOCK and 0 <= vocabulary - count * size < size + 1
    assert count <= 2 * -(-vocabulary // head.BLOCK)


# --- log-probabilities of tokens ----------------------------------------------------------------------------------------


COUNTS = (0, 1, ROWS, ROWS + 3, POSITIONS)  # none, a part of a piece, exactly one, more than one, all
BETA = 0.3


def preference(xp):
    """-log sigmoid(beta (what the first two thirds sum to, minus the rest)): no token's weight is known before."""

    def fn(logprobs):
        better = xp.cast(xp.arange(POSITIONS) % 3 < 2, "float32")
        difference = xp.sum(logprobs * better) - xp.sum(logprobs * (1.0 - better))
        return -xp.log(xp.sigmoid(BETA * difference)), {"difference": xp.stop_gradient(difference)}

    return fn


def places_of(count, vocabulary):
    rng = np.random.default_rng(2)
    places, labels = np.zeros((2, POSITIONS), np.int32)
    places[:count] = np.sort(rng.permutation(POSITIONS)[:count])
    labels[:count] = rng.integers(0, vocabulary, count)
    labels[: count // 2] = vocabulary - 1  # the last token of all, several times
    return {"places": places, "labels": labels, "count": np.int32(count)}


def oracle_of_preference(skeleton, params, hidden, batch):
    """Log-probabilities, the loss and its gradients in float64."""
    leaves = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in params.items()}
    hidden = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    logits = hidden @ leaves["model.embed_tokens.weight" if skeleton.lm_head is None else "lm_head.weight"].T
    logits = logits + leaves.get("lm_head.bias", 0.0)
    if "lm_head.lora.lora_A" in leaves:
        logits = logits + hidden @ leaves["lm_head.lora.lora_A"].T @ leaves["lm_head.lora.lora_B"].T
    if skeleton.softcap:
        logits = skeleton.softcap * torch.tanh(logits / skeleton.softcap)
    count = int(batch["count"])
    picked = torch.log_softmax(logits, -1)[torch.tensor(batch["places"]).long(), torch.tensor(batch["labels"]).long()]
    logprobs = torch.where(torch.arange(POSITIONS) < count, picked, 0.0)
    better = torch.arange(POSITIONS) % 3 < 2
    loss = -torch.log(torch.sigmoid(BETA * (logprobs[better].sum() - logprobs[~better].sum())))
    found = torch.autograd.grad(loss, [hidden, *leaves.values()], allow_unused=True, materialize_grads=True)
    return logprobs.detach().numpy(), loss.item(), dict(zip(["hidden", *leaves], found, strict=True))


def arrays_of(xp, params, batch):
    return {n: xp.array(x) for n, x in params.items()}, {n: xp.array(x, "int32") for n, x in batch.items()}


@pytest.mark.parametrize("name", installed())
@pytest.mark.parametrize("case", CASES)
def test_logprobs(small, name, case):
    xp = get_backend(name, "cpu")
    skeleton, params = make(case)
    program = xp.compile(lambda p, h, b: head.token_logprobs(xp, skeleton, p, h, b), training=True)
    hidden = np.random.default_rng(1).normal(size=(POSITIONS, WIDTH)).astype(np.float32)
    for count in COUNTS:
        batch = places_of(count, CASES[case][1])
        wanted, *_ = oracle_of_preference(skeleton, params, hidden, batch)
        arrays, given = arrays_of(xp, params, batch)
        np.testing.assert_allclose(xp.get(program(arrays, xp.array(hidden), given)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in installed() if name != "numpy"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_gradients_through_logprobs(small, name, case, trained):
    xp = get_backend(name, "cpu")
    skeleton, params = make(case)
    trainable = frozenset(params) if trained else frozenset({"model.norm.weight"})  # of which the head knows nothing

    def run(arrays, hidden, batch):
        return head.through_logprobs(xp, skeleton, arrays, hidden, batch, trainable, preference(xp))

    program = xp.compile(run, training=True)
    hidden = np.random.default_rng(1).normal(size=(POSITIONS, WIDTH)).astype(np.float32)
    for count in COUNTS:
        batch = places_of(count, CASES[case][1])
        logprobs, loss, wanted = oracle_of_preference(skeleton, params, hidden, batch)
        arrays, given = arrays_of(xp, params, batch)
        value, more, gradients = program(arrays, xp.array(hidden), given)
        assert float(xp.get(value)) == pytest.approx(loss, rel=1e-5, abs=1e-5)
        better = np.arange(POSITIONS) % 3 < 2
        difference = logprobs[better].sum() - logprobs[~better].sum()
        assert float(xp.get(more["difference"])) == pytest.approx(difference, rel=1e-5, abs=1e-4)
        of_head = set(flatten(skeleton.lm_head, "lm_head")) if skeleton.lm_head else {"model.embed_tokens.weight"}
        assert gradients.keys() == {"hidden"} | (of_head if trained else set())
        for key, gradient in gradients.items():
            assert xp.dtype(gradient) == "float32"
            peak = max(float(wanted[key].abs().max()), 1e-3)
            np.testing.assert_allclose(
                xp.get(gradient), wanted[key].numpy(), atol=1e-5 * peak, rtol=1e-5, err_msg=f"{count} {key}"
            )


@pytest.mark.parametrize("name", [name for name in installed() if name != "numpy"])
def test_minus_the_sum_of_logprobs_is_cross_entropy(small, name):
    xp = get_backend(name, "cpu")
    skeleton, params = make("capped")
    arrays, batch = arrays_of(xp, params, places_of(POSITIONS, 53))
    hidden = xp.array(np.random.default_rng(1).normal(size=(POSITIONS, WIDTH)).astype(np.float32))
    whole, wanted = head.loss_and_gradients(xp, skeleton, arrays, hidden, batch, frozenset(params))
    value, _, gradients = head.through_logprobs(
        xp, skeleton, arrays, hidden, batch, frozenset(params), lambda logprobs: (-xp.sum(logprobs), None)
    )  # fmt: skip
    assert float(xp.get(value)) == pytest.approx(float(xp.get(whole["loss"])), rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        np.testing.assert_allclose(xp.get(gradient), xp.get(wanted[key]), rtol=1e-5, atol=1e-5)


def test_all_logits_are_never_there(monkeypatch):
    """What XLA takes for it depends on a piece, not on the number of tokens times the vocabulary."""
    jax = pytest.importorskip("jax")
    xp = get_backend("jax", "cpu")
    monkeypatch.setattr(head, "ROWS", 16)
    monkeypatch.setattr(head, "BLOCK", 512)
    tokens, vocabulary = 512, 4096
    skeleton, _ = make("untied")
    weight = jax.ShapeDtypeStruct((vocabulary, WIDTH), "float32")
    params = {name: jax.ShapeDtypeStruct(spec.shape, "float32") for name, spec in flatten(skeleton).items()}
    params |= {"lm_head.weight": weight, "model.embed_tokens.weight": weight}
    integers = jax.ShapeDtypeStruct((tokens,), "int32")
    batch = {"places": integers, "labels": integers, "count": jax.ShapeDtypeStruct((), "int32")}

    def run(arrays, hidden, batch):
        fn = lambda logprobs: (-xp.sum(xp.log(xp.sigmoid(logprobs))), None)  # noqa: E731
        return head.through_logprobs(xp, skeleton, arrays, hidden, batch, frozenset(params), fn)

    compiled = jax.jit(run).lower(params, jax.ShapeDtypeStruct((tokens, WIDTH), "float32"), batch).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert taken < 0.2 * 4 * tokens * vocabulary, taken
