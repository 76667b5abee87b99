"""A complete tiny Gemma 3 preset: config, random weights, a SentencePiece tokenizer trained on a few lines."""

import io
import json
from pathlib import Path

import sentencepiece
from safetensors.numpy import save_file

from modelhub.core.tree import flatten, initial_value
from modelhub.families import gemma

LINES = [
    "The river runs past the old mill and under the bridge.",
    "In the morning the baker opens the shop and the smell of bread fills the street.",
    "She wrote the letter twice, then burned both copies and went for a walk.",
    "Numbers such as 12, 365 and 1024 are written with digits.",
    "If it rains tomorrow, we shall stay at home and read.",
] * 20

CONFIG = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 400, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "sliding_window": 8, "max_position_embeddings": 128, "query_pre_attn_scalar": 8, "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def write_preset(folder: Path, config: dict = CONFIG, scale: float = 0.3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    skeleton = gemma.Model.abstract(gemma.Config.from_hf(config))
    weights = {name: initial_value(name, spec, 0) for name, spec in flatten(skeleton).items()}
    # Larger than at the start of training, so that the answers are not all the same token.
    save_file({name: w * (scale / 0.02) for name, w in weights.items()}, folder / "model.safetensors")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True})
    )
    return folder
