"""Gradients and steps against transformers, PEFT and torch.optim; and against themselves, cut up in other ways."""

import functools

import numpy as np
import pytest
import torch
import transformers

from modelhub.core import head, lora, optim
from modelhub.core.backends import get_backend, installed
from modelhub.core.tree import flatten
from modelhub.families import family_of
from modelhub.training.engine import Settings, TrainingEngine
from modelhub.training.objectives import TextObjective
from modelhub.training.ready_batches import complete

TIME = 16
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "query_pre_attn_scalar": 4}
CONFIGS = {
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0} | LAYERS | SIZES,
    "gemma3_text": {"model_type": "gemma3_text"} | LAYERS | SIZES,
    "llama": {"model_type": "llama", "tie_word_embeddings": False} | SIZES,
    # For what does not depend on the family: XLA takes a third of the time.
    "small": {"model_type": "llama", "tie_word_embeddings": True} | SIZES | {"num_hidden_layers": 1},
}
FAMILIES = ["gemma2", "gemma3_text", "llama"]


@pytest.fixture(params=[name for name in installed() if name != "numpy"], scope="module")
def xp(request):
    return get_backend(request.param, "cpu")


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """XLA's optimizations take half of the time here; the tests of fit leave them on."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def whole(xp):
    """logs and gradients of the four rows in one batch, nothing set."""
    return gradients(start(xp), [rows()])


class Keep:
    """An optimizer that changes nothing: its state is the gradients it was given."""

    def init(self, xp, params):
        return {f"seen/{name}": xp.zeros(x.shape) for name, x in params.items()}

    def update(self, xp, grads, state, params, learning_rate, step, finite=None):
        return dict(params), {f"seen/{name}": x for name, x in grads.items()}


@functools.cache
def model(kind):
    """Our skeleton, random parameters (numpy), and transformers' model with the same."""
    family = family_of(CONFIGS[kind]["model_type"])
    skeleton = family.Model.abstract(family.Config.from_hf(CONFIGS[kind]))
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.3, s.shape).astype(np.float32) for name, s in flatten(skeleton).items()}
    config = transformers.AutoConfig.for_model(**CONFIGS[kind])
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    missing, unexpected = theirs.load_state_dict({k: torch.tensor(x) for k, x in params.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return skeleton, params, theirs


def rows(seed=0, lengths=(12, 7, 16, 9)):
    """Rows of different lengths, padded; of each, the first third has no labels."""
    rng = np.random.default_rng(seed)
    ids, labels = np.zeros((len(lengths), TIME), int), np.full((len(lengths), TIME), -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(1, SIZES["vocab_size"], length)
        labels[row, length // 3 : length] = ids[row, length // 3 : length]
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).astype(int)}


def packed(batch):
    """The examples of two rows in one, twice as long, with the shorter in the middle."""
    parts = [np.flatnonzero(mask) for mask in batch["attention_mask"]]
    made = {name: np.zeros((len(parts) // 2, 2 * TIME), int) for name in ("input_ids", "position_ids", "segment_ids")}
    made["labels"] = np.full((len(parts) // 2, 2 * TIME), -100)
    for index, part in enumerate(parts):
        begin = 0 if index % 2 == 0 else len(parts[index - 1])
        place = index // 2, slice(begin, begin + len(part))
        made["input_ids"][place], made["labels"][place] = batch["input_ids"][index][part], batch["labels"][index][part]
        made["position_ids"][place], made["segment_ids"][place] = np.arange(len(part)), index % 2 + 1
    return made


def start(xp, kind="small", **settings):
    skeleton, params, _ = model(kind)
    settings = Settings(**{"optimizer": Keep()} | settings)
    arrays = {name: xp.array(x) for name, x in params.items()}
    return TrainingEngine(xp, skeleton, arrays, list(params), settings, TextObjective(skeleton.model.config))


def gradients(engine, batches):
    logs = engine.train([complete(batch) for batch in batches], 1, 0.1)
    found = {name.removeprefix("seen/"): np.array(engine.xp.get(x)) for name, x in engine.state.items()}
    return logs, {name: x for name, x in found.items() if not name.startswith("loss_scale")}


def parts(batch, size):
    return [
        {name: x[i : i + size] for name, x in batch.items()} for i in range(0, len(batch["input_ids"]), size)
    ]  # fmt: skip


def assert_near(found, wanted, tolerance):
    """Relative to the size of each array."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        error = np.linalg.norm(found[name] - x) / max(np.linalg.norm(x), 1e-6)
        assert error < tolerance, f"{name} is off by {error:.2g}"


def their_gradients(kind, batch):
    theirs = model(kind)[2]
    theirs.zero_grad()
    loss = theirs(**{name: torch.tensor(x) for name, x in batch.items()}).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_equal_transformers(xp, kind):
    batch = rows()
    loss, wanted = their_gradients(kind, batch)
    logs, found = gradients(start(xp, kind), [batch])
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert_near(found, wanted, 1e-4)
    total = sum(float(np.square(x, dtype=np.float64).sum()) for x in wanted.values())
    assert logs["grad_norm"] == pytest.approx(total**0.5, rel=1e-4)
    # Packed, nothing is seen across a border, not through a sliding window either.
    logs, found = gradients(start(xp, kind), [packed(batch)])
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert_near(found, wanted, 1e-4)


def test_cut_up_in_any_way(xp, whole, monkeypatch):
    """Rows at once, batches in a step, and the pieces of the head make no difference: all is one sum."""
    batch = rows()
    logs, wanted = whole
    assert logs["tokens"] == (batch["labels"][:, 1:] != -100).sum()
    engine = start(xp)
    monkeypatch.setattr(TrainingEngine, "_at_once", lambda *shape: 3)  # three rows, then one and two that are filled in
    cut = {"three rows at once": gradients(engine, [batch])}
    monkeypatch.setattr(TrainingEngine, "_at_once", lambda *shape: 1)
    cut["a row at once"] = gradients(engine, [batch])
    cut["accumulated"] = gradients(engine, parts(batch, 1))
    cut["with a batch without labels"] = gradients(engine, [batch, batch | {"labels": np.full((4, TIME), -100)}])
    monkeypatch.setattr(head, "ROWS", 5)
    cut["pieces of the head"] = gradients(start(xp), [batch])
    for how, (again, found) in cut.items():
        for name in ("loss", "accuracy", "grad_norm", "tokens"):
            assert again[name] == pytest.approx(logs[name], rel=1e-5), how
        assert_near(found, wanted, 2e-5)


def test_settings_that_change_no_gradient(xp, whole):
    batch = rows()
    logs, wanted = whole

    def loss(logits, labels):
        own = xp.take_along_axis(logits, xp.expand_dims(labels, 1), 1)
        return xp.logsumexp(logits, axis=1) - own[:, 0]

    for settings in ({"remat": True, "matmul_precision": "highest"}, {"jit": False}, {"loss": loss}):
        if xp.name == "jax" and "jit" in settings:
            continue  # XLA compiles every operation on its own then
        again, found = gradients(start(xp, **settings), [batch])
        assert again == pytest.approx(logs, rel=1e-5), settings
        assert_near(found, wanted, 2e-5)


def test_bfloat16_gradients(xp, whole):
    batch = rows()
    logs, wanted = whole
    engine = start(xp, compute_dtype="bfloat16")
    rounded, found = gradients(engine, [batch])
    assert all(xp.dtype(x) == "float32" for x in (engine.trainable | engine.state).values())
    assert rounded["loss"] == pytest.approx(logs["loss"], rel=0.02) and rounded["loss"] != logs["loss"]
    both = [np.concatenate([x[name].ravel() for name in wanted]) for x in (found, wanted)]
    assert both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1]) > 0.98


def test_float16_overflows_are_skipped_and_learnt_from(xp, whole, monkeypatch):
    monkeypatch.setattr(optim, "LossScale", functools.partial(optim.LossScale, init_scale=2.0**30))
    engine = start(xp, optimizer=optim.AdamW(0.01), compute_dtype="float16")
    before = {name: np.array(xp.get(x)) for name, x in engine.trainable.items()}
    batch = [complete(rows())]
    skipped = 0
    while not np.isfinite((first := engine.train(batch, 1, 0.01))["grad_norm"]):
        skipped += 1
        for name, x in engine.trainable.items():
            np.testing.assert_array_equal(xp.get(x), before[name])
        assert float(xp.get(engine.state["loss_scale/scale"])) == 2.0 ** (30 - skipped) and skipped < 30
    assert skipped > 3
    assert first == pytest.approx(whole[0], rel=0.02)  # the scale is in neither the loss nor the norm
    for step in range(2, 12):
        last = engine.train(batch, step, 0.01)
    assert np.isfinite(last["grad_norm"]) and last["loss"] < 0.9 * first["loss"]


def test_steps_equal_torch_optim(xp):
    """transformers' model, torch's AdamW and clip_grad_norm_, three steps of full fine-tuning."""
    skeleton, params, theirs = model("small")
    engine = start(xp, "small", optimizer=optim.AdamW(weight_decay=0.1), clip_norm=0.25)
    saved = {name: x.clone() for name, x in theirs.state_dict().items()}
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    try:
        for step in (1, 2, 3):
            batch = rows(step)
            adamw.zero_grad()
            loss = theirs(**{name: torch.tensor(x) for name, x in batch.items()}).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
            adamw.step()
            logs = engine.train([complete(batch)], step, 0.01)
            assert logs["loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert logs["grad_norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > 0.3  # it was clipped
        moved = {name: x.detach().numpy() - params[name] for name, x in theirs.named_parameters()}
        assert_near({name: xp.get(x) - params[name] for name, x in engine.trainable.items()}, moved, 2e-3)
    finally:
        theirs.load_state_dict(saved)


def test_adapter_steps_equal_peft(xp):
    import peft

    skeleton, params, _ = model("gemma3_text")
    config = lora.LoRAConfig(rank=2, alpha=8)
    modules = lora.choose(skeleton, "all-linear")
    adapted, specs = lora.attach(skeleton, config, modules)
    arrays = {name: xp.array(x) for name, x in params.items()}
    values = lora.initial(xp, arrays, specs, seed=1)
    settings = Settings(optim.AdamW(weight_decay=0.1))
    engine = TrainingEngine(xp, adapted, arrays | values, list(values), settings, TextObjective(skeleton.model.config))

    base = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**CONFIGS["gemma3_text"]), attn_implementation="eager"
    )
    base.load_state_dict({name: torch.tensor(x) for name, x in params.items()}, strict=False)
    base.tie_weights()
    targets = sorted({module.rpartition(".")[2] for module in modules})
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets))

    def ours(name):  # base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
        return name.removeprefix("base_model.model.").replace(".lora_", ".lora.lora_").removesuffix(".default.weight")

    trained = {ours(name): x for name, x in theirs.named_parameters() if x.requires_grad}
    assert trained.keys() == values.keys()
    with torch.no_grad():
        for name, x in trained.items():
            x.copy_(torch.tensor(np.array(xp.get(values[name]))))
    first = {name: np.array(xp.get(x)) for name, x in values.items()}
    adamw = torch.optim.AdamW(trained.values(), lr=0.02, weight_decay=0.1)
    for step in (1, 2, 3):
        batch = rows(step)
        adamw.zero_grad()
        loss = theirs(**{name: torch.tensor(x) for name, x in batch.items()}).loss
        loss.backward()
        adamw.step()
        logs = engine.train([complete(batch)], step, 0.02)
        assert logs["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert engine.trainable.keys() == values.keys()
    moved = {name: x.detach().numpy() - first[name] for name, x in trained.items()}
    assert_near({name: xp.get(x) - first[name] for name, x in engine.trainable.items()}, moved, 2e-3)


def test_dropout_is_the_same_everywhere_and_off_in_evaluation(xp, monkeypatch):
    skeleton, params, _ = model("small")
    adapted, specs = lora.attach(skeleton, lora.LoRAConfig(2, dropout=0.5), lora.choose(skeleton, "all-linear"))
    rng = np.random.default_rng(3)
    values = {name: rng.normal(0, 0.5, spec.shape).astype(np.float32) for name, spec in specs.items()}

    def make(name, **settings):
        backend = get_backend(name, "cpu")
        arrays = {name: backend.array(x) for name, x in (params | values).items()}
        settings = Settings(Keep(), dropout=True, **settings)
        return TrainingEngine(backend, adapted, arrays, list(values), settings, TextObjective(skeleton.model.config))

    batch = rows()
    engine = make(xp.name)
    logs, wanted = gradients(engine, [batch])
    if xp.name != "torch":
        again, found = gradients(make("torch"), [batch])
        assert logs["loss"] == pytest.approx(again["loss"], rel=1e-5)
        assert_near(found, wanted, 1e-4)
    monkeypatch.setattr(
        TrainingEngine, "_at_once", lambda *shape: 1
    )  # a row has the same mask whatever it is computed with
    again, found = gradients(engine, [batch])
    assert again["loss"] == pytest.approx(logs["loss"], rel=1e-5)
    assert_near(found, wanted, 2e-5)
    kept = engine.train([complete(batch)], 2, 0.1)["loss"]
    assert abs(kept - logs["loss"]) > 1e-3  # another step, another mask
    evaluated = engine.evaluate([complete(batch)])
    assert evaluated == engine.evaluate([complete(batch)])
    assert abs(evaluated["loss"] - logs["loss"]) > 1e-3


def test_evaluation(backend, kind="gemma2"):
    skeleton, params, theirs = model(kind)
    arrays = {name: backend.array(x) for name, x in params.items()}
    engine = TrainingEngine(backend, skeleton, arrays, (), Settings(), TextObjective(skeleton.model.config))
    batch = rows()
    with torch.no_grad():
        out = theirs(**{name: torch.tensor(x) for name, x in batch.items()})
    labels = batch["labels"][:, 1:]
    hits = out.logits[:, :-1].argmax(-1).numpy() == labels
    wanted = {"loss": out.loss.item(), "accuracy": hits.sum() / (labels != -100).sum()}
    for batches in ([batch], parts(batch, 2), [packed(batch)]):
        found = engine.evaluate([complete(part) for part in batches])
        assert found.pop("tokens") == (labels != -100).sum()
        assert found == pytest.approx(wanted, rel=1e-5)
    assert engine.evaluate([]) == {"loss": 0.0, "accuracy": 0.0, "tokens": 0.0}


def test_what_it_is_given_stays(xp):
    """The model's own arrays are neither donated nor written to, whatever is trained."""
    skeleton, params, _ = model("small")
    arrays = {name: xp.array(x) for name, x in params.items()}
    engine = TrainingEngine(
        xp, skeleton, arrays, list(params)[:4], Settings(optim.SGD()), TextObjective(skeleton.model.config)
    )
    engine.train([complete(rows())], 1, 0.1)
    for name, x in params.items():
        np.testing.assert_array_equal(xp.get(arrays[name]), x)
        assert (xp.get(engine.params[name]) == x).all() == (name not in list(params)[:4])


def test_a_step_without_labels_changes_nothing(xp):
    engine = start(xp)
    before = {name: np.array(xp.get(x)) for name, x in engine.trainable.items()}
    logs = engine.train([complete(rows() | {"labels": np.full((4, TIME), -100)})], 1, 0.1)
    assert logs == {"loss": 0.0, "accuracy": 0.0, "grad_norm": 0.0, "tokens": 0.0}
    for name, x in engine.trainable.items():
        np.testing.assert_array_equal(xp.get(x), before[name])


def test_memory_is_counted(xp):
    engine = start(xp, "llama", optimizer=optim.AdamW())
    few, many = engine.memory(1, 512), engine.memory(1, 2048)
    weights = sum(x.size for x in model("llama")[1].values()) * 4
    assert 5 * weights < few < many
    assert start(xp, "llama", optimizer=optim.SGD()).memory(1, 512) < few
