"""KerasHub presets that keras-hub made: the same logits and token ids here, and in transformers after saving."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from stand_ins.make_kerashub import TEXTS

from modelhub import Backbone, CausalLM
from modelhub.core.backends import installed
from modelhub.errors import CheckpointError, ConfigError, TokenizerError
from modelhub.families import family_of, kerashub
from modelhub.hub.checkpoint import TensorInfo
from modelhub.hub.kerashub import H5Checkpoint, open_kerashub
from modelhub.model.source import open_source
from modelhub.processing.tokenizer import Tokenizer

MODELS = ("gemma", "gemma2", "gemma3", "llama2", "llama3", "llama31", "mistral")
BYTE_LEVEL = ("llama3", "llama31")
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="session")
def presets(tmp_path_factory) -> Path:
    if importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras-hub, which makes the presets, is not installed: pip install keras-hub")
    folder = tmp_path_factory.mktemp("kerashub")
    script = Path(__file__).parents[1] / "support" / "stand_ins" / "make_kerashub.py"
    env = os.environ | {"KERAS_BACKEND": "numpy", "KERAS_HOME": str(folder / "home")}
    made = subprocess.run([sys.executable, str(script), str(folder)], env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def reference(presets: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(presets / f"{name}.npz") as file:
        return file["ids"], file["logits"]


def load(folder: Path, backend: str = "numpy", **options) -> CausalLM:
    return CausalLM.from_preset(str(folder), backend=backend, device="cpu", dtype="float32", **options)


def changed(presets: Path, name: str, tmp_path: Path, **arguments) -> Path:
    """A copy of the preset with other arguments in its config.json."""
    folder = shutil.copytree(presets / name, tmp_path / name)
    data = json.loads((folder / "config.json").read_text())
    data["config"] |= arguments
    (folder / "config.json").write_text(json.dumps(data))
    return folder


# --- the same numbers -------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("backend", installed())
def test_logits_are_those_of_keras_hub(presets, name, backend):
    ids, wanted = reference(presets, name)
    assert np.abs(wanted).max() > 5  # large enough that soft caps, windows and scales show
    found = np.asarray(load(presets / name, backend).logits(ids.tolist()))
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-4)


@each_model
def test_token_ids_are_those_of_keras_hub(presets, name):
    tokenizer = Tokenizer.from_folder(presets / name)
    wanted = json.loads((presets / f"{name}.json").read_text())
    for text, ids in zip(TEXTS, wanted, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
        assert tokenizer.decode(ids) == (text if name in BYTE_LEVEL else text.replace("▁", " "))


@each_model
def test_saved_for_transformers(presets, name, tmp_path):
    """What the preset is converted to gives keras-hub's logits and ids in transformers, and ours on loading again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids, wanted = reference(presets, name)
    lm = load(presets / name)
    lm.save_to_preset(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype="float32")
    with torch.no_grad():
        found = model(torch.tensor(ids.astype("int64"))).logits.numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-4)
    theirs, tokens = (
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        json.loads((presets / f"{name}.json").read_text()),
    )
    for text, ids in zip(TEXTS, tokens, strict=True):
        assert theirs.encode(text, add_special_tokens=False) == ids, text
    assert model.generation_config.eos_token_id == lm.generation_config["eos_token_id"]

    again = load(tmp_path / "saved")
    assert again.generate("The river", max_new_tokens=8) == lm.generate("The river", max_new_tokens=8)
    assert again.generation_config == lm.generation_config


@pytest.mark.parametrize(
    ("name", "ends"),
    [("gemma3", ["<eos>", "<end_of_turn>"]), ("llama2", ["</s>"]), ("llama3", ["<|end_of_text|>", "<|eot_id|>"])],
)
def test_what_ends_a_text(presets, name, ends):
    lm = load(presets / name)
    assert [lm.tokenizer.id_to_token(index) for index in lm.generation_config["eos_token_id"]] == ends


def test_llama3_words_are_cut_as_llama_3_cuts_them(presets):
    """keras-hub 0.32 gives its pattern to the tokenizers library as plain text, and so cuts nothing."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    assets = presets / "llama3" / "assets" / "tokenizer"
    vocabulary = json.loads((assets / "vocabulary.json").read_text())
    merges = [tuple(line.split(" ")) for line in (assets / "merges.txt").read_text().splitlines()]
    theirs = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = TikTokenConverter("").pattern
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    ours = Tokenizer.from_folder(presets / "llama3")
    for text in [*TEXTS, "x=12345678;y=3.14159  \n\n z", "I'LL we'Ve", "a\r\n\r\nb   c"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text).ids


@pytest.mark.parametrize("name", ["gemma", "llama2", "llama3"])
def test_special_tokens_in_the_text(presets, name):
    tokenizer = Tokenizer.from_folder(presets / name)
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        assert tokenizer.token_to_id(token) in tokenizer.encode(f"The {token} river")[1:]
        assert tokenizer.token_to_id(token) in tokenizer.special_ids


def test_no_start_token_where_the_preset_says_so(presets, tmp_path):
    folder = shutil.copytree(presets / "llama2", tmp_path / "preset")
    data = json.loads((folder / "preprocessor.json").read_text())
    data["config"]["add_start_token"] = False
    (folder / "preprocessor.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("The river") == tokenizer.encode("The river", add_special_tokens=False)


# --- config and names -------------------------------------------------------------------------------------------------


def test_bfloat16_shards_are_read_as_they_are(presets):
    folder = presets / "gemma3"
    shards = sorted(folder.glob("model_*.weights.h5"))
    assert len(shards) > 3 and not (folder / "model.weights.h5").exists()
    stored: dict[str, np.ndarray] = {}

    def collect(path, item):
        if isinstance(item, h5py.Dataset):
            stored[path] = item[()].view(ml_dtypes.bfloat16)

    for shard in shards:
        with h5py.File(shard) as file:
            file.visititems(collect)
    with open_kerashub(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(stored)
        for path, wanted in stored.items():
            assert checkpoint.tensors[path] == TensorInfo("bfloat16", wanted.shape)
            assert np.array_equal(checkpoint.read(path, "bfloat16"), wanted)
            assert np.array_equal(checkpoint.read(path), wanted.astype("float32"))


@each_model
def test_names_and_values_go_both_ways(presets, name):
    with open_source(presets / name, {"offline": True}) as source:
        checkpoint = source.checkpoint()
        for theirs in checkpoint.tensors:
            if (renamed := source.names.to_ours(theirs)) is None:
                assert "seed_generator" in theirs
                continue
            ours, via = renamed
            values = checkpoint.read(theirs)
            converted = via.to_ours(values.copy())
            assert via.our_shape(values.shape) == converted.shape
            back, via = source.names.to_theirs(ours)
            assert back == theirs
            assert np.array_equal(via.to_theirs(converted), values)


def test_stored_dtype_and_tied_head(presets):
    with open_source(presets / "gemma3", {"offline": True}) as source:
        assert source.config.extra["dtype"] == "bfloat16"
        assert source.config.to_hf()["dtype"] == "bfloat16"
    tied = {}
    for name in BYTE_LEVEL:  # keras-hub's config.json does not say which of them is tied
        assert "tie_word_embeddings" not in json.loads((presets / name / "config.json").read_text())["config"]
        tied[name] = load(presets / name).config.tie_word_embeddings
    assert tied == {"llama3": False, "llama31": True}


def test_without_weights(presets, tmp_path):
    folder = shutil.copytree(presets / "mistral", tmp_path / "preset")
    (folder / "model.weights.h5").unlink()
    assert Backbone.from_preset(str(folder), backend="numpy", load_weights=False).config.sliding_window == 8
    with pytest.raises(CheckpointError, match=r"expected model\.weights\.h5 or model\.weights\.json, found assets"):
        load(folder)


def test_query_scale_of_gemma2_27b(presets, tmp_path):
    """keras-hub 0.32 ignores the argument that the 27B preset sets; transformers' config has what it was trained with."""
    folder = changed(presets, "gemma2", tmp_path, query_head_dim_normalize=False)
    assert load(folder).config.query_scale == (32 // 4) ** -0.5
    assert load(presets / "gemma2").config.query_scale == 16**-0.5


def test_earlier_spellings(presets, tmp_path):
    folder = changed(presets, "llama2", tmp_path, rope_scaling_factor=1.0)
    data = json.loads((folder / "config.json").read_text())
    del data["config"]["dtype"], data["config"]["rope_position_scaling_factor"]
    data["registered_name"] = "keras_nlp>LlamaBackbone"
    (folder / "config.json").write_text(json.dumps(data))
    ids, wanted = reference(presets, "llama2")
    np.testing.assert_allclose(load(folder).logits(ids.tolist()), wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["vision_encoder/layers/dense/vars/0", "interleave_embeddings/vars/0"])
def test_the_image_part_of_gemma3_is_left_out(presets, part):
    with open_source(presets / "gemma3", {"offline": True}) as source:
        assert source.names.to_ours(f"layers/gemma3_{part}") is None


def test_other_classes_and_quantised_presets(presets):
    with pytest.raises(ConfigError, match="class 'BertBackbone'; modelhub reads GemmaBackbone, .*MistralBackbone"):
        load(presets / "bert")
    with pytest.raises(ConfigError, match="the weights are quantised .*Take the preset that is not quantised"):
        load(presets / "int8")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gemma", {"final_logit_soft_cap": 30.0}, "supported with use_post_ffw_norm=true"),
        ("gemma", {"use_post_attention_norm": True}, "use_post_attention_norm=True is not supported"),
        ("gemma", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05 is not supported"),
        ("gemma2", {"attention_sinks": 4}, "does not know and that may change the maths: attention_sinks=4"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"is_embedding_model": True}, "is_embedding_model=True"),
        ("gemma3", {"use_query_key_norm": False}, "use_query_key_norm=False is not supported"),
        ("llama2", {"rope_position_scaling_factor": 2.0}, "rope_position_scaling_factor=2.0 is not supported"),
        ("llama31", {"rope_low_freq_factor": None}, "needs low_freq_factor"),
        ("llama2", {"num_layers": None}, "num_layers; the file is incomplete"),
        ("llama2", {"num_layers": "many"}, "num_hidden_layers='many'"),
        ("llama2", {"num_query_heads": 3}, "odd|no multiple"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window must be"),
        ("mistral", {"layer_norm_epsilon": "small"}, "rms_norm_eps must be"),
        ("mistral", {"dtype": {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}}, "are quantised"),
        ("mistral", {"dtype": ["float32"]}, "are quantised"),
        ("llama2", {"intermediate_dim": 32}, None),
        ("gemma", {"num_layers": 3}, None),
    ],
)  # fmt: skip
def test_configs_that_are_refused(presets, tmp_path, name, arguments, message):
    folder = changed(presets, name, tmp_path, **arguments)
    with pytest.raises(ConfigError if message else CheckpointError, match=message or "config and weights disagree"):
        load(folder)


def test_a_transposed_kernel_is_not_taken_for_the_right_one(presets, tmp_path):
    folder = shutil.copytree(presets / "llama2", tmp_path / "preset")
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        group = file["layers/llama_transformer_decoder/_feedforward_gate_dense/vars"]
        values = group["0"][()]
        del group["0"]
        group["0"] = values.T
    with pytest.raises(CheckpointError, match=r"wrong shape: model\.layers\.0\.mlp\.gate_proj\.weight"):
        load(folder)


def test_every_class_has_a_family():
    for model_type in kerashub.BACKBONES.values():
        assert hasattr(family_of(model_type).Config, "from_keras")


# --- tokenizer files --------------------------------------------------------------------------------------------------


def _rename_class(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data | {"registered_name": "keras_hub>BertTokenizer"}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gemma", _rename_class, "class 'BertTokenizer'; modelhub reads GemmaTokenizer"),
        ("gemma", lambda folder: (folder / "tokenizer.json").write_text("[1]"), "holds list, not an object"),
        ("gemma", lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read as JSON"),
        ("gemma", lambda folder: (folder / "tokenizer.json").write_text("{}"), "have no config"),
        ("gemma", lambda folder: (folder / "assets/tokenizer/vocabulary.spm").unlink(), "vocabulary.spm is missing"),
        ("gemma", lambda folder: (folder / "assets/tokenizer/vocabulary.spm").write_bytes(b"?"), "SentencePiece cannot"),
        ("llama3", lambda folder: (folder / "assets/tokenizer/merges.txt").unlink(), "merges.txt is missing"),
        ("llama3", lambda folder: (folder / "assets/tokenizer/merges.txt").write_text("zz q"), "make no tokenizer"),
        ("llama3", lambda folder: (folder / "assets/tokenizer/vocabulary.json").write_text('{"a": 0}'), "make no token"),
        ("llama3", lambda folder: (folder / "assets/tokenizer/vocabulary.json").write_text('{"a": "b"}'), "make no"),
    ],
)  # fmt: skip
def test_damaged_tokenizers(presets, tmp_path, name, damage, message):
    folder = shutil.copytree(presets / name, tmp_path / "preset")
    damage(folder)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


# --- hostile weights --------------------------------------------------------------------------------------------------


def written(tmp_path: Path, write) -> Path:
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/a/vars/0"] = np.arange(6, dtype="float32").reshape(2, 3)
        write(file)
    return path


def _external_file(file) -> None:
    Path(file.filename).with_name("secret").write_bytes(bytes(64))
    file.create_dataset("x", (16,), "float32", external=[("secret", 0, 64)])


def _virtual(file) -> None:
    layout = h5py.VirtualLayout((16,), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "x", (16,))
    file.create_virtual_dataset("x", layout)


def _not_allocated(file) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    space = h5py.h5s.create_simple((1 << 20, 1 << 20))
    h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, settings)


def _cycle(file) -> None:
    file["layers/again"] = file["layers"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.update(x=h5py.ExternalLink("/etc/passwd", "x")), "ExternalLink"),
        (lambda file: file.update(x=h5py.SoftLink("/layers/a/vars/0")), "SoftLink"),
        (_external_file, "kept in other files"),
        (_virtual, "kept in other files"),
        (_cycle, "has another name already"),
        (lambda file: file.update(x=file["layers/a/vars/0"]), "has another name already"),
        (_not_allocated, "is not all in the file"),
        (lambda file: file.create_dataset("x", (1 << 20, 1 << 20), "float32", compression="gzip"), "64 times the bytes"),
        (lambda file: file.create_dataset("x", data=np.zeros(1 << 20, "float32"), compression="gzip"), "64 times"),
        (lambda file: file.create_dataset("x", data=np.ones(64), compression="lzf"), "other means than gzip"),
        (lambda file: file.create_dataset("x", data=np.arange(64), scaleoffset=True), "other means than gzip"),
        (lambda file: file.create_dataset("x", (4,), "float32", maxshape=(None,), chunks=(1 << 28,)), "larger chunks"),
        (lambda file: file.update(x=np.ones(4, ">f4")), "machine's byte order"),
        (lambda file: file.update(x=np.zeros(4, "V2")), "modelhub reads bfloat16 and"),
        (lambda file: file.update(x=["text"]), "modelhub reads bfloat16 and"),
        (lambda file: file.update(x=np.ones(4, "complex64")), "modelhub reads bfloat16 and"),
        (lambda file: file.update(x=h5py.Empty("float32")), "has the shape None"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_on_opening(tmp_path, write, message):
    path = written(tmp_path, write)
    with pytest.raises(CheckpointError, match=message) as error:
        H5Checkpoint(path)
    assert str(path) in str(error.value)


def test_gzip_is_read(tmp_path):
    values = np.random.default_rng(0).standard_normal((70, 33)).astype("float32")

    def write(file):
        file.create_dataset("x", data=values, compression="gzip", shuffle=True, chunks=(16, 33))
        file.create_dataset("y", data=values, chunks=(7, 7), fletcher32=True)
        tensor = file.create_dataset("z", data=values.astype(ml_dtypes.bfloat16), compression="gzip")
        tensor.attrs["dtype"] = "bfloat16"
        file["none"] = np.zeros((0, 3), "float32")

    with H5Checkpoint(written(tmp_path, write)) as checkpoint:
        assert np.array_equal(checkpoint.read("x"), values) and np.array_equal(checkpoint.read("y"), values)
        assert np.array_equal(checkpoint.read("x", "float16"), values.astype("float16"))
        assert np.array_equal(checkpoint.read("z", "bfloat16"), values.astype(ml_dtypes.bfloat16))
        assert checkpoint.read("none").shape == (0, 3)
        with pytest.raises(CheckpointError, match="has no tensor 'w'"):
            checkpoint.read("w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the HDF5 library cannot read it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "the HDF5 library cannot read it"),
        (b"\x80\x04\x95pickle", "the HDF5 library cannot read it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_files_that_are_no_hdf5(tmp_path, content, message):
    (tmp_path / "model.weights.h5").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_kerashub(tmp_path)


def test_a_block_before_the_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "model.weights.h5", "w", userblock_size=512) as file:
        file["x"] = np.ones(3, "float32")
    with pytest.raises(CheckpointError, match="starts with a block"):
        open_kerashub(tmp_path)


@pytest.mark.slow
def test_damaged_files_raise_checkpoint_error(presets, tmp_path):
    """Cut off, overwritten, and bits turned, mostly in the structure at the start: an error or values, nothing else."""
    whole = (presets / "gemma" / "model.weights.h5").read_bytes()
    draw = np.random.default_rng(0)
    path, errors = tmp_path / "x.weights.h5", 0
    for _ in range(400):
        data = bytearray(whole)
        kind = draw.integers(0, 3)
        if kind == 0:
            del data[draw.integers(0, len(data)) :]
        elif kind == 1:
            at = draw.integers(0, 8000)
            data[at : at + 8] = (2 ** int(draw.integers(0, 64)) - 1).to_bytes(8, "little")
        else:
            for at in draw.integers(0, 12000, 8):
                data[at] ^= 1 << draw.integers(0, 8)
        path.write_bytes(data)
        try:
            with H5Checkpoint(path) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.read(name)
        except CheckpointError:
            errors += 1
    assert errors > 100


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"/a/vars": "../other.weights.h5"}}, "expected a .weights.h5 file inside the folder"),
        ({"weight_map": {"/a/vars": ["model_00000.weights.h5", "/etc/passwd"]}}, "inside the folder"),
        ({"weight_map": {"/a/vars": 3}}, "inside the folder"),
        ({"weight_map": {}}, "lists no shards"),
        ({"weight_map": [1]}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"weight_map": {"/a/vars": "model_00000.weights.h5"}}, "1 of them are not there: model_00000.weights.h5"),
    ],
)
def test_hostile_indexes(tmp_path, index, message):
    (tmp_path / "model.weights.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_kerashub(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for number in range(2):
        shutil.move(written(tmp_path, lambda file: None), tmp_path / f"model_{number}.weights.h5")
    names = [path.name for path in tmp_path.glob("*.h5")]
    (tmp_path / "model.weights.json").write_text(json.dumps({"weight_map": {"/layers/a/vars": names}}))
    with pytest.raises(CheckpointError, match=re.escape("'layers/a/vars/0' is in model_1.weights.h5 and in another")):
        open_kerashub(tmp_path)
