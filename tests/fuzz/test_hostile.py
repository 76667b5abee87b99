"""Files made to harm, one by one: refused with the reason, in 5 s and 1 GB at most."""

import json
import struct

import pytest
from fuzz.worker import TARGETS

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def refused(workers, tmp_path):
    """refused(target, spoil): the message that a sound folder is refused with, after spoil(folder)."""

    def check(name, spoil):
        folder = tmp_path / name
        folder.mkdir()
        TARGETS[name].write(folder)
        spoil(folder)
        found = workers[0].run(name, folder)
        assert found["kind"] == "refused", found["text"]
        return found["text"]

    return check


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config-llama", "num_hidden_layers", 10**9),
        ("config-gemma3_text", "num_hidden_layers", 2**31 - 1),
        ("config-gemma2", "hidden_size", 10**30),
        ("config-mistral", "vocab_size", 1e12),
        ("config-llama", "rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("config-gemma", "hidden_activation", ["gelu"]),
    ],
)
def test_sizes_and_kinds_in_a_config(refused, name, key, value):
    text = refused(name, lambda folder: change(folder / "config.json", **{key: value}))
    assert text.startswith("ConfigError") and key.removesuffix("_scaling") in text


def test_a_model_that_is_larger_than_its_weights_takes_no_memory(refused):
    text = refused("preset", lambda folder: change(folder / "config.json", vocab_size=2**31 - 1, hidden_size=2**31 - 2))
    assert "config and weights disagree" in text


@pytest.mark.parametrize("value", [{"a": 1}, "1", [[1]], 1.5, [None]])
def test_end_tokens_of_the_wrong_kind(refused, value):
    text = refused("generation_config", lambda folder: change(folder / "generation_config.json", eos_token_id=value))
    assert "generation_config.json: eos_token_id must be a token id" in text


def test_a_config_of_many_megabytes(refused):
    text = refused("config-llama", lambda folder: (folder / "config.json").write_bytes(b" " * 20_000_000 + b"{}"))
    assert "20000002 bytes" in text


# Weights


@pytest.mark.slow
@pytest.mark.parametrize("item", [b"[],", b"{},", b'"",'])
def test_a_header_that_grows_in_memory(refused, item):
    header = b'{"a":[' + item * (24_000_000 // len(item)) + b"0]}"
    text = refused(
        "safetensors",
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header),
    )
    assert "expected dtype, shape and data_offsets" in text


def test_a_header_of_the_size_that_the_format_allows(refused):
    def spoil(folder):
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", 99_000_000))
            file.truncate(99_000_008)

    assert "expected a header of at most 25000000 bytes" in refused("safetensors", spoil)


def gguf(body, keys=1, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf(b"", keys=2**63), "a header of 9223372036854775808 keys"),
        (gguf(b"", keys=0, tensors=2**63), "9223372036854775808 tensors"),
        (gguf(KEY + struct.pack("<IIQ", 9, 8, 2**61)), "needs 18446744073709551616 bytes"),
        (gguf(KEY + struct.pack("<IIQ", 9, 9, 2_000_000) + bytes(24_000_000)), "more than 100000 arrays in arrays"),
        (gguf(KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50), "nests arrays"),
        (gguf(KEY + struct.pack("<IQ", 8, 40_000_000) + bytes(40_000_000)), "at most 25000000"),
    ],
    ids=["keys", "tensors", "strings", "arrays", "nesting", "text"],
)
def test_gguf_counts_that_lie(refused, data, message):
    assert message in refused("gguf", lambda folder: (folder / "model.gguf").write_bytes(data))


def test_a_link_to_a_file_elsewhere_shows_nothing_of_it(refused, tmp_path):
    """Links are followed: the Hugging Face cache is made of them. What they lead to must be weights all the same."""
    (tmp_path / "secret").write_text("root:x:0:0:a secret of some length")

    def spoil(folder):
        (folder / "model-0.safetensors").unlink()
        (folder / "model-0.safetensors").symlink_to(tmp_path / "secret")

    text = refused("shards", spoil)
    assert "model-0.safetensors is damaged" in text and "secret of" not in text


def test_messages_carry_no_terminal_codes_and_no_megabytes(refused):
    def spoil(folder):
        data = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps(json.loads(data[8 : 8 + length]) | {"\x1b[2J\ud800" + "a" * 1_000_000: empty}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    text = refused("preset", spoil)
    assert r"unexpected: \x1b[2J\ud800aaa" in text and len(text) < 10_000


# Adapters


@pytest.mark.parametrize("pattern", [r"((.|.)+)+x", r"(?:(?:\w|[a-z_.])*)*!"])
def test_an_adapters_pattern_that_never_ends(refused, pattern):
    text = refused("adapter", lambda folder: change(folder / "adapter_config.json", rank_pattern={pattern: 4}))
    assert "took over 3 s" in text


# Tokenizers


def test_a_token_with_an_id_of_billions_takes_no_memory(workers, tmp_path):
    TARGETS["tokenizer.json"].write(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"][0]["id"] = data["model"]["vocab"]["e"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    found = workers[0].run("tokenizer.json", tmp_path)
    assert found["kind"] != "failed", found["text"]


def test_steps_that_make_a_text_grow_without_end(refused):
    steps = {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 50}
    text = refused("tokenizer.json", lambda folder: change(folder / "tokenizer.json", pre_tokenizer=steps))
    assert "10000 times as long" in text


def test_an_expression_that_backtracks_without_end(refused):
    split = {"type": "Split", "pattern": {"Regex": r"([^\n]+)+\d\z"}, "behavior": "Isolated", "invert": False}
    text = refused(
        "tokenizer.json", lambda folder: change(folder / "tokenizer.json", pre_tokenizer=split, normalizer=None)
    )
    assert "cannot encode the text" in text and "retry-limit" in text


def test_a_damaged_table_of_unicode(refused):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAQAAP////////////////////8="}
    text = refused("tokenizer.json", lambda folder: change(folder / "tokenizer.json", normalizer=normalizer))
    assert text.startswith("TokenizerError")


def test_a_chat_template_of_100_mb(refused):
    def spoil(folder):
        with open(folder / "chat_template.jinja", "wb") as file:
            file.truncate(100_000_000)

    assert "chat_template.jinja has 100000000 bytes" in refused("tokenizer.json", spoil)


def test_a_chat_template_of_2_mb_is_not_rendered(refused):
    text = refused("chat_template", lambda folder: (folder / "chat_template.jinja").write_text("a" * 2_000_000))
    assert "2,000,000 characters" in text


@pytest.mark.parametrize("token", [1, ["<bos>"], {"content": 1}, {"a": 1}, True])
def test_special_tokens_of_the_wrong_kind(refused, token):
    def spoil(folder):
        (folder / "special_tokens_map.json").unlink()  # it would win
        change(folder / "tokenizer_config.json", bos_token=token)

    assert refused("tokenizer.json", spoil).startswith("TokenizerError")
