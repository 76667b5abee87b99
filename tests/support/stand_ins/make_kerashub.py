"""Tiny KerasHub presets, made by keras-hub itself: python make_kerashub.py FOLDER

Each preset lies in a folder of its name; beside it NAME.npz holds token ids (B, T) and keras-hub's float32 logits for
them, and NAME.json the ids that its tokenizer gives for TEXTS. Those of images: python make_kerashub.py FOLDER images;
NAME.npz holds pixels (B, H, W, C), features (B, T, D), and with a head logits (B, classes).
"""

import io
import json
import sys
from pathlib import Path

import numpy as np

LINES = [
    "The river runs past the old mill and under the bridge.",
    "In the morning the baker opens the shop and the smell of bread fills the street.",
    "She wrote the letter twice, then burned both copies and went for a walk.",
    "Numbers such as 12, 365 and 1024 are written with digits.",
    "If it rains tomorrow, we'll stay at home and read.",
]
TEXTS = LINES + [
    "", " ", "  two  spaces ", "\n\n\n", "\t\ttabs\n", "a" * 100, "1234567 12.5%", "naïve Ångström, ﬁne", "你好,世界。東京",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301 combining", "\u00a0nbsp\u3000wide\u200b", "def f(x):\n    return {'k': [x ** 2]}\n", "<b>x</b>",
    "it's IT'S we'll", "▁ literal ▁▁", " " * 20 + "x", "Привет, мир! שלום",
]  # fmt: skip
WINDOW = 8


def sentencepiece_model(control: dict[str, int], user_defined: list[str], **options) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    pieces = {f"{name}_piece": piece for name, piece in zip(("pad", "eos", "bos", "unk"), control, strict=True)}
    ids = {f"{name}_id": index for name, index in zip(("pad", "eos", "bos", "unk"), control.values(), strict=True)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=user_defined,
        minloglevel=2, **pieces, **ids, **options,
    )  # fmt: skip
    return model.getvalue()


def byte_level_vocabulary() -> tuple[dict[str, int], list[str]]:
    from keras_hub.src.tokenizers.byte_pair_tokenizer import SPLIT_PATTERN_TOKENIZERS
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT_PATTERN_TOKENIZERS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    vocabulary |= {token: len(vocabulary) + n for n, token in enumerate(special)}
    return vocabulary, [" ".join(pair) for pair in model["merges"]]


def randomise(backbone, seed: int) -> None:
    """Large weights, so that soft caps bite, and norms away from their start values."""
    generator = np.random.default_rng(seed)
    for weight in backbone.trainable_weights:
        spread = 0.3 if len(weight.shape) > 1 else 0.5
        start = weight.numpy().astype("float32") if len(weight.shape) == 1 else 0.0
        weight.assign(start + spread * generator.standard_normal(weight.shape).astype("float32"))


def main(folder: Path) -> None:
    import keras
    import keras_hub.models as kh

    common = {"num_query_heads": 4, "hidden_dim": 32, "intermediate_dim": 64, "dtype": "float32"}
    gemma = common | {"head_dim": 16, "num_key_value_heads": 1}
    gemma2 = gemma | {
        "num_layers": 3, "num_key_value_heads": 2, "use_post_ffw_norm": True, "use_post_attention_norm": True,
        "use_sliding_window_attention": True, "sliding_window_size": WINDOW,
    }  # fmt: skip
    gemma3 = gemma2 | {"num_layers": 7, "image_size": 16, "dtype": "bfloat16", "global_rope_scaling_factor": 8.0}
    caps = {"attention_logit_soft_cap": 5.0, "final_logit_soft_cap": 10.0}
    llama = common | {"num_layers": 2, "num_key_value_heads": 2, "layer_norm_epsilon": 1e-5}
    llama31 = {
        "rope_max_wavelength": 500_000, "rope_frequency_adjustment_factor": 8.0, "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0, "rope_pretraining_sequence_length": 16,
    }  # fmt: skip
    mistral = llama | {"sliding_window": WINDOW, "dropout": 0.1, "rope_max_wavelength": 1_000_000}

    gemma_model = sentencepiece_model(
        {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3},
        ["<img>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"],
        add_dummy_prefix=False,
    )  # fmt: skip
    llama_model = sentencepiece_model({"<pad>": -1, "</s>": 2, "<s>": 1, "<unk>": 0}, [])
    vocabulary, merges = byte_level_vocabulary()

    def task(kind: str, backbone, tokenizer):
        preprocessor = getattr(kh, f"{kind}CausalLMPreprocessor")(tokenizer=tokenizer, sequence_length=32)
        return getattr(kh, f"{kind}CausalLM")(backbone=backbone, preprocessor=preprocessor)

    def make(name: str, kind: str, tokenizer, arguments: dict, shards: float = 10) -> None:
        keras.utils.set_random_seed(0)
        size = 408  # larger than any of the vocabularies
        backbone = getattr(kh, f"{kind}Backbone")(vocabulary_size=max(size, tokenizer.vocabulary_size()), **arguments)
        randomise(backbone, len(name))
        preset = folder / name
        task(kind, backbone, tokenizer).save_to_preset(str(preset), max_shard_size=shards)
        if arguments["dtype"] != "float32":  # the stored weights, the maths in float32
            backbone = type(backbone).from_preset(str(preset), dtype="float32")
        ids = np.random.default_rng(1).integers(0, size, (2, 3 * WINDOW)).astype("int32")
        hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
        logits = keras.ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))
        np.savez(folder / f"{name}.npz", ids=ids, logits=logits)
        tokens = [[int(token) for token in tokenizer(text)] for text in TEXTS]
        (folder / f"{name}.json").write_text(json.dumps(tokens))

    make("gemma", "Gemma", kh.GemmaTokenizer(proto=gemma_model), gemma | {"num_layers": 2})
    make("gemma2", "Gemma", kh.GemmaTokenizer(proto=gemma_model), gemma2 | caps)
    make("gemma3", "Gemma3", kh.Gemma3Tokenizer(proto=gemma_model), gemma3, shards=4e-5)
    make("llama2", "Llama", kh.LlamaTokenizer(proto=llama_model), llama)
    make("llama3", "Llama3", kh.Llama3Tokenizer(vocabulary, merges), llama)
    make("llama31", "Llama3", kh.Llama3Tokenizer(vocabulary, merges), llama | llama31 | {"tie_word_embeddings": True})
    make("mistral", "Mistral", kh.MistralTokenizer(proto=llama_model), mistral)

    quantised = kh.GemmaBackbone(vocabulary_size=8, **gemma | {"num_layers": 1})
    quantised.quantize("int8")
    quantised.save_to_preset(str(folder / "int8"))
    bert = kh.BertBackbone(vocabulary_size=8, num_layers=1, num_heads=1, hidden_dim=8, intermediate_dim=8)
    bert.save_to_preset(str(folder / "bert"))


def images(folder: Path) -> None:
    import keras
    import keras_hub.models as kh
    from keras_hub.layers import ViTImageConverter

    plain = {
        "image_shape": (16, 16, 3), "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48,
        "dtype": "float32", "layer_norm_epsilon": 1e-3,
    }  # fmt: skip
    no_class_token = plain | {
        "image_shape": (16, 24, 1),
        "patch_size": (4, 8),
        "use_class_token": False,
        "num_layers": 1,
    }

    def make(name: str, arguments: dict, head: dict | None, shards: float = 10) -> None:
        keras.utils.set_random_seed(0)
        backbone = kh.ViTBackbone(**arguments)
        model = backbone
        height, width, channels = arguments["image_shape"]
        if head is not None:
            converter = ViTImageConverter(image_size=(height, width), scale=1 / 127.5, offset=-1.0)
            preprocessor = kh.ViTImageClassifierPreprocessor(image_converter=converter)
            model = kh.ViTImageClassifier(backbone=backbone, num_classes=3, preprocessor=preprocessor, **head)
        randomise(model, len(name))
        model.save_to_preset(str(folder / name), max_shard_size=shards)
        if arguments["dtype"] != "float32":  # the stored weights, the maths in float32
            model = type(model).from_preset(str(folder / name), dtype="float32")
            backbone = getattr(model, "backbone", model)
        pixels = np.random.default_rng(1).standard_normal((2, height, width, channels)).astype("float32")
        found = {"pixels": pixels, "features": keras.ops.convert_to_numpy(backbone(pixels))}
        if head is not None:
            found["logits"] = keras.ops.convert_to_numpy(model(pixels))
        np.savez(folder / f"{name}.npz", **found)

    dropout = {"dropout_rate": 0.1, "attention_dropout": 0.2}
    make("vit", plain | dropout, {"dropout": 0.5}, shards=2e-5)
    make("vit_backbone", plain, None)
    make("vit_bfloat16", plain | {"dtype": "bfloat16"}, {})
    make("vit_no_class_token", no_class_token, {"pooling": "gap"})
    make("vit_softmax", plain, {"activation": "softmax"})
    make("vit_gap", plain, {"pooling": "gap"})
    make("vit_pre_logits", plain, {"intermediate_dim": 8})
    make("vit_no_bias", plain | {"use_mha_bias": False}, None)


if __name__ == "__main__":
    {"images": images, "texts": main}[(sys.argv[2:] or ["texts"])[0]](Path(sys.argv[1]))
