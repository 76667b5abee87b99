"""Adapters on quantised weights (QLoRA, Dettmers et al. 2023): trained, broken off, saved, and read by PEFT."""

import numpy as np
import pytest
from stop_at import StopAt
from tiny_preset import CONFIG, LINES, write_preset

from modelhub import CausalLM
from modelhub.core import leaves
from modelhub.core.backends import installed
from modelhub.core.quantized import Tiles
from modelhub.errors import ConfigError

TRAINING = [name for name in installed() if name != "numpy"]
TEXTS = sorted(set(LINES))
DATA = [{"instruction": a, "context": "", "response": b} for a in TEXTS for b in TEXTS][:16]
HOW = {"verbose": False, "batch_size": 2, "epochs": 2, "seed": 3}
IDS = np.random.default_rng(0).integers(3, 400, (2, 12))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return str(write_preset(tmp_path_factory.mktemp("presets") / "tiny", CONFIG, scale=0.1))


def load(preset, name, scheme="int4", **lora):
    lm = CausalLM.from_preset(preset, backend=name, device="cpu", quantize=scheme)
    lm.preprocessor.sequence_length = 48
    if lora:
        lm.enable_lora(**lora)
        lm.compile(learning_rate=0.01, schedule="linear")
    return lm


def run(lm, **more):
    return [step["loss"] for step in lm.fit(DATA, **HOW, **more).steps]


def dequantised(preset, name, scheme):
    """The model in floats, whose weights are those that the quantised one stands for."""
    packed, lm = load(preset, "numpy", scheme), load(preset, name, None)
    lm.params = {key: lm.backbone.xp.array(packed.backbone.xp.get(x)) for key, x in packed.params.items()}
    return lm


@pytest.fixture(scope="module")
def curves(preset):
    """{(backend, whether it is quantised): losses} with the options of `LORA`."""
    found = {}
    for name in TRAINING:
        lm = load(preset, name, "int4", **LORA)
        assert sum(isinstance(x, Tiles) for x in lm.params.values()) == 15  # 2 layers of 7, and the table
        found[name, True] = run(lm)
    lm = dequantised(preset, "torch", "int4")
    lm.enable_lora(**LORA)
    lm.compile(learning_rate=0.01, schedule="linear")
    found["torch", False] = run(lm)
    return found


LORA = {"rank": 4, "targets": "all-linear", "dropout": 0.1, "use_dora": True}


@pytest.mark.parametrize("name", TRAINING)
def test_curves_are_those_of_the_dequantised_weights(curves, name):
    """Products in training are not rounded to 8 bits."""
    wanted = curves["torch", False]
    np.testing.assert_allclose(curves[name, True], wanted, rtol=1e-3)
    assert np.mean(wanted[-3:]) < np.mean(wanted[:3]) - 0.1


@pytest.mark.parametrize("name", TRAINING)
def test_broken_off_and_resumed(preset, curves, name, tmp_path):
    with pytest.raises(RuntimeError, match="broken off"):
        run(load(preset, name, "int4", **LORA), checkpoint_dir=tmp_path, save_steps=1, callbacks=[StopAt(3)])
    resumed = load(preset, name, "int4", **LORA)
    assert run(resumed, checkpoint_dir=tmp_path, save_steps=1) == curves[name, True]


@pytest.mark.parametrize("name", TRAINING)
def test_saved_and_loaded_again_the_loss_is_the_same(preset, name, tmp_path):
    lm = load(preset, name, "int8", rank=2)
    run(lm)
    lm.save_adapter(tmp_path / "adapter")
    again = load(preset, name, "int8")
    again.load_adapter(tmp_path / "adapter")
    assert again.evaluate(DATA[:4]) == lm.evaluate(DATA[:4])
    assert again.generate("The river", 8) == lm.generate("The river", 8)


def test_peft_puts_the_adapter_on_the_full_model(preset, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = load(preset, "torch", "int4", rank=4, targets="all-linear")
    run(lm)
    lm.save_adapter(tmp_path / "adapter")
    full = load(preset, "numpy", None)
    full.load_adapter(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(preset, dtype=torch.float32), tmp_path / "adapter"
    )
    with torch.no_grad():
        wanted = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(full.logits(IDS), wanted, atol=1e-4)
    assert np.abs(full.logits(IDS) - load(preset, "numpy", None).logits(IDS)).max() > 0.01


@pytest.mark.parametrize("name", installed())
def test_logits_and_memory(preset, name):
    """Few rows: x is rounded to 8 bits, in each of a layer's products. Many: as with the dequantised weights."""
    lm, plain = load(preset, name, {"*": "int4", "embed_tokens": "int8"}), None
    plain = dequantised(preset, name, {"*": "int4", "embed_tokens": "int8"})
    few, many = IDS[:1, :6], np.resize(IDS, (8, 12))
    for ids, limit in ((few, 3e-2), (many, 1e-4)):
        wanted = plain.logits(ids)
        assert np.linalg.norm(lm.logits(ids) - wanted) / np.linalg.norm(wanted) < limit
    matrices = [x for x in lm.params.values() if isinstance(x, Tiles)]
    assert len(matrices) == 15 and {x.scheme for x in matrices} == {"int4", "int8"}
    size = sum(leaves.nbytes(x) for x in matrices)
    assert size < sum(leaves.count(x) for x in matrices) * 0.9  # most of the numbers are the table's, in 8 bits


def test_moved_and_quantised_in_memory(preset):
    lm = CausalLM.from_preset(preset, backend="numpy")
    before = lm.logits(IDS)
    lm.quantize("int8")
    small = lm.logits(IDS)
    assert 0 < np.linalg.norm(small - before) / np.linalg.norm(before) < 0.05
    for name in TRAINING:
        lm.to(backend=name)
        assert sum(isinstance(x, Tiles) for x in lm.params.values()) == 15
        np.testing.assert_allclose(lm.logits(IDS), small, atol=1e-3)
    other = load(preset, "numpy", "int8")
    lm.load_params(other.params)  # of another backend, packed
    np.testing.assert_allclose(lm.logits(IDS), small, atol=1e-3)
    lm.quantize("int4")  # what is quantised stays
    assert {x.scheme for x in lm.params.values() if isinstance(x, Tiles)} == {"int8"}


@pytest.mark.parametrize("name", installed())
def test_calibration(preset, name):
    """What the model makes of texts like those that it was calibrated on is nearer to what it made of them before."""
    ids = np.array([CausalLM.from_preset(preset, backend="numpy").tokenizer.encode(TEXTS[0])])
    wanted, off = CausalLM.from_preset(preset, backend=name).logits(ids), {}
    for calibration in (None, TEXTS):
        lm = CausalLM.from_preset(preset, backend=name)
        lm.quantize({"*": "int4", "embed_tokens": None}, calibration)
        off[calibration is None] = np.linalg.norm(lm.logits(ids) - wanted)
    assert off[False] < off[True]
    with pytest.raises(ValueError, match="text"):
        lm.quantize("int4", [])


@pytest.mark.parametrize("name", TRAINING)
def test_what_cannot_be_done(preset, name):
    lm = load(preset, name)
    with pytest.raises(ConfigError, match=r"training takes plain arrays.*\(int4\).*enable_lora"):
        lm.fit(DATA, **HOW)
    lm.enable_lora(rank=2)
    with pytest.raises(ConfigError, match=r"merging an adapter takes plain arrays.*\(int4\)"):
        lm.merge_lora()
    for wrong in ("int3", {"*": "q4"}, 4):
        with pytest.raises(ConfigError, match="quantize must be one of 'int8', 'int4'"):
            CausalLM.from_preset(preset, backend="numpy", quantize=wrong)
    with pytest.raises(ConfigError, match="'lm_haed' means no matrix of this model; there are embed_tokens, q_proj"):
        CausalLM.from_preset(preset, backend="numpy", quantize={"lm_haed": "int8"})


def test_rows_that_are_no_whole_groups(tmp_path, caplog):
    odd = str(write_preset(tmp_path / "odd", CONFIG | {"intermediate_size": 80}))
    lm = CausalLM.from_preset(odd, backend="numpy", quantize="int4")
    assert "2 matrices stay as they are" in caplog.text and "down_proj" in caplog.text
    assert sum(isinstance(x, Tiles) for x in lm.params.values()) == 13
    with pytest.raises(ConfigError, match=r"down_proj.weight \(32, 80\) are not whole groups of 32"):
        CausalLM.from_preset(odd, backend="numpy", quantize={"down_proj": "int4"})
