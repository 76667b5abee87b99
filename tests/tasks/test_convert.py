"""Converting: nothing is lost on the way, transformers reads the result, and what GGUF cannot say is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from tiny_families import CONFIGS, GEMMA, KINDS, LLAMA3_ROPE, SIZES, write_preset, write_tokenizer
from tiny_preset import LINES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from modelhub import CausalLM
from modelhub.conversion import checking, convert
from modelhub.errors import CheckpointError, ConfigError, DownloadError, InputError, TokenizerError
from modelhub.families import family_of
from modelhub.hub import gguf_writer
from modelhub.hub import model_folder as saving
from modelhub.hub.checkpoint import open_folder
from modelhub.hub.gguf import open_gguf
from modelhub.hub.provenance import Provenance
from modelhub.model import options as loading
from modelhub.processing.tokenizer import Tokenizer as OurTokenizer

IDS = [[int(i) for i in np.random.default_rng(0).integers(4, 400, 40)]]
TEXTS = ["Hello  world", "  a\n\n\nb", "🚀 3.14", "x" + " " * 40 + "y", "<bos>hi<|end|> <b>", "漢字"]


def load(path):
    return CausalLM.from_preset(path, backend="numpy")


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    folder = write_preset(tmp_path / name, CONFIGS[name], "gemma" if "gemma" in name else "smollm")
    first = load(folder)
    second = load(convert(folder, tmp_path / "a.gguf", "float32"))
    third = load(convert(tmp_path / "a.gguf", tmp_path / "back"))
    assert second.params.keys() == first.params.keys()
    for key, x in first.params.items():
        np.testing.assert_allclose(second.params[key], x, atol=1e-6, err_msg=key)
        np.testing.assert_array_equal(third.params[key], second.params[key], err_msg=key)
    kept = {key: value for key, value in vars(first.config).items() if key not in ("extra", "model_type")}
    for config in (second.config, third.config):
        assert {key: getattr(config, key) for key in kept} == kept
    assert np.abs(third.logits(IDS) - first.logits(IDS)).max() < 1e-3
    for text in TEXTS:
        assert first.tokenizer.encode(text) == second.tokenizer.encode(text) == third.tokenizer.encode(text)


# What it does not read of GGUF files (scales of queries, soft caps, scaled rope) is what it takes without them.
USUAL = GEMMA | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8}
READABLE = {
    "llama": CONFIGS["llama"],
    "mistral": CONFIGS["mistral"],
    "gemma2": USUAL | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": USUAL | {"model_type": "gemma3_text", "num_hidden_layers": 7},
}


@pytest.mark.parametrize("name", READABLE)
def test_transformers_reads_the_gguf_file(tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_preset(tmp_path / name, READABLE[name], "gemma" if "gemma" in name else "llama-bpe")
    convert(folder, tmp_path / "a.gguf", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits.float().numpy()
    ours = load(folder).logits(IDS)
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * np.abs(ours).max())


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_come_back(tmp_path, kind):
    write_tokenizer(tmp_path, kind)
    first = OurTokenizer.from_folder(tmp_path)
    first.chat_template = "{{ messages }} 🚀"
    metadata = first.to_gguf(first.vocab_size + 7)
    second = OurTokenizer.from_gguf(metadata)
    for text in TEXTS if kind != "llama2-json" else ["Hello  world", "🚀 3.14", "漢字"]:
        assert second.encode(text) == first.encode(text), text
        assert second.decode(first.encode(text)) == first.decode(first.encode(text)), text
    assert second.vocab_size == first.vocab_size + 7 and second.special_ids == first.special_ids
    assert (second.chat_template, second.add_bos) == (first.chat_template, first.add_bos)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(second, f"{name}_token_id") == getattr(first, f"{name}_token_id")
    assert OurTokenizer.from_gguf(second.to_gguf(second.vocab_size)).encode(TEXTS[0]) == first.encode(TEXTS[0])


# The sizes that decide what is written, of models as they are published.
PUBLISHED = {
    "gemma_2b": {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1},
    "gemma2_9b": {"model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8},
    "gemma2_27b": {"model_type": "gemma2", "hidden_size": 4608, "num_hidden_layers": 46, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144},
    "gemma3_1b": {"model_type": "gemma3_text", "hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512},
    "gemma3_27b": {
        "model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32, "head_dim": 128,
        "query_pre_attn_scalar": 168, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "llama2_7b": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "llama3.1_8b": {
        "model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": LLAMA3_ROPE,
    },
    "llama3.2_1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
    },
    "mistral_7b_v0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "max_position_embeddings": 32768},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_come_back(name):
    family = family_of(PUBLISHED[name]["model_type"])
    config = family.Config.from_hf(PUBLISHED[name])
    metadata, tensors = config.to_gguf()
    if not config.tie_word_embeddings:
        tensors |= {"output.weight": None}
    again = family.Config.from_gguf(SimpleNamespace(metadata=metadata, tensors=tensors, read=tensors.get))
    left, right = vars(again), vars(config)
    assert left.pop("model_type").replace("mistral", "llama") == right.pop("model_type").replace("mistral", "llama")
    for key in set(right) - {"extra", "hidden_act", "query_pre_attn_scalar"}:
        assert left[key] == right[key], key
    assert not hasattr(config, "query_scale") or again.query_scale == config.query_scale


REFUSED = {
    "gelu": (GEMMA | {"model_type": "gemma3_text", "hidden_activation": "gelu"}, "activation gelu_pytorch_tanh, not gelu"),
    "relu": (SIZES | {"model_type": "llama", "hidden_act": "gelu"}, "activation silu, not gelu"),
    "scale": (GEMMA | {"model_type": "gemma2", "query_pre_attn_scalar": 100}, r"queries scaled by 1 / sqrt\(32\), not 0.1"),
    "bias": (GEMMA | {"model_type": "gemma3_text", "attention_bias": True}, "no biases"),
    "head": (SIZES | {"model_type": "gemma", "tie_word_embeddings": False}, "the embedding as its head"),
    "no caps": (GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": None}, "both soft caps"),
    "cap": (GEMMA | {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "no soft cap of attention"),
    "rope": (GEMMA | {"model_type": "gemma2", "rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e4}}, "no Llama 3 rope"),
    "two": (GEMMA | {"model_type": "gemma2", "attention_bias": True, "hidden_activation": "silu"}, "not silu; no biases"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, name):
    config, message = REFUSED[name]
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "config.json").write_text(json.dumps(config))
    (tmp_path / "preset" / "model.safetensors").write_bytes(b"never looked at")
    write_tokenizer(tmp_path / "preset", "gemma")
    with pytest.raises(ConfigError, match=f"llama.cpp's .* has .*{message}.*Hugging Face folder"):
        convert(tmp_path / "preset", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def unigram(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="unigram",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip


def bytes_missing(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), vocab_size=200, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip


def changed(change, kind="gpt-2"):
    def write(folder):
        write_tokenizer(folder, kind)
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        change(backend)
        backend.save(str(folder / "tokenizer.json"))

    return write


def without_merges(folder):
    """Pieces that are never put together: SentencePiece would."""
    write_tokenizer(folder, "gemma-json")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:-5]
    (folder / "tokenizer.json").write_text(json.dumps(data))


WORDS = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
AROUND = processors.TemplateProcessing(single="<|turn|> $A", special_tokens=[("<|turn|>", 4)])
TOKENIZERS = {
    "unigram": (unigram, "is not BPE"),
    "bytes": (bytes_missing, "lacks the 256 bytes"),
    "words": (changed(lambda t: setattr(t, "pre_tokenizer", WORDS)), "cuts text into words by .*Punctuation"),
    "split": (changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "gemma-json"), "Whitespace"),
    "around": (changed(lambda t: setattr(t, "post_processor", AROUND)), r"puts the ids \[4\] around a text"),
    "strips": (changed(lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)])), "'<x>' takes the spaces"),
    "merges": (without_merges, "does not merge"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_llama_cpp_cannot_follow_are_refused(tmp_path, name):
    write, message = TOKENIZERS[name]
    write(tmp_path)
    with pytest.raises(TokenizerError, match=f"other ids.*{message}.*Hugging Face folder"):
        OurTokenizer.from_folder(tmp_path).to_gguf(512)


def test_more_tokens_than_rows(tmp_path):
    write_tokenizer(tmp_path, "smollm")  # 400 of the training, and <b>
    tokenizer = OurTokenizer.from_folder(tmp_path)
    assert len(tokenizer.to_gguf(400)["tokenizer.ggml.tokens"]) == 400  # an added token is left out
    with pytest.raises(TokenizerError, match="has 390 rows, too few for 10 tokens"):
        tokenizer.to_gguf(390)


def test_the_dtype_is_the_sources_unless_asked(tmp_path):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")
    for dtype, wanted in (("bfloat16", "bfloat16"), ("float16", "float16"), ("q8_0", "float32")):
        back = convert(convert(folder, tmp_path / f"{dtype}.gguf", dtype), tmp_path / dtype)
        with open_folder(back) as checkpoint:
            assert {info.dtype for info in checkpoint.tensors.values()} == {wanted}
    with (
        open_gguf(tmp_path / "float16.gguf") as first,
        open_gguf(convert(tmp_path / "float16.gguf", tmp_path / "second.gguf")) as second,
    ):
        assert first.tensors == second.tensors
        assert all(np.array_equal(first.read(name), second.read(name)) for name in first.tensors)
    for source, dtype, kind in (
        ("bfloat16", None, "F16"),
        ("bfloat16", "bfloat16", "BF16"),
        ("float16", "q8_0", "Q8_0"),
    ):
        path = convert(tmp_path / source, tmp_path / "again.gguf", dtype, force=True)
        with open_gguf(path) as file, open_gguf(tmp_path / f"{source}.gguf") as before:
            assert file.tensors["blk.0.attn_q.weight"].dtype == kind
            if kind == "BF16":
                for name, info in file.tensors.items():
                    rounded = 0 if len(info.shape) > 1 else 2**-8
                    np.testing.assert_allclose(file.read(name), before.read(name), rtol=rounded)
    assert (
        open_folder(convert(folder, tmp_path / "half", "float16")).read("model.norm.weight", "float16").dtype
        == "float16"
    )


def test_a_window_does_not_shorten_the_context(tmp_path):
    """llama.cpp is told that the context is the window; we know better."""
    config = CONFIGS["mistral"] | {"sliding_window": 16}
    folder = write_preset(tmp_path / "mistral", config, "smollm")
    again = load(convert(folder, tmp_path / "a.gguf", "float32"))
    assert (again.config.sliding_window, again.config.max_position_embeddings) == (16, 128)
    with open_gguf(tmp_path / "a.gguf") as file:
        assert file.metadata["llama.context_length"] == 16
    np.testing.assert_allclose(again.logits(IDS), load(folder).logits(IDS), atol=1e-3)


ROPES = {
    "low": LLAMA3_ROPE | {"low_freq_factor": 2.0},
    "original": LLAMA3_ROPE | {"original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("name", ROPES)
def test_a_rope_that_could_not_be_found_again_is_refused(tmp_path, name):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama3"] | {"rope_scaling": ROPES[name]}, "llama-bpe")
    with pytest.raises(ConfigError, match="modelhub reads again.*low_freq_factor=.*Hugging Face folder"):
        convert(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def metadata(**changes):
    """Of a small Llama, with other values under keys whose dots are __."""
    config = family_of("llama").Config.from_hf(SIZES | {"model_type": "llama", "tie_word_embeddings": True})
    data, tensors = config.to_gguf()
    data |= {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    return family_of("llama").Config.from_gguf(SimpleNamespace(metadata=data, tensors=tensors, read=None))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope__dimension_count": 16}, {"attention__value_length": 16}, {"attention__scale": 0.01}, {"logit_scale": 0.1},
        {"expert_count": 8}, {"attention__causal": False}, {"final_logit_softcapping": 30.0}, {"rope__dimension_count": 32.0},
        {"some__array": np.array([0, 1])}, {"rope__dimension_count": np.array([32, 32])}, {"rope__freq_base_swa": 1e4},
    ],
)  # fmt: skip
def test_keys_of_gguf_that_change_the_maths(changes):
    (key,) = changes
    with pytest.raises(ConfigError, match=f"may change the maths.*llama.{key.replace('__', '.')}="):
        metadata(**changes)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [  # True: looks at the window only
        (None, [True] * 5 + [False, True]), (3, [True, True, False] * 2 + [True]),
        (np.array([True, False] * 3 + [True]), [True, False] * 3 + [True]),
    ],
)  # fmt: skip
def test_which_layers_of_gguf_are_local(pattern, wanted):
    config = family_of("gemma3_text").Config.from_hf(GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7})
    data, key = config.to_gguf()[0], "gemma3.attention.sliding_window_pattern"
    assert key not in data  # llama.cpp's default is that of config.json
    data |= {} if pattern is None else {key: pattern}
    again = family_of("gemma3").Config.from_gguf(SimpleNamespace(metadata=data, tensors={}, read=None))
    assert [kind == "sliding_attention" for kind in again.layer_types] == wanted
    assert again.to_gguf()[0].get(key) == (None if pattern is None else wanted)


def test_a_pattern_of_no_layers_is_refused():
    data = family_of("gemma3").Config.from_hf(GEMMA | {"model_type": "gemma3_text"}).to_gguf()[0]
    data |= {"gemma3.attention.sliding_window_pattern": 0}
    with pytest.raises(ConfigError, match="sliding_window_pattern=0"):
        family_of("gemma3").Config.from_gguf(SimpleNamespace(metadata=data, tensors={}, read=None))


def test_keys_of_gguf_that_change_nothing():
    plain = metadata()
    assert metadata(
        expert_count=0, attention__causal=True, rope__scaling__finetuned=True, logit_scale=0.0, other="", rope__scale_linear=0.0,
        tensor_data_layout="Meta AI original pth", array=np.zeros(3),
    ) == plain  # fmt: skip
    for scaled in (
        {"rope__scale_linear": 4.0},
        {"rope__scaling__factor": 4.0},
    ):  # an older key, and no type: llama.cpp's rules
        assert metadata(**scaled).rope == metadata(rope__scaling__type="linear", rope__scaling__factor=4.0).rope
        assert metadata(**scaled).rope.factor == 4.0
    assert metadata(rope__scaling__type="none", rope__scaling__factor=4.0).rope == plain.rope
    with pytest.raises(ConfigError, match="factor must be a number above 0"):
        metadata(rope__scaling__factor=np.array([1.0, 2.0]))


@pytest.mark.parametrize(("template", "end"), [(True, "<|end|>"), (False, "<|turn|>")])
def test_the_end_of_a_turn_is_the_templates(tmp_path, template, end):
    """Without one, the first at which generation stops besides the end of the text."""
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")
    tokenizer = load(folder).tokenizer
    stops = [tokenizer.token_to_id(token) for token in ("<eos>", "<|turn|>", "<unk>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    if not template:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with open_gguf(convert(folder, tmp_path / "a.gguf")) as file:
        assert file.metadata["tokenizer.ggml.eot_token_id"] == tokenizer.token_to_id(end)


def test_what_the_source_is_asked_for(tmp_path, monkeypatch):
    calls = []

    def resolve(name, **options):
        calls.append((name, options))
        raise DownloadError("no network here")

    monkeypatch.setattr(loading, "resolve", resolve)
    options = {"revision": "v1", "offline": True, "token": "t", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DownloadError):
        convert("hf://me/a", tmp_path / "a.gguf", **options)
    assert calls == [("hf://me/a", options | {"weights": True})]


def test_an_adapter_is_merged(tmp_path):
    folder = write_preset(tmp_path / "gemma3", CONFIGS["gemma3"])
    lm = load(folder)
    lm.enable_lora(rank=2, targets="all-linear")
    lm.params = {name: x + 0.1 if "lora_B" in name else x for name, x in lm.params.items()}
    lm.save_adapter(tmp_path / "adapter")
    for target in ("a.gguf", "merged"):
        merged = load(convert(folder, tmp_path / target, "float32", adapter=tmp_path / "adapter"))
        assert not merged.has_adapter
        assert np.abs(merged.logits(IDS) - lm.logits(IDS)).max() < 1e-3 * np.abs(lm.logits(IDS)).max()


def test_targets_that_are_there(tmp_path):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")
    path = convert(folder, tmp_path / "new" / "a.gguf")
    for target in (path, folder):
        with pytest.raises(InputError, match=f"{target} is there already.*--force"):
            convert(folder, target)
    assert convert(folder, path, "float32", force=True) == path
    assert open_gguf(path).tensors["token_embd.weight"].dtype == "F32"
    (tmp_path / "plain.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="plain.txt is a file; give a folder"):
            convert(folder, tmp_path / "plain.txt", force=force)
        with pytest.raises(InputError, match="x.gguf cannot be written.*another place"):
            convert("no such preset", tmp_path / "plain.txt" / "x.gguf", force=force)  # before anything is loaded
    assert (tmp_path / "plain.txt").read_text() == "mine"
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        convert(folder, tmp_path / "folder.gguf")
    with pytest.raises(InputError, match="q8_0, q4_0, q4_1, q4_k_m, q5_k_m, q6_k for a GGUF file, got 'q3_k'"):
        convert(folder, tmp_path / "b.gguf", "q3_k")
    with pytest.raises(InputError, match="got 'q4_km'; did you mean q4_k_m"):
        convert(folder, tmp_path / "b.gguf", "q4_km")
    with pytest.raises(InputError, match="for a folder, got 'q8_0'"):
        convert(folder, tmp_path / "b", "q8_0")


@pytest.mark.slow
def test_the_command(tmp_path):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")

    def run(*arguments):
        command = [sys.executable, "-c", "from modelhub.cli import main; main()", "convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})

    target = tmp_path / "a.gguf"
    done = run(folder, target, "--dtype", "q8_0")
    assert done.stdout.strip() == str(target) and done.returncode == 0, done.stderr
    assert f"{folder}: 0.8 MB; a.gguf: 0.2 MB" in done.stderr
    assert load(target).tokenizer.chat_template
    again = run(folder, target)
    assert again.returncode == 1 and "is there already" in again.stderr and "Traceback" not in again.stderr
    assert run(folder, target, "--force").returncode == 0
    assert "has no revisions" in run(folder, target, "--force", "--revision", "v1").stderr
    assert run(folder, target, "--force", "--offline").returncode == 0


class TestReadAgain:
    """What was written takes its place once it was read again and found to be what was to be written."""

    @pytest.fixture
    def folder(self, tmp_path):
        return write_preset(tmp_path / "gemma3", CONFIGS["gemma3"])

    def spoil(self, monkeypatch):
        """One weight in a hundred thousand is another one on the disk."""
        encoded, saved = gguf_writer._encoded, saving.save_tensors

        def other(gguf, theirs, x, *more):
            return encoded(gguf, theirs, changed(x) if theirs == "blk.1.ffn_up.weight" else x, *more)

        def others(shapes, read, *more):
            return saved(
                shapes, lambda n: changed(read(n)) if n == "model.layers.1.mlp.up_proj.weight" else read(n), *more
            )

        def changed(x):
            x = np.array(x)
            x[3, 5] = x[3, 5] * 2 + 1
            return x

        monkeypatch.setattr(gguf_writer, "_encoded", other)
        monkeypatch.setattr(saving, "save_tensors", others)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_k_m", "q4_1"])
    @pytest.mark.parametrize("target", ["a.gguf", "folder"])
    def test_other_weights(self, folder, tmp_path, monkeypatch, target, dtype):
        if dtype.startswith("q") and target == "folder":
            pytest.skip("folders have floats")
        path = convert(folder, tmp_path / target, dtype)
        before = {file: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
        self.spoil(monkeypatch)
        with pytest.raises(
            CheckpointError, match=r"(?s)weights: model.layers.1.mlp.up_proj.weight differs by more than .*as it was"
        ):
            convert(folder, path, dtype, force=True)
        assert all(file.read_bytes() == content for file, content in before.items())
        with pytest.raises(CheckpointError, match="is not what was to be written"):
            convert(folder, tmp_path / f"new-{target}", dtype)
        assert {file.name for file in tmp_path.iterdir()} == {"gemma3", target}

    def test_with_an_adapter(self, folder, tmp_path, monkeypatch):
        lm = load(folder)
        lm.enable_lora(rank=2, targets=["up_proj", "lm_head"])
        lm.params = {name: x + 0.1 if "lora_B" in name else x for name, x in lm.params.items()}
        lm.save_adapter(tmp_path / "adapter")
        for target in ("a.gguf", "folder"):
            found = load(convert(folder, tmp_path / target, "float32", adapter=tmp_path / "adapter"))
            assert np.abs(found.logits(IDS) - lm.logits(IDS)).max() < 1e-3 * np.abs(lm.logits(IDS)).max()
        self.spoil(monkeypatch)
        with pytest.raises(CheckpointError, match="up_proj.weight differs"):
            convert(folder, tmp_path / "b.gguf", adapter=tmp_path / "adapter")

    def test_other_configs_tokens_and_templates(self, folder, tmp_path):
        lm, path = load(folder), convert(folder, tmp_path / "a.gguf")

        def check(dtype="float16"):
            checking.check_written(path, lm.backbone, lm.tokenizer, dtype, path)

        check()
        lm.backbone.config = dataclasses.replace(lm.config, rms_norm_eps=1e-5)
        with pytest.raises(CheckpointError, match=r"config: rms_norm_eps is 1e-06, not 1e-05"):
            check()
        lm.backbone.config = dataclasses.replace(lm.config, rms_norm_eps=1e-6, hidden_activation="gelu_new")
        check()  # another name of the same
        lm.tokenizer.chat_template += " "
        with pytest.raises(CheckpointError, match="the chat template is another one"):
            check()
        lm = load(write_preset(tmp_path / "other", CONFIGS["gemma3"], "smollm"))
        with pytest.raises(
            CheckpointError, match=r"(?s)tokenizer: .* has the ids \[.*weights|tokenizer: .* has the ids"
        ):
            check()

    def test_what_cannot_be_read_again(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(OurTokenizer, "from_gguf", classmethod(lambda cls, metadata: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            convert(folder, tmp_path / "a.gguf")
        assert not (tmp_path / "a.gguf").exists() and not list(tmp_path.glob(".a*"))


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    """llama.cpp loads none."""
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "gpt-2")
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="merges nothing, and llama.cpp"):
        convert(folder, tmp_path / "a.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.ggfu", "did you mean m.gguf"), ("m.gguff", "did you mean m.gguf"), ("m.onx", "did you mean m.onnx"),
        ("m.zip", "no .zip files are written"), ("m.tar", "no .tar files"), ("m.safetensors", "no .safetensors files"),
        ("m.onnx", "written by modelhub.to_onnx"),
    ],
)  # fmt: skip
def test_names_that_are_slips(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        convert("no such preset", tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama-3.2", "qwen2.5-0.5b", "my.model", "v1.0", "m.zip"])
def test_names_of_folders(tmp_path, name):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")
    if name == "m.zip":
        (tmp_path / name).mkdir()  # somebody's folder
    assert (convert(folder, tmp_path / name) / "config.json").is_file()


def test_generation_settings_come_back(tmp_path, caplog):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")
    asked = {
        "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05,
        "eos_token_id": [1, 3], "no_repeat_ngram_size": 3,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(asked))
    first = load(folder)
    second = load(convert(folder, tmp_path / "a.gguf"))
    third = load(convert(tmp_path / "a.gguf", tmp_path / "back"))
    assert "a.gguf does not say" in caplog.text and "no_repeat_ngram_size=3" in caplog.text
    assert first.stop_ids == second.stop_ids == third.stop_ids == {1, 3, 5}
    del asked["no_repeat_ngram_size"], asked["eos_token_id"]
    for lm in (second, third):
        assert {key: lm.generation_config[key] for key in asked} == asked
        assert lm.generate("In the", 12, seed=4) == second.generate("In the", 12, seed=4)


def test_licence_and_base_go_with_the_file(tmp_path, caplog):
    folder = write_preset(tmp_path / "llama", CONFIGS["llama"], "smollm")
    lm = load(folder)
    lm.backbone.weights.describe(provenance=Provenance(base_model="me/base", licence="apache-2.0"))
    lm.save_to_preset(tmp_path / "told")
    (tmp_path / "told" / "LICENSE").write_text("terms")
    second = load(convert(tmp_path / "told", tmp_path / "a.gguf"))
    assert second.provenance.licence == "apache-2.0"
    assert "LICENSE go with every copy" in caplog.text
    with open_gguf(tmp_path / "a.gguf") as file:
        assert file.metadata["general.base_model.0.repo_url"] == "https://huggingface.co/me/base"
        assert file.metadata["general.license"] == "apache-2.0"
