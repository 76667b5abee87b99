"""Adapters on CausalLM: the same numbers as PEFT in both directions, merging, switching, and what users do wrong."""

import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft_parity import IDS, assert_close, base_model, peft_logits
from safetensors.numpy import load_file
from tiny_preset import CONFIG, write_preset

from modelhub import CausalLM
from modelhub.core.backends import installed
from modelhub.errors import CheckpointError, ConfigError, InputError
from modelhub.hub.adapters import read_adapter, write_adapter

PROMPT = "In the morning"
CASES = {
    "lora": {"r": 4, "lora_alpha": 10, "lora_dropout": 0.5},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": "all-linear"},
    "rslora-patterns": {
        "r": 4, "use_rslora": True, "target_modules": r".*layers\.\d\.(mlp\.up|mlp\.down|self_attn\.k)_proj",
        "alpha_pattern": {"1.mlp.up_proj": 20, "down_proj": 1.5}, "rank_pattern": {"0.mlp.up_proj": 6},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made_by_peft(tiny_preset, tmp_path_factory):
    """{case: folder, model, logits} of PEFT adapters in which nothing is zero."""
    made = {}
    for name, options in CASES.items():
        torch.manual_seed(1)
        config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | options)
        model = peft.get_peft_model(base_model(tiny_preset), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.mul_(1.3) if "magnitude" in key else parameter.normal_(0.0, 0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = SimpleNamespace(folder=folder, model=model, logits=peft_logits(model))
    return made


@pytest.fixture(scope="module")
def base_logits(tiny_preset):
    return peft_logits(base_model(tiny_preset))


@pytest.fixture(params=installed())
def lm(request, tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend=request.param, device="cpu")


@pytest.fixture
def plain(tiny_preset):
    """For what does not depend on the backend."""
    return CausalLM.from_preset(str(tiny_preset), backend="numpy")


def weights(lm):
    return {name: np.array(lm.backbone.xp.get(x)) for name, x in lm.params.items()}


def shake(lm):
    """Give the active adapter values as training would."""
    draw = np.random.default_rng(5)
    xp = lm.backbone.xp
    lm.params = lm.params | {
        name: xp.array(np.asarray(xp.get(x)) * 1.2 + draw.normal(0.0, 0.2, x.shape), "float32")
        for name, x in lm.params.items()
        if ".lora." in name
    }


class TestPeft:
    @pytest.mark.parametrize("case", CASES)
    def test_its_adapters_give_its_logits_also_merged(self, lm, made_by_peft, base_logits, case):
        theirs = made_by_peft[case]
        before = weights(lm)
        lm.load_adapter(theirs.folder, "theirs")
        assert np.abs(theirs.logits - base_logits).max() > 0.1 * np.abs(base_logits).max()
        assert_close(lm.logits(IDS), theirs.logits)
        lm.merge_lora()
        assert not any(".lora." in name for name in lm.params)
        assert_close(lm.logits(IDS), theirs.logits)
        lm.unmerge_lora()
        after = weights(lm)
        assert all(after[name].tobytes() == before[name].tobytes() for name in before)
        lm.set_adapter(None)
        assert lm.params.keys() == before.keys()
        assert_close(lm.logits(IDS), base_logits)

    @pytest.mark.parametrize(
        "options",
        [
            {"rank": 4, "alpha": 10.0, "dropout": 0.5},
            {"rank": 3, "targets": ["self_attn.o_proj", "model.layers.1.mlp.*"], "use_rslora": True, "use_dora": True},
        ],
        ids=["default", "rslora-dora-some"],
    )
    def test_it_loads_ours(self, lm, tiny_preset, base_logits, tmp_path, options):
        lm.enable_lora(**options)
        assert_close(lm.logits(IDS), base_logits)  # a new adapter changes nothing
        shake(lm)
        ours = lm.logits(IDS)
        assert np.abs(ours - base_logits).max() > 0.1 * np.abs(base_logits).max()
        lm.save_adapter(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(base_model(tiny_preset), tmp_path / "adapter")
        assert_close(ours, peft_logits(loaded))
        assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_preset)
        saved = weights(lm)
        lm.load_adapter(tmp_path / "adapter", "again")
        found = weights(lm)
        assert found.keys() == saved.keys() and all(found[name].tobytes() == saved[name].tobytes() for name in saved)

    def test_what_it_saved_is_saved_alike(self, plain, made_by_peft, tmp_path):
        for case, theirs in made_by_peft.items():
            plain.load_adapter(theirs.folder, case)
            plain.save_adapter(tmp_path / case)
            found, wanted = read_adapter(tmp_path / case), read_adapter(theirs.folder)
            assert found.tensors.keys() == wanted.tensors.keys()
            assert all(np.array_equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)
            for key in ("rank", "alpha", "dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
                assert getattr(found, key) == getattr(wanted, key)

    def test_generate(self, lm, made_by_peft):
        theirs = made_by_peft["dora"]
        lm.load_adapter(theirs.folder)
        prompt = torch.tensor([lm.tokenizer.encode(PROMPT)])
        with torch.no_grad():
            wanted = theirs.model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        found = lm.generate(PROMPT, max_new_tokens=12, logprobs=True).token_ids
        assert found == [token for token in wanted.tolist() if token != lm.tokenizer.eos_token_id]

    def test_training_counts_as_it_does(self, plain, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        plain.enable_lora(rank=4, targets="all-linear")
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        trainable, total = peft.get_peft_model(base_model(plain.preset), config).get_nb_trainable_parameters()
        plain.summary()
        shown = capsys.readouterr().out
        assert f"{trainable:,}" in shown and f"{total:,}" in shown
        assert plain.backbone.num_parameters == total
        assert sum(math.prod(plain.params[name].shape) for name in plain.backbone.trainable_names()) == trainable


class TestSeveral:
    def test_by_name(self, plain, made_by_peft, base_logits):
        assert plain.load_adapter(made_by_peft["lora"].folder, "first") == "first"
        assert plain.load_adapter(made_by_peft["dora"].folder) == made_by_peft["dora"].folder.name
        plain.enable_lora(rank=1, name="new")
        for name, wanted in (
            ("first", made_by_peft["lora"].logits), (made_by_peft["dora"].folder.name, made_by_peft["dora"].logits),
            ("new", base_logits), (None, base_logits), ("first", made_by_peft["lora"].logits),
        ):  # fmt: skip
            plain.set_adapter(name)
            assert_close(plain.logits(IDS), wanted)

    def test_what_training_made_of_one_is_kept(self, plain, made_by_peft):
        plain.enable_lora(rank=2, name="mine")
        shake(plain)
        wanted = plain.logits(IDS)
        plain.load_adapter(made_by_peft["dora"].folder, "theirs")
        plain.set_adapter("mine")
        np.testing.assert_array_equal(plain.logits(IDS), wanted)

    def test_a_merged_one_gives_way(self, plain, made_by_peft):
        before = weights(plain)
        plain.load_adapter(made_by_peft["lora"].folder, "first")
        plain.merge_lora()
        plain.load_adapter(made_by_peft["dora"].folder, "second")
        assert_close(plain.logits(IDS), made_by_peft["dora"].logits)
        plain.merge_lora()
        plain.set_adapter("first")
        assert_close(plain.logits(IDS), made_by_peft["lora"].logits)
        plain.merge_lora()
        plain.set_adapter(None)
        assert all(np.array_equal(x, before[name]) for name, x in weights(plain).items())

    def test_a_merged_one_can_be_saved(self, plain, made_by_peft, tmp_path):
        plain.load_adapter(made_by_peft["dora"].folder)
        plain.merge_lora()
        plain.save_adapter(tmp_path / "adapter")
        wanted = read_adapter(made_by_peft["dora"].folder).tensors
        assert all(np.array_equal(x, wanted[name]) for name, x in read_adapter(tmp_path / "adapter").tensors.items())


class TestWholeModels:
    def test_a_merged_preset_has_one_embedding(self, lm, tiny_preset, made_by_peft, tmp_path):
        theirs = made_by_peft["dora"]
        lm.load_adapter(theirs.folder)
        lm.save_to_preset(tmp_path / "merged")
        saved = load_file(tmp_path / "merged" / "model.safetensors")
        assert saved.keys() == load_file(tiny_preset / "model.safetensors").keys()
        assert "lm_head.weight" not in saved
        assert lm.has_adapter
        merged = base_model(tmp_path / "merged")
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_close(peft_logits(merged), theirs.logits)

    def test_an_untied_head(self, tmp_path):
        preset = write_preset(tmp_path / "untied", CONFIG | {"tie_word_embeddings": False})
        untied = CausalLM.from_preset(str(preset), backend="numpy")
        untied.enable_lora(rank=2, targets=["lm_head", "q_proj"])
        shake(untied)
        untied.save_adapter(tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(base_model(preset), tmp_path / "adapter")
        assert_close(untied.logits(IDS), peft_logits(theirs))
        untied.merge_lora()
        assert_close(untied.logits(IDS), peft_logits(theirs))


class TestWrongInput:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"rank": 0}, "rank must be a whole number, 1 or more, got 0"),
            ({"rank": 2.5}, "rank must be a whole number"),
            ({"rank": 17}, r"rank 17 is larger than .* layers, the first model.layers.0.self_attn.v_proj \(16 x 32\)"),
            ({"alpha": 0}, "alpha must be above 0"),
            ({"alpha": math.nan}, "alpha must be above 0"),
            ({"targets": ["embed_tokens"]}, r"the table of embeddings.*modules_to_save=\['embed_tokens'\]"),
            ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
            ({"dropout": -0.1}, "dropout must be"),
            ({"targets": ["q_proj", "query"]}, "'query' matches no linear layer.*down_proj, gate_proj, k_proj, o_proj"),
            (
                {"targets": ["q_proj"], "modules_to_save": ["head"]},
                "no module 'head' with .*; there are down_proj, embed",
            ),
            ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "lm_head would be trained as a whole and have"),
            ({"targets": []}, "targets is empty"),
        ],
        ids=str,
    )
    def test_of_enable_lora(self, plain, options, message):
        with pytest.raises(ConfigError, match=message):
            plain.enable_lora(**options)
        assert not plain.has_adapter and not plain.backbone.adapters
        plain.enable_lora()

    def test_names(self, plain, made_by_peft):
        plain.enable_lora()
        with pytest.raises(InputError, match="there is an adapter 'default' already"):
            plain.enable_lora(rank=2)
        with pytest.raises(InputError, match="there is an adapter 'default' already"):
            plain.load_adapter(made_by_peft["lora"].folder, "default")
        with pytest.raises(InputError, match="no adapter 'other'; there are default"):
            plain.set_adapter("other")

    def test_without_an_adapter(self, plain, tmp_path):
        for call in (plain.merge_lora, lambda: plain.save_adapter(tmp_path / "new")):
            with pytest.raises(InputError, match="there is no active adapter"):
                call()
        with pytest.raises(InputError, match="no adapter is merged"):
            plain.unmerge_lora()
        assert not (tmp_path / "new").exists()

    def test_merging_twice(self, plain):
        plain.enable_lora()
        plain.merge_lora()
        with pytest.raises(InputError, match="'default' is merged already"):
            plain.merge_lora()
        plain.unmerge_lora()
        with pytest.raises(InputError, match="no adapter is merged"):
            plain.unmerge_lora()

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"hidden_size": 48}, r"for another base model.*\n  .*q_proj.lora.lora_A is \(4, 48\), this model needs"),
            ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "layers that this model does not have"),
        ],
    )
    def test_an_adapter_for_another_base(self, plain, tmp_path, config, message):
        other = CausalLM.from_preset(str(write_preset(tmp_path / "other", CONFIG | config)), backend="numpy")
        other.enable_lora(rank=4)
        other.save_adapter(tmp_path / "adapter")
        plain.enable_lora(name="mine")
        with pytest.raises(CheckpointError, match=message):
            plain.load_adapter(tmp_path / "adapter")
        assert plain.backbone.active_adapter == "mine" and list(plain.backbone.adapters) == ["mine"]

    def test_an_adapter_with_half_a_dora(self, plain, made_by_peft, tmp_path):
        files = read_adapter(made_by_peft["dora"].folder)
        files.tensors.pop("model.layers.0.mlp.up_proj.lora.lora_magnitude_vector")
        with pytest.raises(CheckpointError, match="lacks lora_magnitude_vector"):
            write_adapter(tmp_path / "new", files)

    def test_saving_over_a_model(self, plain, tiny_preset):
        plain.enable_lora()
        with pytest.raises(InputError, match="is not an adapter's folder: it holds config.json"):
            plain.save_adapter(tiny_preset)
