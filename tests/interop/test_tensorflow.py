"""to_tensorflow, with TensorFlow's own loops, optimizers, checkpoints and compiler."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_families
import torch
import transformers

import modelhub
from modelhub import CausalLM, ImageClassifier, losses
from modelhub.core import nn
from modelhub.core.tree import bind, flatten, initial_value
from modelhub.errors import InputError
from modelhub.tasks.backbone import Backbone

IDS = np.random.default_rng(0).integers(3, 400, (2, 12)).astype(np.int32)


@pytest.fixture
def lm(tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend="tensorflow")


def classifier(**options):
    return ImageClassifier.from_config(
        3, image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, backend="tensorflow", **options,
    )  # fmt: skip


def train(module, optimizer, data, loss):
    """A loop as TensorFlow's guides write it; returns the loss of each batch."""

    @tf.function
    def step(*batch):
        with tf.GradientTape() as tape:
            value = loss(*batch)
        variables = module.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))
        return value

    return [float(step(*batch)) for batch in data]


class TestText:
    @pytest.mark.slow
    def test_training_it_with_keras_and_tf_data_trains_the_task(self, lm, tmp_path):
        module = modelhub.to_tensorflow(lm)
        before = lm.logits(IDS)
        data = tf.data.Dataset.from_tensors((IDS,)).repeat(15).prefetch(2)

        def loss(ids):
            return losses.causal_lm_loss(module(ids, training=True), ids)

        curve = train(module, keras.optimizers.AdamW(1e-2), data, loss)
        assert curve[-1] < 0.5 * curve[0]
        after = lm.logits(IDS)
        assert np.abs(after - before).max() > 1
        np.testing.assert_allclose(module(IDS), after, atol=1e-4)
        lm.save_to_preset(tmp_path / "trained")
        again = CausalLM.from_preset(str(tmp_path / "trained"), backend="numpy")
        np.testing.assert_allclose(again.logits(IDS), after, atol=1e-4)
        assert lm.generate("The river", 8) == again.generate("The river", 8)

    def test_names_and_gradients_are_transformers(self, tmp_path):
        folder = tiny_families.write_preset(tmp_path / "llama", tiny_families.CONFIGS["llama3"])
        module = modelhub.to_tensorflow(CausalLM.from_preset(str(folder), backend="tensorflow"))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        named = dict(theirs.named_parameters())
        assert module.params.keys() == named.keys()
        assert all(variable.name == f"{name}:0" for name, variable in module.params.items())

        ids = torch.tensor(IDS, dtype=torch.int64)
        theirs(ids, labels=ids).loss.backward()
        with tf.GradientTape() as tape:
            loss = losses.causal_lm_loss(module(IDS), IDS)
        for name, gradient in tape.gradient(loss, dict(module.params)).items():
            wanted = named[name].grad.numpy()
            np.testing.assert_allclose(
                tf.convert_to_tensor(gradient), wanted, atol=2e-4 * np.abs(wanted).max(), err_msg=name
            )

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_one_graph_for_all_sizes(self, lm, jit_compile):
        module = modelhub.to_tensorflow(lm)
        traced = []

        @tf.function(input_signature=[tf.TensorSpec((None, None), tf.int32)] * 2, jit_compile=jit_compile)
        def logits(ids, mask):
            traced.append(ids.shape)
            return module(ids, mask)

        for rows, time in ((2, 12), (1, 5)):
            ids = IDS[:rows, :time]
            np.testing.assert_allclose(logits(ids, np.ones_like(ids)), lm.logits(ids), atol=1e-4)
        assert traced == [(None, None)]

    def test_padding_on_either_side(self, lm):
        module = modelhub.to_tensorflow(lm)
        wanted = lm.logits(IDS)
        for before, after in ((3, 0), (0, 4)):
            ids, mask = (np.pad(x, ((0, 0), (before, after))) for x in (IDS, np.ones_like(IDS)))
            positions = np.maximum(mask.cumsum(1) - 1, 0)
            found = module(ids, attention_mask=mask, position_ids=positions)[:, before : before + IDS.shape[1]]
            np.testing.assert_allclose(found, wanted, atol=1e-4)

    @pytest.mark.slow
    def test_checkpoint(self, lm, tiny_preset, tmp_path):
        module = modelhub.to_tensorflow(lm)
        optimizer = keras.optimizers.AdamW(1e-2)
        train(module, optimizer, [(IDS,)] * 2, lambda ids: losses.causal_lm_loss(module(ids), ids))
        path = tf.train.Checkpoint(model=module).save(str(tmp_path / "checkpoint"))
        fresh = CausalLM.from_preset(str(tiny_preset), backend="tensorflow")
        other = modelhub.to_tensorflow(fresh)
        assert np.abs(fresh.logits(IDS) - lm.logits(IDS)).max() > 0.1
        tf.train.Checkpoint(model=other).restore(path).assert_consumed()
        np.testing.assert_array_equal(fresh.logits(IDS), lm.logits(IDS))

    @pytest.mark.slow
    def test_an_adapter_alone_is_trained(self, lm):
        assert len(modelhub.to_tensorflow(lm).trainable_variables) == len(lm.params)
        lm.enable_lora(2)
        module = modelhub.to_tensorflow(lm)
        names = {name for name, variable in module.params.items() if variable.trainable}
        assert names == set(lm.backbone.trainable_names()) and all(".lora." in name for name in names)
        assert {id(variable) for variable in module.variables} == {id(x) for x in lm.params.values()}
        base = {name: x.numpy() for name, x in module.params.items() if name not in names}
        curve = train(
            module, keras.optimizers.Adam(5e-2), [(IDS,)] * 8, lambda ids: losses.causal_lm_loss(module(ids), ids)
        )
        assert curve[-1] < curve[0]
        assert all((module.params[name].numpy() == x).all() for name, x in base.items())
        np.testing.assert_allclose(module(IDS), lm.logits(IDS), atol=1e-4)

    def test_seed_decides_dropout(self, lm):
        lm.enable_lora(2, dropout=0.5)
        module = modelhub.to_tensorflow(lm)
        for name, variable in module.params.items():
            if "lora_B" in name:
                variable.assign(tf.ones_like(variable))
        np.testing.assert_array_equal(module(IDS), module(IDS))
        tf.random.set_seed(1)
        first, second = module(IDS, training=True).numpy(), module(IDS, training=True).numpy()
        tf.random.set_seed(1)
        np.testing.assert_array_equal(module(IDS, training=True), first)
        assert np.abs(first - second).max() > 0.01

    def test_in_a_distribution_strategy(self, lm):
        strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
        with strategy.scope():
            module = modelhub.to_tensorflow(lm)

        @tf.function
        def step(ids):
            def replica(ids):
                with tf.GradientTape() as tape:
                    loss = losses.causal_lm_loss(module(ids, training=True), ids)
                variables = module.trainable_variables
                for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                    variable.assign_sub(0.01 * gradient)
                return loss

            return strategy.reduce("mean", strategy.run(replica, [ids]), axis=None)

        curve = [float(step(IDS)) for _ in range(5)]
        assert curve[-1] < curve[0]
        np.testing.assert_allclose(module(IDS), lm.logits(IDS), atol=1e-4)

    def test_a_backbone_gives_hidden_states(self, tiny_preset):
        backbone = Backbone.from_preset(str(tiny_preset), backend="tensorflow")
        wanted = np.array(backbone(IDS))
        np.testing.assert_allclose(modelhub.to_tensorflow(backbone)(IDS), wanted, atol=1e-5)


class TestOwnership:
    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["jax", "torch"])
    @pytest.mark.parametrize("how", ["assign_add", "jit_compile", "slice", "scatter", "optimizer"])
    def test_arrays_that_others_hold_are_not_written_to(self, tiny_preset, backend, how):
        lm = CausalLM.from_preset(str(tiny_preset), backend=backend)
        theirs = lm.params
        before = {name: np.from_dlpack(x).copy() for name, x in theirs.items()}
        module = modelhub.to_tensorflow(lm)
        assert lm.backend == "tensorflow"
        gc.collect()  # of what TensorFlow holds, only the Variables are left

        def one_more(variables):
            for variable in variables:
                variable.assign_add(tf.ones_like(variable))

        variables = module.variables
        match how:
            case "assign_add":
                one_more(variables)
            case "jit_compile":
                tf.function(one_more, jit_compile=True)(variables)
            case "slice":
                for variable in variables:
                    variable[:1].assign(variable[:1] + 1)
            case "scatter":
                for variable in variables:
                    variable.scatter_add(tf.IndexedSlices(tf.ones_like(variable[:1]), [0]))
            case "optimizer":
                gradients = [tf.fill(variable.shape, -1.0) for variable in variables]
                keras.optimizers.SGD(1.0).apply_gradients(zip(gradients, variables, strict=True))
        for name, x in theirs.items():
            np.testing.assert_array_equal(np.asarray(x), before[name])
            found = lm.backbone.xp.get(lm.params[name])
            np.testing.assert_allclose(found[0], before[name][0] + 1, atol=1e-6)

    def test_nor_are_tensors_of_before(self, lm):
        held = dict(lm.params)
        before = {name: x.numpy().copy() for name, x in held.items()}
        for variable in modelhub.to_tensorflow(lm).variables:
            variable.assign(tf.zeros_like(variable))
        assert all((held[name].numpy() == x).all() for name, x in before.items())

    def test_twice_gives_the_same_variables(self, lm):
        one, two = modelhub.to_tensorflow(lm), modelhub.to_tensorflow(lm)
        assert all(one.params[name] is two.params[name] for name in one.params)

    @pytest.mark.slow
    def test_writing_is_seen_by_a_prompt_that_was_kept(self, lm):
        module = modelhub.to_tensorflow(lm)
        lm.generate("The river runs past", 4)
        for variable in module.variables:
            variable.assign(tf.random.stateless_normal(variable.shape, (1, len(variable.shape))) * 0.3)
        fresh = CausalLM(lm.backbone, lm.tokenizer, lm.generation_config)
        assert lm.generate("The river runs past", 8) == fresh.generate("The river runs past", 8)


class TestImages:
    @pytest.mark.slow
    def test_training_it_trains_the_task(self):
        clf = classifier(hidden_dropout_prob=0.1)
        module = modelhub.to_tensorflow(clf)
        generator = np.random.default_rng(0)
        labels = generator.integers(0, 3, 24).astype(np.int32)
        pixels = (generator.normal(size=(24, 1, 8, 8)) + labels[:, None, None, None]).astype(np.float32)
        data = tf.data.Dataset.from_tensor_slices((pixels, labels)).batch(8).repeat(10)

        def loss(pixels, labels):
            return losses.cross_entropy(module(pixels, training=True), labels)

        curve = train(module, keras.optimizers.AdamW(1e-2), data, loss)
        assert np.mean(curve[-3:]) < 0.7 * np.mean(curve[:3])
        np.testing.assert_allclose(module(pixels), clf.logits({"pixel_values": pixels}), atol=1e-4)

    def test_any_batch_but_one_size_in_a_graph(self):
        clf = classifier()
        module = modelhub.to_tensorflow(clf)
        pixels = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
        call = tf.function(module, input_signature=[tf.TensorSpec((None, 1, 8, 8))], jit_compile=True)
        np.testing.assert_allclose(call(pixels), clf.logits({"pixel_values": pixels}), atol=1e-4)
        with pytest.raises(InputError, match="height and width must be known"):
            tf.function(module, autograph=False).get_concrete_function(tf.TensorSpec((None, 1, None, None)))


def test_a_single_module():
    skeleton = nn.Linear.abstract(3, 2, bias=True)
    module = modelhub.to_tensorflow(skeleton)
    assert module.params.keys() == {"weight", "bias"}
    x = np.ones((4, 3), np.float32)
    wanted = x @ initial_value("weight", skeleton.weight, 0).T
    np.testing.assert_allclose(module(tf.constant(x)), wanted, atol=1e-6)
    arrays = {name: np.full(spec.shape, 2, np.float32) for name, spec in flatten(skeleton).items()}
    np.testing.assert_allclose(modelhub.to_tensorflow(bind(skeleton, arrays))(tf.constant(x)), np.full((4, 2), 8.0))


def test_a_layer_of_a_task_is_a_copy_unless_it_is_live(lm):
    layer = modelhub.to_tensorflow(lm.backbone.module.model.layers[0])
    wanted = lm.logits(IDS)
    for variable in layer.variables:
        variable.assign_add(tf.ones_like(variable))
    np.testing.assert_array_equal(lm.logits(IDS), wanted)
    lm.enable_lora(2)
    module = modelhub.to_tensorflow(lm)
    norm = modelhub.to_tensorflow(lm.backbone.module.model.norm)
    assert norm.params["weight"] is module.params["model.norm.weight"]


def test_wrong_ids_and_masks(lm):
    module = modelhub.to_tensorflow(lm)
    with pytest.raises(InputError, match="input_ids must be integers .* got <dtype: 'float32'>"):
        module(IDS.astype(np.float32))
    with pytest.raises(InputError, match=r"attention_mask must be of shape \(batch, time\), got \(1, 1, 12, 12\)"):
        module(IDS, np.ones((1, 1, 12, 12)))
    with pytest.raises(InputError, match=r"input_ids must be of shape \(batch, time\), got an unknown one"):
        tf.function(module, [tf.TensorSpec(None, tf.int32)], autograph=False)(IDS)


def test_without_dropout_nothing_is_drawn(lm):
    module = modelhub.to_tensorflow(lm)
    tf.random.set_seed(1)
    wanted = tf.random.uniform((3,)).numpy()
    tf.random.set_seed(1)
    module(IDS, training=True)
    np.testing.assert_array_equal(tf.random.uniform((3,)), wanted)


def test_something_else_is_refused():
    with pytest.raises(InputError, match="expected a CausalLM"):
        modelhub.to_tensorflow("gemma3_tiny")
