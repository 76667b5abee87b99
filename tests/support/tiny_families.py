"""Tiny presets of every family with every kind of tokenizer: sizes that llama.cpp accepts, all weights random."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from safetensors.numpy import save_file
from tiny_preset import LINES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from modelhub.core.tree import flatten, initial_value
from modelhub.families import family_of
from modelhub.interop.conformance import FAMILIES
from modelhub.processing.tokenizer_gguf import LLAMA3_WORDS, QWEN2_WORDS

VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    """The case of `modelhub conformance` in these sizes, as a config.json; changes: other keys, ... for none."""
    case = FAMILIES[family]
    kind = getattr(transformers, case.model).config_class.model_type
    config = (
        case.config | {key: size for key, size in SIZES.items() if key != "num_hidden_layers"} | {"model_type": kind}
    )
    config |= {"query_pre_attn_scalar": SIZES["head_dim"]} if "query_pre_attn_scalar" in config else {}
    config |= {"rms_norm_eps": ...} | changes  # the model_type's own
    return {key: value for key, value in config.items() if value is not ...}


GEMMA = tiny("gemma2", attn_logit_softcapping=..., final_logit_softcapping=..., model_type=...)
GEMMA3 = {"rope_parameters": ..., "sliding_window_pattern": ...}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": tiny("gemma"),
    "gemma2": tiny("gemma2"),
    "gemma3": tiny("gemma3", **GEMMA3, num_hidden_layers=7, rope_local_base_freq=500.0),
    "gemma3_other_layers": tiny("gemma3", **GEMMA3 | {"sliding_window_pattern": 2}),
    "gemma3_linear_rope": tiny(
        "gemma3", **GEMMA3, num_hidden_layers=6, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "gemma3_own_head": tiny("gemma3", **GEMMA3, tie_word_embeddings=False),
    "llama": tiny("llama", rms_norm_eps=1e-5),
    "llama3": tiny(
        "llama3", tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, rope_parameters=...,
        max_position_embeddings=131072,
    ),
    "llama_biases": tiny("llama_biases"),
    "llama_linear_rope": tiny("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "mistral": tiny("mistral", sliding_window=None),
}  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn|>", "<|end|>")
KINDS = ("gemma", "gemma-json", "spaced", "llama2-json", "gpt-2", "smollm", "llama-bpe", "qwen2")


def write_preset(folder: Path, config: dict[str, Any], tokenizer: str = "gemma") -> Path:
    """A Hugging Face folder; tokenizer: one of KINDS."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    family = family_of(config["model_type"])
    skeleton = family.Model.abstract(family.Config.from_hf(config))
    weights = {}
    for name, spec in flatten(skeleton).items():
        # norms and biases start at 0 or 1, where a mistake would not be seen
        noise = initial_value(name, type(spec)(spec.shape), 0)
        weights[name] = 8 * noise if len(spec.shape) > 1 else initial_value(name, spec, 0) + 10 * noise
    save_file(weights, folder / "model.safetensors")
    write_tokenizer(folder, tokenizer)
    return folder


def write_tokenizer(folder: Path, kind: str) -> None:
    if kind in ("gemma", "gemma-json", "spaced", "llama2-json"):
        _sentencepiece(folder, dummy_prefix=kind == "spaced")
    else:
        _byte_level(folder, kind)
    named = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=False))
    config = named | {"add_bos_token": True, "chat_template": TEMPLATE}
    if kind.endswith("-json"):  # as transformers 5 writes it, and older versions did: no tokenizer.model
        transformers.GemmaTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    if kind == "llama2-json":
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece(folder: Path, dummy_prefix: bool) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        control_symbols=list(SPECIAL[4:]), user_defined_symbols=["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>"],
        add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _byte_level(folder: Path, kind: str) -> None:
    regex = kind in ("gpt-2", "smollm")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    before: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    if not regex:
        words = LLAMA3_WORDS if kind == "llama-bpe" else QWEN2_WORDS
        before = pre_tokenizers.Split(Regex(words), "isolated")
    backend = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    backend.pre_tokenizer = plain if kind == "gpt-2" else pre_tokenizers.Sequence([before, plain])
    backend.normalizer = normalizers.NFC() if kind == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken("<b>", normalized=False, special=False)])
    if kind == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.save(str(folder / "tokenizer.json"))
