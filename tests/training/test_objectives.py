"""Objectives of other kinds through the same engine: pairs of texts with in-batch negatives, and preferences.

Both live here alone. They declare groups, totals and what they need of all rows, and give the engine other batches.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from tiny_preset import write_preset

from modelhub import CausalLM
from modelhub.core import head, lora, optim
from modelhub.core.backends import get_backend, installed
from modelhub.core.tree import bind, flatten
from modelhub.errors import ConfigError, DataError
from modelhub.families import family_of
from modelhub.training import fields
from modelhub.training.batches import Batches
from modelhub.training.engine import Settings, TrainingEngine
from modelhub.training.examples import Example
from modelhub.training.fields import Field
from modelhub.training.fit import Plan, Run
from modelhub.training.objectives import Objective, TextObjective, with_places
from modelhub.training.ready_batches import ReadyRows

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
TIME = 6
FAMILY = family_of("llama")
SKELETON = FAMILY.Model.abstract(FAMILY.Config.from_hf(CONFIG))
TRAINERS = [name for name in installed() if name != "numpy"]


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# --- pairs of texts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrastive(Objective):
    """Which document of its group belongs to a query; two texts a row.

    group None: all other documents of the batch are the negatives, wherever they are computed.
    """

    group: int | None = None
    unit = "pairs"
    sums = ("loss", "accuracy")
    sequences = 2
    across = ("documents",)
    fields: ClassVar = {
        "query": Field({"rows time": "int32"}), "document": Field({"rows time": "int32"}),
        "weight": Field({"rows": "float32"}),
    }  # fmt: skip

    def shape(self, batch):
        rows, time = batch["query"].shape
        return rows, 2 * time

    def piece(self, batch, first, rows):
        arrays = fields.cut(self.fields, batch, first, rows)
        return arrays | {"row": np.arange(first, first + rows, dtype=np.int32)}, int((arrays["weight"] > 0).sum())

    def size(self, batch):
        return int((batch["weight"] > 0).sum())

    def most(self, batch):
        return float(batch["weight"].shape[0])

    def activations(self, rows, positions, item, remat):
        return rows * positions * 1000

    def embed(self, xp, forward, skeleton, params, batch):
        rows, time = batch["query"].shape
        ids = xp.reshape(xp.stack([batch["query"], batch["document"]], 1), (2 * rows, time))
        real = xp.cast(ids > 0, "int32")
        positions = xp.broadcast_to(xp.expand_dims(xp.arange(time), 0), (2 * rows, time))
        hidden = bind(skeleton, params).model(forward, ids, positions=positions, segments=real)
        mask = xp.expand_dims(xp.cast(real, "float32"), 2)
        pooled = xp.sum(hidden * mask, axis=1) / xp.maximum(xp.sum(mask, axis=1), 1.0)
        pooled = pooled * xp.rsqrt(xp.sum(pooled * pooled, axis=1, keepdims=True) + 1e-6)
        both = xp.reshape(pooled, (rows, 2, -1))
        return both[:, 0], both[:, 1]

    def loss(self, xp, forward, skeleton, params, batch, trainable, own):
        queries, documents = self.embed(xp, forward, skeleton, params, batch)
        rows = batch["row"]
        documents, theirs, there = (forward.all_rows(x) for x in (documents, rows, batch["weight"]))
        scores = 5.0 * xp.matmul(queries, xp.transpose(documents, (1, 0)))
        rivals = xp.expand_dims(there > 0.0, 0) & xp.expand_dims(rows >= 0, 1)
        if self.group is not None:
            rivals = rivals & (xp.expand_dims(rows // self.group, 1) == xp.expand_dims(theirs // self.group, 0))
        meant = xp.expand_dims(rows, 1) == xp.expand_dims(theirs, 0)
        scores = xp.where(rivals | meant, scores, -1e30)
        own_score = xp.sum(xp.where(meant, scores, 0.0), axis=1)
        value = xp.sum((xp.logsumexp(scores, axis=1) - own_score) * batch["weight"])
        right = xp.cast(own_score >= xp.max(scores, axis=1), "float32") * batch["weight"]
        sums = {"loss": xp.stop_gradient(value), "accuracy": xp.stop_gradient(xp.sum(right))}
        return None if trainable is None else value, sums


def pairs(count, seed=0):
    """Documents share tokens with their queries; the rest is noise, and lengths differ."""
    rng = np.random.default_rng(seed)
    query, document = (rng.integers(1, 61, (count, TIME)).astype(np.int32) for _ in range(2))
    document[:, :3] = query[:, :3]
    for row in range(count):
        query[row, rng.integers(3, TIME + 1) :] = 0
        document[row, rng.integers(3, TIME + 1) :] = 0
    return {"query": query, "document": document, "weight": np.ones(count, np.float32)}


def part(batch, first, rows):
    return {name: x[first : first + rows] for name, x in batch.items()}


# --- preferences --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference(Objective):
    """-log sigmoid(beta (what a chosen answer's tokens sum to - its rejected one's) - anchor), and a share of the
    chosen tokens' mean loss. anchor: the mean log-probability of the rejected tokens, a constant.

    packed: a pair is two segments of a row; else two rows.
    """

    config: object
    packed: bool = True
    over: str = "window"
    beta: float = 0.5
    unit = "pairs"
    sums = ("loss", "margin", "told")
    fields = TextObjective.fields

    @property
    def group(self):
        return 1 if self.packed else 2

    @property
    def counted(self):
        return {"pairs": self.over, "chosen": self.over, "rejected": self.over}

    @property
    def measured(self):
        return {"rejected_logprob": self.over}

    def shape(self, batch):
        return batch["input_ids"].shape

    def sides(self, batch):
        """(pair, whether rejected, whether there is something) of each position."""
        segments = batch["segment_ids"]
        rows = np.arange(len(segments))[:, None]
        if not self.packed:
            return np.broadcast_to(rows // 2, segments.shape), np.broadcast_to(rows % 2, segments.shape), segments > 0
        pair = rows * (segments.shape[1] // 2) + (segments - 1) // 2
        return pair, (segments - 1) % 2, segments > 0

    def piece(self, batch, first, rows):
        cut = fields.cut(self.fields, batch, first, rows)
        arrays = with_places(cut)
        pair, rejected, _ = (x.reshape(-1) for x in self.sides(cut))
        there = np.arange(len(arrays["places"])) < arrays["count"]
        arrays["pair"] = np.where(there, pair[arrays["places"]], -1).astype(np.int32)
        arrays["rejected"] = np.where(there, rejected[arrays["places"]], 0).astype(np.int32)
        arrays["row_pairs"] = np.zeros(max(1, cut["input_ids"].size // 2), np.float32)
        arrays["row_pairs"][np.unique(arrays["pair"][there])] = 1.0
        return arrays, float(arrays["row_pairs"].sum())

    def count(self, batch):
        arrays, found = self.piece(batch, 0, len(batch["input_ids"]))
        there = arrays["pair"] >= 0
        rejected = int((there & (arrays["rejected"] > 0)).sum())
        return {"pairs": found, "rejected": rejected, "chosen": int(there.sum()) - rejected}

    def size(self, batch):
        return int(self.count(batch)["pairs"])

    def most(self, batch):
        return float(batch["row_pairs"].shape[0])

    def activations(self, rows, positions, item, remat):
        return rows * positions * 1000

    def hidden(self, xp, forward, skeleton, params, batch):
        model = bind(skeleton, params).model
        found = model(forward, batch["input_ids"], positions=batch["position_ids"], segments=batch["segment_ids"])
        return xp.reshape(found, (-1, found.shape[-1]))

    def measure(self, xp, skeleton, params, batch):
        hidden = self.hidden(xp, xp, skeleton, params, batch)
        logprobs = head.token_logprobs(xp, skeleton, params, hidden, batch)
        return {"rejected_logprob": xp.sum(logprobs * xp.cast(batch["rejected"], "float32"))}

    def loss(self, xp, forward, skeleton, params, batch, trainable, own):
        hidden = self.hidden(xp, forward, skeleton, params, batch)
        there = batch["row_pairs"]
        anchor = batch["total/rejected_logprob"] / batch["total/rejected"]
        a_pair = xp.cast(xp.expand_dims(xp.arange(there.shape[0]), 1) == xp.expand_dims(batch["pair"], 0), "float32")
        sign = 1.0 - 2.0 * xp.cast(batch["rejected"], "float32")
        chosen = xp.cast((batch["rejected"] == 0) & (batch["pair"] >= 0), "float32")

        def fn(logprobs):
            margin = xp.matmul(a_pair, xp.expand_dims(logprobs * sign, 1))[:, 0]
            losses = -xp.log(xp.sigmoid(self.beta * margin - 0.1 * anchor))
            # Divided once, by the number of pairs: a mean over tokens is brought to that.
            value = xp.sum(losses * there) - 0.2 * xp.sum(logprobs * chosen) * (
                batch["total/pairs"] / batch["total/chosen"]
            )
            return value, {"loss": value, "margin": xp.sum(margin * there), "told": xp.sum(anchor * there)}

        value, sums, gradients = head.through_logprobs(
            xp, skeleton, params, hidden, batch, trainable or frozenset(), fn, gradients=trainable is not None
        )
        sums = {name: xp.stop_gradient(x) for name, x in sums.items()}
        return None if trainable is None else head.surrogate(xp, params | {"hidden": hidden}, gradients), sums


def answers(count, seed=0):
    """Chosen and rejected, one after the other, behind the same prompt."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = rng.integers(1, 61, rng.integers(2, 4))
        for _ in range(2):
            answer = rng.integers(1, 61, rng.integers(1, 4))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            found.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
    return found


# --- both through the engine --------------------------------------------------------------------------------------------


def engine_of(name, objective, optimizer=None, names=None, **settings):
    xp = name if not isinstance(name, str) else get_backend(name, "cpu")
    rng = np.random.default_rng(0)
    params = {n: xp.array(rng.normal(0, 0.3, s.shape).astype(np.float32)) for n, s in flatten(SKELETON).items()}
    return TrainingEngine(
        xp, SKELETON, params, names or list(params), Settings(optimizer or Keep(), **settings), objective
    )


class Keep:
    """An optimizer that changes nothing: its state is the gradients it was given."""

    def init(self, xp, params):
        return {f"seen/{name}": xp.zeros(x.shape) for name, x in params.items()}

    def update(self, xp, grads, state, params, learning_rate, step, finite=None):
        return dict(params), {f"seen/{name}": x for name, x in grads.items()}


def gradients(engine, batches):
    logs = engine.train(batches, 1, 0.1)
    return logs, {name: np.array(engine.xp.get(x)) for name, x in engine.state.items()}


def assert_same(found, wanted):
    for name, value in wanted[0].items():
        assert found[0][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    for name, x in wanted[1].items():
        np.testing.assert_allclose(found[1][name], x, rtol=1e-4, atol=2e-5 * max(np.abs(x).max(), 1e-3), err_msg=name)


def fit(name, objective, data, steps, grad_accum=1, validation=None):
    engine = engine_of(name, objective, optim.AdamW(0.01))
    run = Run(
        engine, data, Plan(epochs=100, steps=steps, grad_accum=grad_accum, learning_rate=0.01),
        model=SimpleNamespace(stop_training=False), publish=lambda params: None, validation=validation, callbacks=[],
        settings={},
    )  # fmt: skip
    return run.fit()


@pytest.fixture(scope="module")
def curves():
    """By backend: the losses of a contrastive run with an uneven last batch, and of a preference run."""
    found = {}
    for name in TRAINERS:
        objective = Contrastive()
        batches = [pairs(6, 1), pairs(6, 2), pairs(4, 3)]
        ready = ReadyRows(batches, objective.fields, objective.size)
        first = fit(name, objective, ready, 7, validation=ReadyRows(batches[:1], objective.fields, objective.size))
        preference = Preference(SKELETON.model.config)
        second = fit(name, preference, Batches(answers(9), 24, 2, group=2, seed=1), 7, grad_accum=2)
        found[name] = first, second
    return found


@pytest.mark.slow
def test_curves_are_equal_and_fall(curves):
    wanted = curves[TRAINERS[0]]
    for histories in curves.values():
        for history, other in zip(histories, wanted, strict=True):
            losses = [step["loss"] for step in history.steps]
            np.testing.assert_allclose(losses, [step["loss"] for step in other.steps], rtol=1e-3)
            assert min(losses[-3:]) < 0.9 * losses[0]
            assert set(history.history) > {"loss"}  # means of the epochs


def test_epochs_and_validation_are_in_the_objectives_words(curves):
    contrastive, preference = curves[TRAINERS[0]]
    assert [step["pairs"] for step in contrastive.steps[:3]] == [6.0, 6.0, 4.0]  # the last is filled up, not counted
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} == contrastive.history.keys()
    assert {"loss", "margin", "told"} == preference.history.keys() and "pairs_per_second" in preference.steps[0]
    three = contrastive.steps[:3]
    whole = sum(step["loss"] * step["pairs"] for step in three) / 16
    assert contrastive.history["loss"][0] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_group_is_one_whatever_is_cut(name, monkeypatch):
    """Whole groups go through the model together, and accumulation makes no difference where groups say it all."""
    objective, batch = Contrastive(group=2), pairs(8)
    engine = engine_of(name, objective)
    seen = []
    piece = Contrastive.piece
    monkeypatch.setattr(Contrastive, "piece", lambda *args: seen.append(args[2:]) or piece(*args))
    monkeypatch.setattr(Contrastive, "rows_at_once", lambda *args: 100)
    wanted = gradients(engine, [batch])
    assert seen == [(0, 8)]
    for at_once, cut in ((1, 2), (5, 4), (3, 2)):
        seen.clear()
        monkeypatch.setattr(Contrastive, "rows_at_once", lambda *args, at_once=at_once: at_once)
        assert_same(gradients(engine, [batch]), wanted)
        assert seen == [(first, cut) for first in range(0, 8, cut)]
    assert_same(gradients(engine, [part(batch, 0, 2), part(batch, 2, 6)]), wanted)
    with pytest.raises(DataError, match="7 rows, of which each 2 belong together"):
        engine.train([part(batch, 0, 7)], 1, 0.1)


@pytest.mark.parametrize("name", TRAINERS)
def test_negatives_of_the_whole_batch(name, monkeypatch):
    """It is never cut, on a processor neither; and two batches are another loss than one: that is its definition."""
    monkeypatch.setattr(Contrastive, "rows_at_once", lambda *args: 1)
    engine, batch = engine_of(name, Contrastive()), pairs(4)
    logs, _ = gradients(engine, [batch])
    xp = get_backend("numpy")
    params = {n: np.array(engine.xp.get(x)) for n, x in engine.trainable.items()}
    queries, documents = Contrastive().embed(xp, xp, SKELETON, params, batch)
    scores = 5.0 * queries @ documents.T
    wanted = np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores))
    assert logs["loss"] == pytest.approx(wanted, rel=1e-5)
    halves, _ = gradients(engine, [part(batch, 0, 2), part(batch, 2, 2)])
    assert halves["loss"] < logs["loss"] - 0.1


@pytest.mark.parametrize("name", TRAINERS)
def test_totals_of_a_window_and_of_a_batch(name):
    config = SKELETON.model.config
    [batch] = Batches(answers(6), 32, 4, group=2, shuffle=False).epoch(0)
    parts = [part(batch, 0, 1), part(batch, 1, 3)]
    engine = engine_of(name, Preference(config))
    wanted = gradients(engine, [batch])
    assert wanted[0]["pairs"] == 6.0 and wanted[0]["told"] < -1.0
    assert_same(gradients(engine, parts), wanted)
    # The same pairs in rows of their own, and a row at once.
    [apart] = Batches(answers(6), 8, 12, group=2, shuffle=False, packing=False).epoch(0)
    assert_same(gradients(engine_of(name, Preference(config, packed=False)), [apart]), wanted)
    # Where the definition is a batch's own, each of two batches has its own anchor.
    engine = engine_of(name, Preference(config, over="batch"))
    assert_same(gradients(engine, [batch]), wanted)
    each = [gradients(engine, [one])[0] for one in parts]
    both = gradients(engine, parts)[0]
    for key in ("loss", "told"):
        assert both[key] == pytest.approx(sum(logs[key] * logs["pairs"] for logs in each) / 6, rel=1e-5)
    assert abs(both["told"] - wanted[0]["told"]) > 1e-3


@pytest.mark.parametrize("name", TRAINERS)
def test_evaluation_of_both(name):
    engine = engine_of(name, Contrastive())
    batch = pairs(4)
    trained = engine.train([batch], 1, 0.1)
    found = engine.evaluate([batch])
    assert found == pytest.approx({key: trained[key] for key in ("loss", "accuracy", "pairs")}, rel=1e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_texts_of_a_row_drop_differently(name, monkeypatch):
    """Each of a row's sequences has a mask of its own, the same in whatever piece it comes."""
    adapted, specs = lora.attach(SKELETON, lora.LoRAConfig(2, dropout=0.5), lora.choose(SKELETON, "all-linear"))
    xp = get_backend(name, "cpu")
    rng = np.random.default_rng(0)
    shapes = {n: s.shape for n, s in flatten(SKELETON).items()} | {n: s.shape for n, s in specs.items()}
    params = {n: xp.array(rng.normal(0, 0.3, shape).astype(np.float32)) for n, shape in shapes.items()}
    settings = Settings(Keep(), dropout=True)
    engine = TrainingEngine(xp, adapted, params, list(specs), settings, Contrastive(group=1))
    batch = pairs(4)
    batch["document"] = batch["query"].copy()
    kept = []
    embed = Contrastive.embed

    def watched(self, *args):
        kept.append(embed(self, *args))
        return kept[-1]

    monkeypatch.setattr(Contrastive, "rows_at_once", lambda *args: 4)
    wanted = gradients(engine, [batch])
    monkeypatch.setattr(Contrastive, "rows_at_once", lambda *args: 1)
    assert_same(gradients(engine, [batch]), wanted)
    if name == "torch":  # the others have only tracers there
        monkeypatch.setattr(Contrastive, "embed", watched)
        engine.train([batch], 1, 0.1)
        assert not np.allclose(xp.get(kept[0][0]), xp.get(kept[0][1]), atol=1e-3)  # the same text, dropped otherwise


@pytest.mark.slow
def test_what_is_declared_across_is_enough_for_shards():
    """Two shards that compute half of the rows each: with `all_rows` over them, the sums of their losses and gradients
    are those of one device."""
    jax = pytest.importorskip("jax")
    from modelhub.core.backends.jax import JaxBackend

    class OfShards(JaxBackend):
        def all_rows(self, x):
            return jax.numpy.reshape(jax.lax.all_gather(x, "shards"), (-1, *x.shape[1:]))

    objective, batch = Contrastive(), pairs(6)
    assert objective.across == ("documents",)
    engine = engine_of("jax", objective)
    params, names = engine.params, frozenset(engine.params)
    arrays, _ = objective.piece(batch, 0, 6)

    def run(xp, arrays):
        def summed(params):
            return objective.loss(xp, xp.for_training(), SKELETON, params, arrays, names, None)

        return jax.value_and_grad(summed, has_aux=True)(params)

    (wanted, _), slopes = run(get_backend("jax", "cpu"), arrays)
    halves = {name: x.reshape(2, 3, *x.shape[1:]) for name, x in arrays.items()}
    (values, _), parts = jax.vmap(lambda part: run(OfShards("cpu"), part), axis_name="shards")(halves)
    assert float(values.sum()) == pytest.approx(float(wanted), rel=1e-5)
    for name, x in slopes.items():
        np.testing.assert_allclose(parts[name].sum(0), x, rtol=1e-4, atol=1e-5, err_msg=name)


# --- groups in batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_of_examples_stay_together(group, shuffle):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 10 * group)
    examples = [Example(np.full(n, i + 1, np.int32), np.arange(n) > 0) for i, n in enumerate(lengths)]

    def numbers(row):
        return [int(row["input_ids"][row["segment_ids"] == s][0]) - 1 for s in range(1, row["segment_ids"].max() + 1)]

    def check(found):
        groups = [found[i : i + group] for i in range(0, len(found), group)]
        assert all(part == list(range(part[0], part[0] + group)) and part[0] % group == 0 for part in groups)
        return found

    packed = Batches(examples, 40, 3, group=group, shuffle=shuffle)
    apart = Batches(examples, 40, 2 * group, group=group, shuffle=shuffle, packing=False)
    for epoch in (0, 1):
        seen = []
        for batch in packed.epoch(epoch):
            for row in range(3):
                seen += check(numbers({name: x[row] for name, x in batch.items()}))
        assert sorted(seen) == list(range(10 * group))
        assert (seen != sorted(seen)) == shuffle or group == 4
        seen = []
        for batch in apart.epoch(epoch):
            rows = [numbers({name: x[row] for name, x in batch.items()}) for row in range(2 * group)]
            seen += check([i for row in rows for i in row])  # also of the last batch, which is not full
        assert sorted(seen) == list(range(10 * group))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"examples": answers(2)[:3]}, "3 examples"),
        ({"batch_size": 3, "packing": False}, "batches of 3 rows"),
        ({"sequence_length": 7}, "group 2, 2 examples that belong together, has 10 tokens"),
    ],
)
def test_groups_that_do_not_fit(change, words):
    options = {"examples": answers(3), "sequence_length": 32, "batch_size": 2, "group": 2} | change
    with pytest.raises(DataError, match=words):
        Batches(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": None}, "lacks query"),
        ({"label": np.zeros(2)}, "has unknown label"),
        ({"query": np.zeros((2, 3, 4), int)}, r"query must be \(rows, time\) int32, found \(2, 3, 4\)"),
        ({"query": np.zeros((2, TIME))}, r"query must be .* found \(2, 6\) float64"),
        ({"document": np.zeros((2, 5), int)}, "document has 5 time and query has 6"),
        ({"weight": np.ones(3)}, "weight has 3 rows and query has 2"),
        ({"weight": ["a", "b"]}, "weight must be numbers"),
    ],
)
def test_ready_batches_that_are_not_what_the_objective_names(change, words):
    batch = {name: x for name, x in (pairs(2) | change).items() if x is not None}
    with pytest.raises(DataError, match=f"batch 1 of epoch 1.*{words}"):
        list(ReadyRows([batch], Contrastive.fields, Contrastive().size).epoch(0))


def test_ready_batches_without_anything_to_learn():
    nothing = pairs(2) | {"weight": np.zeros(2)}
    with pytest.raises(DataError, match="there is no row with a loss in the 2 batches of epoch 1"):
        list(ReadyRows([nothing, nothing], Contrastive.fields, Contrastive().size).epoch(0))


# --- through a task -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return str(write_preset(tmp_path_factory.mktemp("preset")))


def test_a_task_learns_by_an_objective_of_the_users(preset):
    lm = CausalLM.from_preset(preset, backend="torch")
    lm.compile(learning_rate=0.01, objective=Contrastive())
    history = lm.fit([pairs(6, 1), pairs(4, 2)], epochs=4, verbose=False)
    assert [step["pairs"] for step in history.steps[:2]] == [6.0, 4.0]
    assert history.history["loss"][-1] < 0.8 * history.history["loss"][0]
    found = lm.evaluate([pairs(6, 1)])
    assert found.keys() == {"loss", "accuracy", "pairs"} and found["loss"] < history.history["loss"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "dpo"}, "there is no objective 'dpo': none has a name so far"),
        ({"objective": Contrastive(), "loss": lambda logits, labels: logits}, "leave loss= and metrics= out"),
        ({"objective": Contrastive(), "metrics": ["accuracy"]}, "leave loss= and metrics= out"),
    ],
)
def test_compile_says_which_objectives_there_are(preset, options, words):
    with pytest.raises(ConfigError, match=words):
        CausalLM.from_preset(preset, backend="torch").compile(**options)
