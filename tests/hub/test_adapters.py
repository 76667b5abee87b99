"""Adapter folders against PEFT: what it saves is read, what is written it loads; and folders that are not right."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelhub.errors import CheckpointError, InputError
from modelhub.hub import adapters, files
from modelhub.hub.adapters import CONFIG, WEIGHTS, AdapterFiles, read_adapter, write_adapter

SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "max_position_embeddings": 64,
}  # fmt: skip
PATTERNS = {
    # In alphabetical order: the first that matches counts, and PEFT sorts them when it saves.
    "rank_pattern": {r"layers\.[12]\.self_attn\.q_proj": 3, "model.layers.0.self_attn.v_proj": 5, "v_proj": 2},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 12, "q_proj": 6.5},
}
CASES = {
    "default": {},
    "rslora": {"use_rslora": True, "r": 5, "lora_alpha": 12},
    "dora": {"use_dora": True, "lora_dropout": 0.1},
    "patterns": PATTERNS | {"r": 4, "lora_alpha": 16},
    "rslora-dora-patterns": PATTERNS | {"use_rslora": True, "use_dora": True},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "regex": {"target_modules": r".*layers\.\d\.(self_attn\.o|mlp\.up)_proj"},
    "some-layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def base_model(family):
    import torch
    import transformers

    torch.manual_seed(0)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL, head_dim=12))


def peft_model(family="llama", **options):
    """A PEFT model whose every adapter weight is random."""
    import peft
    import torch

    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | options)
    model = peft.get_peft_model(base_model(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(1.0, 0.5)
    return model


def peft_layers(model):
    """{module: (tensors, scaling)}, as PEFT computes with them."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            vector = layer.lora_magnitude_vector
            kinds = {"lora_A": layer.lora_A.default.weight, "lora_B": layer.lora_B.default.weight}
            kinds |= {"lora_magnitude_vector": vector.default.weight} if vector else {}
            tensors = {kind: tensor.detach().float().numpy() for kind, tensor in kinds.items()}
            found[name] = tensors, layer.scaling["default"]
    return found


def assert_same(files, layers):
    assert {f"{module}.lora.{kind}" for module, (kinds, _) in layers.items() for kind in kinds} == files.tensors.keys()
    assert sorted(files.targets) == sorted(layers)
    for module, (kinds, scaling) in layers.items():
        for kind, theirs in kinds.items():
            ours = files.tensors[f"{module}.lora.{kind}"]
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, theirs)
        rank = files.rank_pattern.get(module, files.rank)
        alpha = files.alpha_pattern.get(module, files.alpha)
        assert alpha / (math.sqrt(rank) if files.use_rslora else rank) == pytest.approx(scaling)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["llama", "gemma3"])
def family(request):
    return request.param


@pytest.fixture
def saved(tmp_path):
    """A folder as PEFT leaves it."""
    peft_model(use_dora=True, base_model_name_or_path="").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(folder, **settings):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder


def rename(folder, how):
    save_file({how(name): x for name, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


def adapter(**options):
    """A rank 2 adapter of one module, (6, 4)."""
    defaults = {
        "rank": 2, "alpha": 4.0, "dropout": 0.0, "use_rslora": False, "use_dora": False, "targets": ["q_proj"],
        "rank_pattern": {}, "alpha_pattern": {}, "base": "",
        "tensors": {"q_proj.lora.lora_A": np.ones((2, 4)), "q_proj.lora.lora_B": np.ones((6, 2))},
    }  # fmt: skip
    return AdapterFiles(**defaults | options)


class TestPeft:
    def test_what_peft_saves_is_read(self, tmp_path, case, family):
        model = peft_model(family, **case)
        model.peft_config["default"].base_model_name_or_path = ""
        model.save_pretrained(tmp_path)
        files = read_adapter(tmp_path)
        assert_same(files, peft_layers(model))
        assert files.base == "" and files.dropout == case.get("lora_dropout", 0.0)
        assert (files.use_dora, files.use_rslora) == (case.get("use_dora", False), case.get("use_rslora", False))

    def test_peft_loads_what_is_written(self, tmp_path, case, family, recwarn):
        import peft

        model = peft_model(family, **case)
        model.save_pretrained(tmp_path / "theirs")
        write_adapter(tmp_path / "ours", read_adapter(tmp_path / "theirs"))
        recwarn.clear()
        loaded = peft.PeftModel.from_pretrained(base_model(family), tmp_path / "ours")
        assert not [w for w in recwarn if "missing" in str(w.message) or "Unexpected" in str(w.message)]
        theirs, ours = model.state_dict(), loaded.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(theirs[name].equal(ours[name]) for name in theirs)
        assert {m: s for m, (_, s) in peft_layers(model).items()} == {m: s for m, (_, s) in peft_layers(loaded).items()}

    def test_the_files_are_as_peft_writes_them(self, tmp_path):
        model = peft_model(use_dora=True, r=4, lora_alpha=16)
        model.peft_config["default"].base_model_name_or_path = "me/base"
        model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        files = read_adapter(tmp_path / "theirs")
        assert files.base == "me/base"
        files.targets = ["v_proj", "q_proj"]
        write_adapter(tmp_path / "ours", files)
        theirs, ours = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
        theirs["target_modules"].sort()
        assert ours == {key: theirs[key] for key in ours}
        assert type(ours["lora_alpha"]) is int
        assert not any(
            theirs[key] for key in theirs.keys() - ours.keys() - {"peft_version", "megatron_core", "qalora_group_size"}
        )
        theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
        assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_read_as_float32(self, tmp_path, dtype):
        import torch

        model = peft_model(use_dora=True).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path)
        assert_same(read_adapter(tmp_path), peft_layers(model))

    @pytest.mark.parametrize(
        "how",
        [
            lambda name: name.removeprefix("base_model.model."),
            lambda name: name.replace(".weight", ".default.weight"),
            lambda name: name.replace("magnitude_vector", "magnitude_vector.default"),
            lambda name: name.replace("magnitude_vector", "magnitude_vector.default.weight"),
        ],
    )
    def test_older_names(self, saved, how):
        wanted = read_adapter(saved).tensors
        found = read_adapter(rename(saved, how)).tensors
        assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)

    def test_a_config_of_the_first_versions(self, saved):
        tensors = {name: x for name, x in load_file(saved / WEIGHTS).items() if "magnitude" not in name}
        save_file(tensors, saved / WEIGHTS)
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "merge_weights": False, "enable_lora": None}
        (saved / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
        files = read_adapter(saved)
        assert (files.rank, files.alpha, files.dropout, files.use_dora) == (8, 16, 0.0, False)
        assert (files.rank_pattern, files.alpha_pattern, files.base) == ({}, {}, "")

    def test_patterns_as_in_peft(self, tmp_path):
        peft_model(**PATTERNS, r=4, lora_alpha=16).save_pretrained(tmp_path)
        files = read_adapter(tmp_path)
        q, v = ({f"model.layers.{i}.self_attn.{name}": x for i, x in enumerate(xs)} for name, xs in (
            ("q_proj", [4, 3, 3]), ("v_proj", [5, 2, 2])))  # fmt: skip
        assert files.rank_pattern == {name: rank for name, rank in (q | v).items() if rank != 4}
        assert files.alpha_pattern == dict(zip(q, [12, 6.5, 6.5], strict=True))


class TestRefused:
    @pytest.mark.parametrize(
        "settings",
        [
            {"fan_in_fan_out": True}, {"bias": "all"}, {"bias": "lora_only"},
            {"layer_replication": [[0, 2], [1, 3]]}, {"lora_bias": True}, {"alora_invocation_tokens": [1, 2]},
            {"megatron_config": {"a": 1}}, {"trainable_token_indices": [5]}, {"use_qalora": True},
            {"target_parameters": ["mlp.w"]}, {"arrow_config": {"top_k": 3}}, {"use_bdlora": {"nblocks": 2}},
            {"kasa_config": {"beta": 1}}, {"velora_config": {"a": 1}}, {"monteclora_config": {"a": 1}},
            {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
            {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "lora_ga"},
            {"a_later_invention": 3},
        ],
        ids=lambda settings: "-".join(map(str, next(iter(settings.items())))),
    )  # fmt: skip
    def test_settings_that_change_the_maths(self, saved, settings):
        key, value = next(iter(settings.items()))
        with pytest.raises(CheckpointError, match="merge_and_unload") as error:
            read_adapter(change(saved, **settings))
        assert f"{key!r}: {value!r}" in str(error.value)

    def test_all_of_them_at_once(self, saved):
        rename(change(saved, bias="all", lora_bias=True), lambda name: name.replace("1.self_attn.v_proj", "1.conv"))
        rename(saved, lambda name: name.replace("conv.lora_A", "conv.lora_C"))
        with pytest.raises(
            CheckpointError, match=r"(?s)'bias': 'all'.*'lora_bias': True.*1.conv.lora_C.weight': not LoRA"
        ):
            read_adapter(saved)

    @pytest.mark.parametrize("init", [False, "eva", "orthogonal", "mica"])
    def test_other_ways_to_start_are_fine(self, saved, init):
        assert read_adapter(change(saved, init_lora_weights=init, loftq_config={"loftq_bits": 4})).rank == 8

    def test_other_methods(self, saved):
        for peft_type in ("ADALORA", None, ["LORA"]):
            with pytest.raises(CheckpointError, match="peft_type .*; modelhub has LORA"):
                read_adapter(change(saved, peft_type=peft_type))

    @pytest.mark.parametrize("options", [
        {"target_modules": ["embed_tokens", "q_proj"]}, {"bias": "all"}, {"lora_bias": True},
        {"trainable_token_indices": [1, 2]}, {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2], [1, 3]]},
    ], ids=str)  # fmt: skip
    def test_as_peft_saves_them(self, tmp_path, options):
        import peft

        config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | options)
        peft.get_peft_model(base_model("llama"), config).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="does more than modelhub has"):
            read_adapter(tmp_path)

    def test_whole_modules(self, tmp_path, caplog):
        model = peft_model(modules_to_save=["lm_head", "embed_tokens"])
        model.save_pretrained(tmp_path / "theirs")
        files = read_adapter(tmp_path / "theirs")
        head, table = (part.modules_to_save.default.weight.detach().numpy() for part in (
            model.get_base_model().lm_head, model.get_base_model().model.embed_tokens))  # fmt: skip
        assert files.whole.keys() == {"lm_head.weight", "model.embed_tokens.weight"} and not files.copies
        np.testing.assert_array_equal(files.whole["lm_head.weight"], head)
        np.testing.assert_array_equal(files.whole["model.embed_tokens.weight"], table)
        assert sorted(files.modules_to_save) == ["embed_tokens", "lm_head"]
        write_adapter(tmp_path / "ours", files)
        theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
        assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)
        assert "no such weights" not in caplog.text
        save_file({n: x for n, x in theirs.items() if "lora_" in n}, tmp_path / "theirs" / WEIGHTS)
        assert not read_adapter(tmp_path / "theirs").whole
        assert "should have its own embed_tokens, lm_head, and has no such weights" in caplog.text

    def test_copies_of_the_base_are_told_apart(self, tmp_path):
        model = peft_model(target_modules=["q_proj", "lm_head"])
        model.save_pretrained(tmp_path)
        files = read_adapter(tmp_path)
        assert files.whole.keys() == files.copies == {"lm_head.weight"}
        assert_same(files, peft_layers(model))

    @pytest.mark.parametrize("how", ["modules_to_save.default.", "modules_to_save.", ""])
    def test_spellings_of_whole_modules(self, saved, how):
        tensors = load_file(saved / WEIGHTS) | {f"base_model.model.score.{how}weight": np.ones((2, 32), np.float16)}
        save_file(tensors, saved / WEIGHTS)
        whole = read_adapter(change(saved, modules_to_save=["score", "classifier"])).whole
        assert [(name, x.shape, x.dtype) for name, x in whole.items()] == [("score.weight", (2, 32), np.float16)]

    def test_an_adapted_embedding_is_named(self, tmp_path):
        peft_model(target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="of a linear layer, but of an embedding; as one of modules_to_save"):
            read_adapter(tmp_path)

    def test_a_module_is_whole_or_adapted(self, tmp_path):
        with pytest.raises(CheckpointError, match="q_proj' is there as a whole, and has an adapter"):
            write_adapter(tmp_path / "new", adapter(whole={"q_proj.weight": np.ones((6, 4), np.float32)}))

    @pytest.mark.parametrize("revision", ["0123456789abcdef0123456789abcdef01234567", None])
    def test_the_revision_of_the_base(self, tmp_path, revision):
        write_adapter(tmp_path / "new", adapter(base="me/base", revision=revision))
        import peft

        assert peft.PeftConfig.from_pretrained(str(tmp_path / "new")).revision == revision
        assert read_adapter(tmp_path / "new").revision == revision

    def test_lm_head_without_its_copies(self, tmp_path):
        model = peft_model(target_modules=["q_proj", "lm_head"])
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        assert_same(read_adapter(tmp_path), peft_layers(model))

    def test_pickles(self, saved):
        (saved / WEIGHTS).rename(saved / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="pickle .*PeftModel.from_pretrained"):
            read_adapter(saved)

    def test_folders_of_something_else(self, tmp_path):
        with pytest.raises(CheckpointError, match="is not a folder"):
            read_adapter(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="expected adapter_config.json .* found an empty folder"):
            read_adapter(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="whole model, not an adapter.*from_preset"):
            read_adapter(tmp_path)


class TestDamage:
    def test_every_truncation_of_the_tensors(self, saved):
        whole = (saved / WEIGHTS).read_bytes()
        for size in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
            (saved / WEIGHTS).write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=WEIGHTS):
                read_adapter(saved)

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"\xff\xfe\x00", b"[" * 100_000, b'{"r": ' + b"9" * 5000])
    def test_a_config_that_is_no_object(self, saved, text):
        (saved / CONFIG).write_bytes(text)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_adapter(saved)

    def test_a_config_that_fills_the_memory(self, saved):
        os.truncate(saved / CONFIG, 1 << 40)
        with pytest.raises(CheckpointError, match="at most 10000000 bytes"):
            read_adapter(saved)

    @pytest.mark.parametrize(
        "settings",
        [
            {"r": 0}, {"r": -8}, {"r": True}, {"r": "8"}, {"r": 8.0}, {"r": 1 << 40}, {"lora_alpha": 0},
            {"lora_alpha": math.nan}, {"lora_alpha": math.inf}, {"lora_alpha": 10**400}, {"lora_dropout": 1.0},
            {"lora_dropout": "0.1"}, {"use_rslora": 1}, {"use_dora": "true"}, {"rank_pattern": [1]},
            {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": None}}, {"base_model_name_or_path": 7},
        ],
        ids=lambda settings: str(settings)[:30],
    )  # fmt: skip
    def test_values_that_make_no_sense(self, saved, settings):
        with pytest.raises(CheckpointError, match=f"\n  {next(iter(settings))}: expected .*, found"):
            read_adapter(change(saved, **settings))

    def test_all_values_at_once(self, saved):
        with pytest.raises(CheckpointError, match=r"\n  r: .*\n  lora_dropout: "):
            read_adapter(change(saved, r=0, lora_dropout=2))

    @pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "*"])
    def test_patterns_that_are_none(self, saved, pattern):
        with pytest.raises(CheckpointError, match="not a regular expression"):
            read_adapter(change(saved, rank_pattern={pattern: 4}))

    def test_another_rank_than_the_tensors_have(self, saved):
        with pytest.raises(CheckpointError, match=r"0.self_attn.q_proj': rank 4 by the config, 8 by the tensors\n"):
            read_adapter(change(saved, r=4))
        with pytest.raises(CheckpointError, match="rank 4 by the config") as error:
            read_adapter(change(saved, r=8, rank_pattern={r"layers\.1\.self_attn\.v_proj": 4}))
        assert str(error.value).count("by the config") == 1

    @pytest.mark.parametrize("change_tensors, message", [
        (lambda t: t.clear(), "there are no tensors"),
        (lambda t: t.pop("q.lora_A.weight"), "'q' lacks lora_A"),
        (lambda t: t.pop("q.lora_B.weight"), "'q' lacks lora_B"),
        (lambda t: t.update({"q.lora_B.weight": np.ones((6, 3))}), r"expected lora_A \(r, in\) and lora_B \(out, r\)"),
        (lambda t: t.update({"q.lora_A.weight": np.ones(8)}), r"found \(8,\) and \(6, 8\)"),
        (lambda t: t.update({"q.lora_A.weight": np.ones((8, 0))}), r"found \(8, 0\)"),
        (lambda t: t.update({"q.lora_magnitude_vector": np.ones(5)}), r"expected lora_magnitude_vector \(6,\), found \(5,\)"),
        (lambda t: t.pop("q.lora_magnitude_vector"), "'q' lacks lora_magnitude_vector, and use_dora is True"),
        (lambda t: t.update({"base_model.model.q.lora_A.weight": np.ones((8, 4))}), "holds 'q.lora.lora_A' twice"),
        (lambda t: t.update({"q.lora_embedding_A": np.ones((8, 4))}), "'q.lora_embedding_A': not LoRA or DoRA of a linear"),
        (lambda t: t.update({"q.lora_B.bias": np.ones(6)}), "the tensor 'q.lora_B.bias'"),
    ])  # fmt: skip
    def test_tensors_that_do_not_fit(self, saved, change_tensors, message):
        tensors = {
            "q.lora_A.weight": np.ones((8, 4)),
            "q.lora_B.weight": np.ones((6, 8)),
            "q.lora_magnitude_vector": np.ones(6),
        }
        save_file(tensors, saved / WEIGHTS)
        assert read_adapter(saved).tensors.keys() == {"q.lora.lora_A", "q.lora.lora_B", "q.lora.lora_magnitude_vector"}
        change_tensors(tensors)
        save_file(tensors, saved / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(saved)

    def test_a_vector_without_dora(self, saved):
        with pytest.raises(CheckpointError, match="has lora_magnitude_vector, and use_dora is False"):
            read_adapter(change(saved, use_dora=False))

    def test_errors_stay_short(self, saved):
        save_file({f"{'x' * 5000}{i}": np.ones(1) for i in range(100)}, saved / WEIGHTS)
        with pytest.raises(CheckpointError, match="and 80 more") as error:
            read_adapter(saved)
        assert len(str(error.value)) < 6000


class TestWriting:
    def test_an_adapter_is_replaced_as_a_whole(self, tmp_path):
        write_adapter(tmp_path / "deep" / "new", adapter(), lambda work: (work / "NOTICE").write_text("old") and None)
        (tmp_path / "deep" / "new" / "README.md").write_text("old")
        changed = adapter(alpha=0.5, alpha_pattern={"q_proj": 3.0}, base="me/base", dropout=0.25)
        write_adapter(tmp_path / "deep" / "new", changed)
        assert sorted(os.listdir(tmp_path / "deep" / "new")) == [CONFIG, WEIGHTS]
        assert os.listdir(tmp_path / "deep") == ["new"]
        found = read_adapter(tmp_path / "deep" / "new")
        assert (found.alpha, found.alpha_pattern, found.base, found.dropout) == (0.5, {"q_proj": 3}, "me/base", 0.25)

    def test_arrays_that_lie_otherwise_in_memory(self, tmp_path):
        a, b = np.arange(8.0).reshape(4, 2).T, np.arange(24, dtype=np.float16).reshape(6, 4)[:, ::2]
        write_adapter(tmp_path / "new", adapter(tensors={"q_proj.lora.lora_A": a, "q_proj.lora.lora_B": b}))
        found = read_adapter(tmp_path / "new").tensors
        np.testing.assert_array_equal(found["q_proj.lora.lora_A"], a)
        np.testing.assert_array_equal(found["q_proj.lora.lora_B"], b)

    @pytest.mark.parametrize("stranger", ["config.json", "model.safetensors", "notes.txt", ".git"])
    def test_other_folders_are_left_alone(self, tmp_path, stranger):
        (tmp_path / stranger).write_text("{}")
        with pytest.raises(InputError, match=f"not an adapter's folder: it holds {stranger}. Give a new or an empty"):
            write_adapter(tmp_path, adapter())
        assert os.listdir(tmp_path) == [stranger]

    def test_a_file_is_left_alone(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match="it holds a file"):
            write_adapter(tmp_path / "file", adapter())

    def test_an_empty_folder_and_a_link_to_one(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        write_adapter(tmp_path / "link", adapter())
        assert (tmp_path / "link").is_symlink()
        assert read_adapter(tmp_path / "real").rank == 2

    @pytest.mark.parametrize("at", ["save_arrays", "replace_folder"])
    def test_a_full_disk_leaves_the_old_one(self, tmp_path, monkeypatch, at):
        write_adapter(tmp_path / "new", adapter())

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(adapters if hasattr(adapters, at) else files, at, fail)
        with pytest.raises(CheckpointError, match="No space left on device.* as it was"):
            write_adapter(tmp_path / "new", adapter(alpha=9))
        assert read_adapter(tmp_path / "new").alpha == 4
        assert os.listdir(tmp_path) == ["new"]

    def test_what_does_not_fit_is_not_written(self, tmp_path):
        with pytest.raises(CheckpointError, match="rank 3 by the config"):
            write_adapter(tmp_path / "new", adapter(rank=3))
        assert not os.listdir(tmp_path)


def test_no_framework_is_needed(saved):
    code = (
        "import sys; from modelhub.hub.adapters import read_adapter, write_adapter\n"
        "write_adapter(sys.argv[2], read_adapter(sys.argv[1]))\n"
        "assert not {'torch', 'jax', 'tensorflow', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, saved, saved.with_name("copy")], check=True)
    assert read_adapter(saved.with_name("copy")).tensors.keys() == read_adapter(saved).tensors.keys()
