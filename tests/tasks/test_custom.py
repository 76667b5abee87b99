"""Pieces of the user's own: layers, attention, heads, losses, samplers and families, on every backend."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelhub
from modelhub import Backbone, CausalLM, ImageClassifier, nn
from modelhub.core import custom
from modelhub.core.backends import installed
from modelhub.errors import CheckpointError, ConfigError
from modelhub.families import family_names, family_of, llama

IDS = np.random.default_rng(0).integers(4, 400, (2, 20))
TEXTS = ["The river runs past the old mill.", "She wrote the letter twice, then went for a walk."] * 2
TRAINING = [name for name in installed() if name != "numpy"]
OTHERS = [name for name in installed() if name != "torch"]
each_backend = pytest.mark.parametrize("name", installed())


def register(kind, name, backend=None):
    return modelhub.register(kind, f"test {name}", backend)


@register("layer", "same mlp")
@dataclass
class SameMLP(nn.Module):
    """What Gemma's MLP computes, in other words."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    @classmethod
    def replacing(cls, old):
        return cls(old.gate_proj, old.up_proj, old.down_proj)

    def __call__(self, xp, x):
        gate = self.gate_proj(xp, x)
        gate = 0.5 * gate * (1.0 + xp.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3)))
        return self.down_proj(xp, gate * self.up_proj(xp, x))


@register("layer", "small mlp")
@dataclass
class SmallMLP(nn.Module):
    """Some of its parameters are in the checkpoint: up_proj; down_proj has another shape there; gain is new."""

    up_proj: nn.Linear
    down_proj: nn.Linear
    gain: Any

    @classmethod
    def replacing(cls, old):
        inner, width = old.up_proj.weight.shape
        return cls(nn.Linear.abstract(width, inner), nn.Linear.abstract(inner // 2, width), nn.Spec((width,), "ones"))

    def __call__(self, xp, x):
        left, right = xp.split(self.up_proj(xp, x), 2)
        return self.down_proj(xp, xp.silu(left) * right) * self.gain


@register("layer", "scaled head")
@dataclass
class ScaledHead(nn.Module):
    weight: Any
    scale: Any

    @classmethod
    def replacing(cls, old):
        return cls(old.weight, nn.Spec((old.weight.shape[0],), "ones"))

    def __call__(self, xp, x):
        return xp.linear(x, self.weight) * self.scale


@register("layer", "two-layer head")
@dataclass
class TwoLayerHead(nn.Module):
    inner: nn.Linear
    outer: nn.Linear

    @classmethod
    def replacing(cls, old):
        outputs, inputs = old.weight.shape
        return cls(nn.Linear.abstract(inputs, 16, True), nn.Linear.abstract(16, outputs, True))

    def __call__(self, xp, x):
        return self.outer(xp, xp.tanh(self.inner(xp, x)))


@register("layer", "torch mlp", backend="torch")
@dataclass
class TorchMLP(SameMLP):
    def __call__(self, xp, x):
        from torch.nn.functional import gelu

        return self.down_proj(xp, gelu(self.gate_proj(xp, x), approximate="tanh") * self.up_proj(xp, x))


@register("attention", "softmax")
def softmax_attention(xp, q, k, v, mask, scale):
    repeated = [xp.concat([x[:, i * k.shape[1] // q.shape[1]][:, None] for i in range(q.shape[1])], 1) for x in (k, v)]
    scores = xp.matmul(q, xp.transpose(repeated[0], (0, 1, 3, 2))) * scale
    scores = scores if mask is None else xp.where(mask, scores, -1e30)
    return xp.matmul(xp.softmax(scores), repeated[1])


@register("attention", "halved")
def halved_attention(xp, q, k, v, mask, scale):
    return softmax_attention(xp, q, k, v, mask, scale / 2)


@register("loss", "cross entropy")
def cross_entropy(xp, logits, labels):
    return xp.logsumexp(logits) - xp.take_along_axis(logits, xp.expand_dims(labels, 1), 1)[:, 0]


@register("loss", "focal")
def focal(xp, logits, labels):
    own = xp.take_along_axis(xp.log_softmax(logits), xp.expand_dims(labels, 1), 1)[:, 0]
    return -own * (1.0 - xp.exp(own)) ** 2


@register("sampler", "second")
def second(xp, logits, uniform):
    """The second likeliest."""
    return xp.top_k(logits, 2)[1][:, 1]


def load(preset, backend="numpy", **options):
    return CausalLM.from_preset(preset, backend=backend, device="cpu", **options)


def trained(lm, loss=None, learning_rate=1e-3):
    """The losses of three steps."""
    lm.preprocessor.sequence_length = 24
    lm.compile(learning_rate=learning_rate, loss=loss)
    return [step["loss"] for step in lm.fit(TEXTS, steps=3, batch_size=2, verbose=False).steps]


def assert_close(found, wanted, tolerance=1e-4):
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(scope="module")
def plainly_trained(tiny_preset):
    return trained(load(tiny_preset, "torch"))


class TestWrittenOnce:
    @each_backend
    def test_the_same_maths_gives_the_same_logits(self, tiny_preset, name):
        plain = load(tiny_preset).logits(IDS)
        layers = {"model.layers.*.mlp": "test same mlp", "lm_head": "test scaled head"}
        lm = load(tiny_preset, name, layers=layers, attention="test softmax")
        assert_close(lm.logits(IDS), plain)

    def test_with_a_cache(self, tiny_preset):
        lm = load(tiny_preset, "torch", layers={"mlp": "test same mlp"}, attention="test softmax")
        assert lm.generate("In the morning", 8) == load(tiny_preset, "torch").generate("In the morning", 8)

    @pytest.mark.slow
    def test_the_same_on_every_backend(self, tiny_preset):
        layers = {"mlp": "test small mlp", "lm_head": "test two-layer head"}
        found = {name: load(tiny_preset, name, layers=layers).logits(IDS) for name in installed()}
        for name in installed():
            assert_close(found[name], found["numpy"])
        assert np.abs(found["numpy"] - load(tiny_preset).logits(IDS)).max() > 0.1

    @pytest.mark.slow
    def test_fit_is_the_same_on_every_backend(self, tiny_preset):
        layers = {"mlp": "test small mlp", "lm_head": "test two-layer head"}
        found = []
        for name in TRAINING:
            lm = load(tiny_preset, name, layers=layers)
            before = dict(lm.params)
            found.append(trained(lm, "test focal"))
            xp = lm.backbone.xp
            for part in ("model.layers.1.mlp.gain", "model.layers.1.mlp.down_proj.weight", "lm_head.inner.bias"):
                assert np.abs(xp.get(lm.params[part]) - xp.get(before[part])).max() > 0
        assert found[0][2] < found[0][0]
        np.testing.assert_allclose(found, [found[0]] * len(found), rtol=1e-4)

    @pytest.mark.parametrize("name", TRAINING)
    def test_training_as_without_them(self, tiny_preset, plainly_trained, name):
        """The gradients of a registered loss, layer and attention are those of ours."""
        lm = load(tiny_preset, name, layers={"mlp": "test same mlp"}, attention="test softmax")
        np.testing.assert_allclose(trained(lm, "test cross entropy"), plainly_trained, rtol=1e-4)

    def test_a_function_given_directly(self, tiny_preset):
        found = [trained(load(tiny_preset, "torch"), loss) for loss in (focal, "test focal")]
        assert found[0] == found[1]
        assert_close(load(tiny_preset, attention=softmax_attention).logits(IDS), load(tiny_preset).logits(IDS))

    def test_evaluate_with_a_loss(self, tiny_preset):
        lm = load(tiny_preset)
        lm.compile(loss="test cross entropy")
        assert lm.evaluate(TEXTS)["loss"] == pytest.approx(load(tiny_preset).evaluate(TEXTS)["loss"], rel=1e-5)

    @each_backend
    def test_sampler(self, tiny_preset, name):
        lm = load(tiny_preset, name)
        ids = lm.tokenizer.encode("In the morning")
        wanted = np.argsort(-lm.logits([ids])[0, -1])[1]
        (found,) = lm.generate(["In the morning"], 1, sampler="test second", logprobs=True)
        assert found.token_ids == [wanted]

    def test_a_head_of_ones_own_unties_the_embeddings(self, tiny_preset):
        lm = load(tiny_preset, "torch", layers={"lm_head": "test scaled head"})
        assert load(tiny_preset).config.tie_word_embeddings and not lm.config.tie_word_embeddings
        table, head = lm.params["model.embed_tokens.weight"], lm.params["lm_head.weight"]
        assert (table == head).all() and table.data_ptr() != head.data_ptr()

    def test_layers_one_after_the_other(self, tiny_preset):
        lm = load(tiny_preset, layers={"mlp": "test same mlp", "model.layers.1.mlp": "test small mlp"})
        assert [type(layer.mlp) for layer in lm.backbone.model.model.layers] == [SameMLP, SmallMLP]

    def test_what_is_new_is_said(self, tiny_preset, caplog):
        load(tiny_preset, layers={"mlp": "test small mlp"})
        assert "4 of the 6 parameters in layers of your own are not in the checkpoint" in caplog.text
        one, two = (load(tiny_preset, layers={"mlp": "test small mlp"}, seed=seed) for seed in (0, 1))
        same = {key for key in one.params if np.array_equal(one.params[key], two.params[key])}
        assert set(one.params) - same == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}

    def test_without_weights(self, tiny_preset):
        options = {"layers": {"mlp": "test small mlp"}, "load_weights": False}
        assert_close(load(tiny_preset, "torch", **options).logits(IDS), load(tiny_preset, **options).logits(IDS))

    def test_backbone(self, tiny_preset):
        plain = Backbone.from_preset(tiny_preset, backend="numpy")(IDS)
        same = Backbone.from_preset(tiny_preset, backend="numpy", layers={"mlp": "test same mlp"})
        assert_close(same(IDS), plain)
        assert same.layers == {"mlp": "test same mlp"}


class TestLoRA:
    @pytest.mark.parametrize("name", TRAINING)
    def test_on_a_layer_of_ones_own(self, tiny_preset, tmp_path, name):
        layers = {"mlp": "test small mlp", "lm_head": "test two-layer head"}
        lm = load(tiny_preset, name, layers=layers)
        targets = ["mlp.up_proj", "mlp.down_proj", "lm_head.outer"]
        lm.enable_lora(rank=2, targets=targets)
        assert lm.backbone.adapter.modules == [
            *(f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "down")), "lm_head.outer",
        ]  # fmt: skip
        frozen = {key: lm.backbone.xp.get(x).copy() for key, x in lm.params.items() if ".lora." not in key}
        losses = trained(lm, learning_rate=0.03)
        assert losses[2] < losses[0]
        assert all(np.array_equal(lm.backbone.xp.get(lm.params[key]), x) for key, x in frozen.items())
        logits = lm.logits(IDS)
        lm.save_adapter(tmp_path / "adapter")
        lm.save_to_preset(tmp_path / "whole")
        again = load(tiny_preset, layers=layers)
        again.load_adapter(tmp_path / "adapter")
        assert_close(again.logits(IDS), logits)
        assert_close(load(tmp_path / "whole").logits(IDS), logits)

    def test_an_adapter_goes_on_the_same_layers(self, tiny_preset, tmp_path):
        lm = load(tiny_preset, layers={"lm_head": "test two-layer head"})
        lm.enable_lora(rank=2)
        lm.save_adapter(tmp_path / "task")
        lm.backbone.save_adapter(tmp_path / "backbone")
        for folder in ("task", "backbone"):
            for layers in (None, {"lm_head": "test scaled head"}):
                other = load(tiny_preset, layers=layers)
                with pytest.raises(CheckpointError, match="layers={'lm_head': 'test two-layer head'}, where they are"):
                    other.load_adapter(tmp_path / folder)
                assert not other.backbone.adapters
            again = load(tiny_preset, layers={"lm_head": "test two-layer head"})
            again.load_adapter(tmp_path / folder)
            assert np.array_equal(again.logits(IDS), lm.logits(IDS))

    def test_all_linear_leaves_the_head_out(self, tiny_preset):
        lm = load(tiny_preset, layers={"lm_head": "test two-layer head"})
        lm.enable_lora(targets="all-linear")
        assert not [name for name in lm.backbone.adapter.modules if name.startswith("lm_head")]


SAVED = {"model.layers.*.mlp": "test small mlp", "lm_head": "test two-layer head"}


@pytest.fixture(scope="module")
def saved(tiny_preset, tmp_path_factory):
    lm = load(tiny_preset, "torch", layers=SAVED, seed=3)
    trained(lm)
    folder = tmp_path_factory.mktemp("custom") / "saved"
    lm.save_to_preset(folder)
    return folder, lm.logits(IDS)


def changed(folder, copy, **config):
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(data | config))
    return copy


class TestSaving:
    @each_backend
    def test_comes_back(self, saved, name):
        folder, logits = saved
        lm = load(folder, name)
        assert_close(lm.logits(IDS), logits, 1e-4 if name != "torch" else 0.0)
        assert lm.backbone.layers == SAVED
        assert lm.backbone.identity is not None  # the folder is what it is

    def test_config_and_a_word_of_warning(self, saved, tmp_path, caplog):
        folder, logits = saved
        config = json.loads((folder / "config.json").read_text())
        assert config["modelhub_layers"] == [list(pair) for pair in SAVED.items()]
        assert config["architectures"] == ["ModelhubGemma3ForCausalLM"]  # no other tool has it
        load(folder).save_to_preset(tmp_path / "again")
        assert "transformers cannot" in caplog.text and "not in the checkpoint" not in caplog.text
        assert_close(load(tmp_path / "again").logits(IDS), logits)

    def test_in_their_order(self, tiny_preset, tmp_path):
        """In the order of their names the pattern for all would come last."""
        layers = {"model.layers.*.mlp": "test same mlp", "layers.1.mlp": "test small mlp"}
        lm = load(tiny_preset, layers=layers)
        lm.save_to_preset(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert [type(layer.mlp) for layer in again.backbone.model.model.layers] == [SameMLP, SmallMLP]
        assert np.array_equal(again.logits(IDS), lm.logits(IDS))

    def test_attention(self, tiny_preset, tmp_path, caplog):
        lm = load(tiny_preset, attention="test halved")
        lm.save_to_preset(tmp_path / "saved")
        assert "own pieces (test halved) are registered" in caplog.text
        again = load(tmp_path / "saved", "torch")
        assert_close(again.logits(IDS), lm.logits(IDS))
        plain = load(tmp_path / "saved", attention=softmax_attention)  # what is asked for wins
        assert_close(plain.logits(IDS), load(tiny_preset).logits(IDS))
        assert np.abs(plain.logits(IDS) - lm.logits(IDS)).max() > 1e-3
        with pytest.raises(
            ConfigError, match=r"no attention 'test gone'.*@modelhub.register\(\"attention\", 'test gone'"
        ):
            load(changed(tmp_path / "saved", tmp_path / "gone", modelhub_attention="test gone"))
        from modelhub.conversion import convert

        with pytest.raises(ConfigError, match="or attention"):
            convert(str(tmp_path / "saved"), tmp_path / "model.gguf")

    def test_attention_without_a_name(self, tiny_preset, tmp_path, caplog):
        lm = load(tiny_preset, attention=lambda xp, q, k, v, mask, scale: softmax_attention(xp, q, k, v, mask, scale))
        lm.save_to_preset(tmp_path / "saved")
        assert "is not saved: give it again as attention=" in caplog.text
        assert "modelhub_attention" not in (tmp_path / "saved/config.json").read_text()

    def test_an_adapter_says_which_attention_it_was_trained_with(self, tiny_preset, tmp_path, caplog):
        lm = load(tiny_preset, attention="test halved")
        lm.enable_lora(rank=2)
        lm.save_adapter(tmp_path / "adapter")
        load(tiny_preset, attention="test halved").load_adapter(tmp_path / "adapter")
        assert "was trained with" not in caplog.text
        for attention, has in ((None, "the usual one"), ("test softmax", "'test softmax'")):
            caplog.clear()
            load(tiny_preset, attention=attention).load_adapter(tmp_path / "adapter")
            assert f"trained with the attention function 'test halved', and this model has {has}" in caplog.text
            assert "with attention='test halved'" in caplog.text

    def test_the_card_sends_nobody_to_transformers(self, saved, tiny_preset, tmp_path, monkeypatch):
        card = (saved[0] / "README.md").read_text()
        assert "library_name: modelhub" in card and "the layer `test two-layer head`" in card
        assert "AutoModel" not in card and "layers=" not in card
        lm = load(tiny_preset, layers=SAVED, attention="test halved")
        lm.enable_lora(rank=2)
        monkeypatch.setenv("HOME", str(tmp_path))
        lm.save_adapter("~/adapter")
        card = (tmp_path / "adapter/README.md").read_text()
        asked = ", ".join(f'"{pattern}": "{name}"' for pattern, name in SAVED.items())
        assert f'layers={{{asked}}}, attention="test halved")' in card and "PeftModel" not in card

    def test_said_again(self, saved, caplog):
        folder, logits = saved
        assert_close(load(folder, layers=dict(SAVED)).logits(IDS), logits)
        assert "not in the checkpoint" not in caplog.text

    def test_not_registered_here(self, saved, tmp_path):
        copy = changed(saved[0], tmp_path / "copy", modelhub_layers=[["lm_head", "test gone"]])
        with pytest.raises(ConfigError, match=r"there is no layer 'test gone'; registered: .*@modelhub.register"):
            load(copy)

    def test_damaged(self, saved, tmp_path):
        for kind, wrong in {"list": ["mlp"], "object": SAVED, "numbers": [["mlp", 3]]}.items():
            with pytest.raises(ConfigError, match="modelhub_layers must be"):
                load(changed(saved[0], tmp_path / kind, modelhub_layers=wrong))
        with pytest.raises(ConfigError, match="modelhub_attention must be"):
            load(changed(saved[0], tmp_path / "attention", modelhub_attention=["mine"]))
        copy = changed(saved[0], tmp_path / "copy")
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.layers.1.mlp.gain"]
        save_file(tensors, copy / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"missing: model.layers.1.mlp.gain"):  # and not made up
            load(copy)

    def test_no_gguf(self, saved, tmp_path):
        from modelhub.conversion import convert

        with pytest.raises(ConfigError, match="layers of its own"):
            convert(str(saved[0]), tmp_path / "model.gguf")


class TestOneFramework:
    LAYERS = {"mlp": "test torch mlp"}

    def test_on_its_own(self, tiny_preset):
        lm = load(tiny_preset, "torch", layers=self.LAYERS)
        assert_close(lm.logits(IDS), load(tiny_preset).logits(IDS))
        losses = trained(lm)
        assert losses[2] < losses[0]

    @pytest.mark.parametrize("name", OTHERS)
    def test_on_the_others(self, tiny_preset, name):
        with pytest.raises(ConfigError, match=f"'test torch mlp' was registered for torch alone.* {name}: use it with"):
            load(tiny_preset, name, layers=self.LAYERS)

    @pytest.mark.parametrize("name", OTHERS)
    def test_moving_leaves_the_model_usable(self, tiny_preset, name):
        lm = load(tiny_preset, "torch", layers=self.LAYERS)
        before = lm.logits(IDS)
        with pytest.raises(ConfigError, match="registered for torch alone"):
            lm.to(backend=name)
        with pytest.raises(ConfigError, match="registered for torch alone"):
            custom.check_backend(lm.backbone.model, name)
        custom.check_backend(lm.backbone.model, "torch")
        assert lm.backend == "torch" and np.array_equal(lm.logits(IDS), before)

    def test_a_subclass_written_with_xp(self):
        @register("layer", "torch mlp for all")
        @dataclass
        class ForAll(TorchMLP):
            __call__ = SameMLP.__call__

        width = nn.Linear.abstract(4, 4)
        custom.check_backend(Holder([ForAll(width, width, width)]), "jax")
        for module in (Holder([TorchMLP(width, width, width)]), TorchMLP(width, width, width)):
            with pytest.raises(ConfigError, match="torch alone"):
                custom.check_backend(module, "jax")

    def test_functions(self, tiny_preset):
        @register("attention", "torch attention", backend="torch")
        def attention(q, k, v, mask, scale):
            raise AssertionError

        @register("loss", "torch loss", backend="torch")
        def loss(logits, labels):
            raise AssertionError

        @register("sampler", "torch sampler", backend="torch")
        def sampler(logits):
            raise AssertionError

        for given in (attention, "test torch attention"):
            with pytest.raises(ConfigError, match="the attention 'test torch attention' was registered for torch"):
                load(tiny_preset, attention=given)
        lm = load(tiny_preset)
        for given in (loss, "test torch loss"):
            with pytest.raises(ConfigError, match="registered for torch alone"):
                lm.compile(loss=given)
        for given in (sampler, "test torch sampler"):
            with pytest.raises(ConfigError, match="registered for torch alone"):
                lm.generate("In", 1, sampler=given)
        assert lm.generate("In", 1) is not None

    def test_attention_moves_with_the_model(self, tiny_preset):
        lm = load(tiny_preset, "torch", attention="test softmax")
        before = lm.logits(IDS)
        assert_close(lm.to(backend="numpy").logits(IDS), before)
        assert lm.backbone.xp.own_attention.function is softmax_attention

    def test_attention_of_one_framework_does_not(self, tiny_preset):
        def bare(q, k, v, mask, scale):
            import torch

            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

        lm = load(tiny_preset, "torch", attention=bare)
        before = lm.logits(IDS)
        assert_close(before, load(tiny_preset).logits(IDS))
        with pytest.raises(ConfigError, match="was given for torch, and the model is on its way to numpy"):
            lm.to(backend="numpy")
        assert np.array_equal(lm.logits(IDS), before)
        register("attention", "bare")(bare)  # a name does not make it one for all
        with pytest.raises(ConfigError, match="was given for torch, and the model is on its way to numpy"):
            lm.to(backend="numpy")

    @pytest.mark.parametrize("registered", [False, True])
    def test_a_loss_of_one_framework_does_not_move(self, tiny_preset, registered):
        def plain(logits, labels):
            import torch

            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        lm = load(tiny_preset, "torch")
        losses = trained(lm, register("loss", "plain")(plain) and "test plain" if registered else plain)
        assert losses == pytest.approx(trained(load(tiny_preset, "torch")), rel=1e-4)
        with pytest.raises(ConfigError, match="the loss function .*plain was given for torch, .* to numpy.*compile"):
            lm.to(backend="numpy")
        assert lm.backend == "torch"
        lm.compile(loss="test focal")
        assert lm.to(backend="numpy").backend == "numpy"


@dataclass
class Holder(nn.Module):
    parts: list


def broken(name, returns, replacing=lambda cls, old: cls(old.gate_proj)):
    """A registered layer whose call returns what `returns` makes of (xp, x)."""
    members = {
        "__annotations__": {"gate_proj": Any}, "replacing": classmethod(replacing),
        "__call__": lambda self, xp, x: returns(xp, x),
    }  # fmt: skip
    return register("layer", name)(dataclass(type(name.title().replace(" ", ""), (nn.Module,), members)))


class TestMistakes:
    def test_register(self):
        with pytest.raises(ConfigError, match="kind must be one of layer, attention"):
            modelhub.register("optimizer", "mine")
        with pytest.raises(ConfigError, match="name of a loss must be a text, got ''"):
            modelhub.register("loss", "")
        with pytest.raises(ValueError, match="unknown backend 'mxnet'"):
            modelhub.register("loss", "mine", backend="mxnet")
        with pytest.raises(ConfigError, match="expected a function .xp, logits, labels., got 3"):
            modelhub.register("loss", "mine")(3)
        with pytest.raises(ConfigError, match="the family 'mine': it lacks Model, names"):
            modelhub.register("family", "mine")(type("Family", (), {"Config": 1}))

    def test_layers(self):
        class NoModule:
            pass

        class NoDataclass(nn.Module):
            weight: Any

        class FieldsForgotten(SameMLP):
            gain: Any

        @dataclass
        class NoReplacing(nn.Module):
            weight: Any

        @dataclass
        class NoCall(nn.Module):
            weight: Any

            @classmethod
            def replacing(cls, old):
                return cls(old.weight)

        for cls, message in (
            (NoModule, "inherits from modelhub.nn.Module"), (NoDataclass, "put @dataclass below"),
            (FieldsForgotten, "put @dataclass below"), (NoReplacing, "it has no replacing: add a classmethod"),
            (NoCall, "it has no __call__"), (cross_entropy, "inherits from modelhub.nn.Module"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=message):
                register("layer", "mistake")(cls)
        with pytest.raises(ConfigError, match="there is no layer 'test mistake'"):
            custom.find("layer", "test mistake")

    def test_a_name_twice(self):
        def make(result):
            @register("loss", "rerun")
            def rerun(xp, logits, labels):
                return result

            return rerun

        make(1)
        latest = make(2)  # the same definition, run again
        assert custom.find("loss", "test rerun") is latest
        register("loss", "rerun")(latest)
        with pytest.raises(ConfigError, match=r"there is a loss 'test rerun' already, .*make.<locals>.rerun; take"):
            register("loss", "rerun")(cross_entropy)
        register("sampler", "rerun")(second)  # another kind

    def test_unknown_names(self, tiny_preset):
        with pytest.raises(ConfigError, match=r"no layer 'nope'; registered: .*'test same mlp'"):
            load(tiny_preset, layers={"mlp": "nope"})
        with pytest.raises(ConfigError, match="no attention 'nope'"):
            load(tiny_preset, attention="nope")
        lm = load(tiny_preset)
        with pytest.raises(ConfigError, match="no loss 'nope'"):
            lm.compile(loss="nope")
        with pytest.raises(ConfigError, match="no sampler 'nope'"):
            lm.generate("In", 1, sampler="nope")

    def test_arguments(self, tiny_preset):
        """Told when they are given, and not at first use."""
        with pytest.raises(ConfigError, match=r"cannot be called as fn\(q, k, v, mask, scale=scale\).*\(xp, q, k"):
            load(tiny_preset, attention=lambda q, k, v: q)
        lm = load(tiny_preset)
        with pytest.raises(ConfigError, match=r"cannot be called as fn\(logits, labels\), .*missing a required"):
            lm.compile(loss=lambda xpx, logits, labels: logits)
        with pytest.raises(ConfigError, match=r"cannot be called as fn\(xp, logits, uniform\)"):
            lm.generate("In", 1, sampler=lambda xp, logits: logits)
        with pytest.raises(ConfigError, match=r"cannot be called as fn\(logits\)"):
            lm.generate("In", 1, sampler=lambda logits, uniform: logits)

    def test_what_the_model_reads(self, tiny_preset):
        """The scale of the embeddings, and a tied head, want the table."""

        @register("layer", "nameless table")
        @dataclass
        class Table(nn.Module):
            table: Any

            @classmethod
            def replacing(cls, old):
                return cls(old.weight)

            def __call__(self, xp, ids):
                return xp.embedding(self.table, ids)

        with pytest.raises(
            ConfigError, match=r"\('test nameless table' for 'embed_tokens'\) raised AttributeError: .*wei"
        ):
            load(tiny_preset, layers={"embed_tokens": "test nameless table"})

    def test_patterns(self, tiny_preset):
        with pytest.raises(ConfigError, match=r"'ffn' means no layer.*model.layers.\*.mlp, model.layers.\*.mlp.gate"):
            load(tiny_preset, layers={"ffn": "test same mlp"})
        for layers in ({"mlp": SameMLP}, ["mlp"]):
            with pytest.raises(ConfigError, match="layers must be {pattern: name of a registered layer}"):
                load(tiny_preset, layers=layers)

    @pytest.mark.parametrize("name", ["numpy", "torch"])
    def test_what_layers_return(self, tiny_preset, name):
        wrong = {
            "another shape": (
                lambda xp, x: x[..., :1],
                r"returned shape \(1, 2, 1\), float32, and .*GatedMLP.*\(1, 2, 32",
            ),
            "another dtype": (lambda xp, x: xp.cast(x, "float16"), "returned shape .*, float16, and .*, float32: the"),
            "a tuple": (lambda xp, x: (x, x), "returned a tuple"),
            "an error": (lambda xp, x: x.nothing, "place of model.layers.0.mlp.*__call__ raised AttributeError"),
        }
        for kind, (returns, message) in wrong.items():
            broken(kind, returns)
            with pytest.raises(ConfigError, match=message):
                load(tiny_preset, name, layers={"mlp": f"test {kind}"})

    def test_what_replacing_returns(self, tiny_preset):
        wrong = {
            "no module": (lambda cls, old: 3, "returned a int for model.layers.0.mlp"),
            "arrays": (lambda cls, old: cls(np.ones(3)), r"put a nn.Spec\(shape\) there"),
            "surprise": (lambda cls, old: cls(old.nothing), "replacing raised AttributeError"),
        }
        for kind, (replacing, message) in wrong.items():
            broken(kind, lambda xp, x: x, replacing)
            with pytest.raises(ConfigError, match=message):
                load(tiny_preset, layers={"mlp": f"test {kind}"})

    def test_a_head_of_another_size(self, tiny_preset):
        broken("narrow head", lambda xp, x: x, lambda cls, old: cls(nn.Spec((3,))))
        with pytest.raises(ConfigError, match=r"lm_head returned shape \(1, 2, 32\).*shape \(1, 2, 400\)"):
            load(tiny_preset, layers={"lm_head": "test narrow head"})

    def test_what_attention_returns(self, tiny_preset):
        lm = load(tiny_preset, attention=lambda q, k, v, mask, scale: v)
        with pytest.raises(
            ConfigError, match=r"attention function .*lambda.* returned shape \(2, 2, 20, 8\) for queries"
        ):
            lm.logits(IDS)


class TestImages:
    PIXELS = {"pixel_values": np.random.default_rng(0).standard_normal((4, 3, 28, 28)).astype(np.float32)}
    DATA = np.random.default_rng(1).integers(0, 256, (4, 28, 28, 3)).astype(np.uint8), np.array([0, 1, 1, 0])

    def load(self, backend="numpy", **options):
        return ImageClassifier.from_preset("vit_tiny_fashion", backend=backend, device="cpu", **options)

    @each_backend
    def test_head_and_attention(self, name):
        layers = {"classifier": "test two-layer head"}
        wanted = self.load(layers=layers).logits(self.PIXELS)
        found = self.load(name, layers=layers, attention="test softmax")
        assert_close(found.logits(self.PIXELS), wanted)
        assert np.abs(wanted - self.load().logits(self.PIXELS)).max() > 0.1

    def test_a_loss_of_torchs_own(self):
        from torch.nn.functional import cross_entropy as theirs

        found = []
        for loss in (None, lambda logits, labels: theirs(logits, labels, reduction="none")):
            clf = self.load("torch")
            clf.compile(learning_rate=1e-3, loss=loss)
            found.append(clf.fit(self.DATA, steps=2, batch_size=4, verbose=False).history["loss"])
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4)

    def test_the_card_and_attention(self, tmp_path):
        clf = self.load(layers={"classifier": "test two-layer head"}, attention="test halved")
        clf.save_to_preset(tmp_path / "saved")
        again = self.again(tmp_path / "saved", "numpy")
        assert np.array_equal(again.logits(self.PIXELS), clf.logits(self.PIXELS))
        card = (tmp_path / "saved/README.md").read_text()
        assert "library_name: modelhub" in card and "the attention `test halved`" in card and "AutoModel" not in card

    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize("frozen", [True, False])
    def test_fit(self, name, frozen, tmp_path):
        clf = self.load(name, labels=["left", "right"], layers={"classifier": "test two-layer head"})
        clf.compile(learning_rate=1e-2 if frozen else 1e-3, loss="test cross entropy")
        history = clf.fit(self.DATA, epochs=4, batch_size=4, freeze_backbone=frozen, verbose=False)
        assert history.history["loss"][-1] < history.history["loss"][0]
        logits = clf.logits(self.PIXELS)
        clf.save_to_preset(tmp_path / "saved")
        again = self.again(tmp_path / "saved", name)
        assert_close(again.logits(self.PIXELS), logits, 1e-6)
        assert again.labels == ["left", "right"]

    def again(self, folder, name):
        return ImageClassifier.from_preset(folder, backend=name, device="cpu")

    def test_an_adapter_holds_the_new_head(self, tmp_path):
        clf = self.load("torch", layers={"classifier": "test two-layer head"})
        clf.enable_lora(rank=2)
        before = clf.params["classifier.inner.weight"].clone()
        clf.fit(self.DATA, batch_size=4, verbose=False)
        assert (clf.params["classifier.inner.weight"] != before).any()
        clf.save_adapter(tmp_path / "adapter")
        again = self.load("torch", layers={"classifier": "test two-layer head"})
        again.load_adapter(tmp_path / "adapter")
        assert_close(again.logits(self.PIXELS), clf.logits(self.PIXELS), 1e-6)

    def test_a_wrong_head(self):
        broken("narrow classifier", lambda xp, x: x, lambda cls, old: cls(nn.Spec((3,))))
        with pytest.raises(ConfigError, match=r"classifier returned shape \(1, 96\)"):
            self.load(layers={"classifier": "test narrow classifier"}, num_classes=3)


@register("family", "llama")  # "test llama": a name of its own
class Family:
    """Llama under another model_type."""

    Model, names = llama.Model, staticmethod(llama.names)

    @dataclass
    class Config(llama.Config):
        @classmethod
        def from_hf(cls, data):
            found = super().from_hf(data | {"model_type": "llama"})
            found.model_type = data["model_type"]
            return found

        def to_hf(self):
            self.model_type = "llama"
            data = super().to_hf()
            self.model_type = "test llama"
            return data | {"model_type": "test llama"}


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    from tiny_families import CONFIGS, write_preset

    folder = tmp_path_factory.mktemp("family")
    ours = write_preset(folder / "llama", CONFIGS["llama"])
    mine = changed(ours, folder / "mine", model_type="test llama")
    return ours, mine


class TestFamily:
    @each_backend
    def test_loads(self, presets, name):
        ours, mine = (load(folder, name) for folder in presets)
        assert type(mine.config) is Family.Config
        assert_close(mine.logits(IDS), ours.logits(IDS), 1e-6)

    def test_trains_and_saves(self, presets, tmp_path):
        lm = load(presets[1], "torch", layers={"mlp": "test small mlp"})
        losses = trained(lm)
        assert losses[2] < losses[0]
        lm.enable_lora(rank=2)
        lm.save_to_preset(tmp_path / "saved")
        assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "test llama"
        assert_close(load(tmp_path / "saved").logits(IDS), lm.logits(IDS))

    def test_known(self, monkeypatch):
        assert family_of("test llama") is Family and "test llama" in family_names()
        with pytest.raises(ConfigError, match="'nope' is not supported; supported: .*test llama"):
            family_of("nope")
        monkeypatch.setattr(custom, "_registered", list(custom._registered))
        modelhub.register("family", "gemma")(Family)
        with pytest.raises(ConfigError, match="'gemma' was registered, and is one of modelhub's"):
            family_of("gemma")


@pytest.mark.parametrize("task", [CausalLM, Backbone, ImageClassifier])
def test_fastest_is_measured(tiny_preset, monkeypatch, task):
    from modelhub.bench import compare as bench

    asked = []

    def fastest(preset, **options):
        asked.append((str(preset), options["task"], options["device"], options["dtype"]))
        return "numpy"

    monkeypatch.setattr(bench, "fastest", fastest)
    preset = "vit_tiny_fashion" if task is ImageClassifier else str(tiny_preset)
    found = task.from_preset(preset, backend="fastest", device="cpu", dtype="float32")
    assert getattr(found, "backbone", found).xp.name == "numpy"
    assert asked == [(preset, getattr(task, "task", "backbone"), "cpu", "float32")]
