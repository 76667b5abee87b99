"""SavedModels run where modelhub is not, LiteRT files in LiteRT's own interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import tensorflow as tf
import tiny_families
import torch
import transformers
from ai_edge_litert.interpreter import Interpreter

import modelhub
from modelhub import CausalLM, ImageClassifier
from modelhub.core import nn
from modelhub.errors import ConfigError, InputError
from modelhub.interop import litert
from modelhub.tasks.backbone import Backbone

PROMPTS = ["The river runs past the", "In the morning the baker opens", "She wrote"]
LENGTH = 24  # new tokens; Gemma 3's window is shorter
PIXELS = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
LABELS = ["bag\nand box", "boot", "été"]

SERVER = """
import sys
sys.modules |= dict.fromkeys(("modelhub", "keras", "jax", "torch"))  # an import of these fails
import numpy as np, tensorflow as tf
folder, = sys.argv[1:]
given, found = np.load(f"{folder}/given.npz"), {}
for name in ("gemma3", "llama"):
    model = tf.saved_model.load(f"{folder}/{name}").signatures
    ids, mask = given[f"{name}/ids"], given[f"{name}/mask"]
    found[f"{name}/logits"] = model["serving_default"](input_ids=ids)["logits"]
    found[f"{name}/masked"] = model["serving_masked"](input_ids=ids, attention_mask=mask)["logits"]
    for side in ("left", "right"):
        ids, mask = given[f"{name}/ids/{side}"], given[f"{name}/mask/{side}"]
        made = model["generate"](input_ids=ids, attention_mask=mask, max_new_tokens=given["length"])
        found[f"{name}/{side}"] = made["output_ids"]
model = tf.saved_model.load(f"{folder}/vit")
found |= model.signatures["serving_default"](pixel_values=given["pixels"])
np.savez(f"{folder}/found.npz", **found)
with open(model.labels.asset_path.numpy()) as file:
    print(file.read())
"""


def text_models(folder):
    gemma = CausalLM.from_preset("gemma3_tiny", backend="jax")
    gemma.enable_lora(4)
    changed = {n: x + 0.05 if n.endswith("lora_B") else x for n, x in gemma.params.items()}
    gemma.params = changed
    config = tiny_families.CONFIGS["llama"] | {"vocab_size": 400}  # as many as its tokenizer has
    llama = CausalLM.from_preset(str(tiny_families.write_preset(folder / "preset", config)), backend="torch")
    return {"gemma3": gemma, "llama": llama}


def padded(rows, side):
    longest = max(map(len, rows))
    place = (lambda n: (longest - n, 0)) if side == "left" else (lambda n: (0, longest - n))
    ids = [np.pad(np.array(row, np.int32), place(len(row)), constant_values=7) for row in rows]
    return np.stack(ids), np.stack([np.pad(np.ones(len(row), np.int32), place(len(row))) for row in rows])


def classifier(backend):
    return ImageClassifier.from_config(
        labels=LABELS, image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, backend=backend,
    )  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The tasks, and what a process without modelhub makes of their SavedModels."""
    folder = tmp_path_factory.mktemp("served")
    tasks, given = text_models(folder), {"pixels": PIXELS, "length": np.int32(LENGTH)}
    for name, lm in tasks.items():
        backend = lm.backend
        assert modelhub.to_saved_model(lm, folder / name) == folder / name
        assert lm.backend == backend
        rows = [lm.tokenizer.encode(prompt) for prompt in PROMPTS]
        for side in ("left", "right"):
            given[f"{name}/ids/{side}"], given[f"{name}/mask/{side}"] = padded(rows, side)
        given[f"{name}/ids"], given[f"{name}/mask"] = padded(rows, "right")
    tasks["vit"] = classifier("torch")
    modelhub.to_saved_model(tasks["vit"], folder / "vit")
    np.savez(folder / "given.npz", **given)
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(folder)], capture_output=True, text=True, cwd=folder, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tasks, given, dict(np.load(folder / "found.npz")), json.loads(done.stdout)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
class TestText:
    def test_logits(self, served, name):
        tasks, given, found, _ = served
        wanted = tasks[name].logits(given[f"{name}/ids"])
        np.testing.assert_allclose(found[f"{name}/logits"], wanted, atol=1e-4)
        tokens = given[f"{name}/mask"] == 1
        np.testing.assert_allclose(found[f"{name}/masked"][tokens], wanted[tokens], atol=1e-4)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_greedy_answers_are_those_of_the_task(self, served, name, side):
        tasks, _, found, _ = served
        ids = found[f"{name}/{side}"]
        assert ids.shape == (len(PROMPTS), LENGTH)
        answers = tasks[name].generate(PROMPTS, LENGTH, temperature=0.0, logprobs=True)
        for row, answer in zip(ids.tolist(), answers, strict=True):
            n = len(answer.token_ids)
            assert row[:n] == answer.token_ids
            if n < LENGTH:
                assert row[n] in tasks[name].stop_ids and row[n + 1 :] == [0] * (LENGTH - n - 1)


def test_greedy_answers_are_those_of_transformers(served):
    tasks, given, found, _ = served
    ids, mask = (torch.tensor(given[f"llama/{name}/left"], dtype=torch.int64) for name in ("ids", "mask"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tasks["llama"].preset)
    ends = sorted(tasks["llama"].stop_ids)
    wanted = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, eos_token_id=ends, pad_token_id=0
    )[:, ids.shape[1] :]
    np.testing.assert_array_equal(found["llama/left"][:, : wanted.shape[1]], wanted)


def test_an_answer_ends_where_the_model_says_so(tmp_path):
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy")
    prompt = lm.tokenizer.encode(PROMPTS[0])
    made = lm.generate(PROMPTS[0], 12, logprobs=True).token_ids
    end = next(token for i, token in enumerate(made) if i > 2 and token not in made[:i])
    lm.generation_config = {"eos_token_id": end, "pad_token_id": 9}
    modelhub.to_saved_model(lm, tmp_path / "lm")
    generate = tf.saved_model.load(str(tmp_path / "lm")).signatures["generate"]

    def answer(count, ids=prompt):
        ids = np.array([ids], np.int32)
        found = generate(input_ids=ids, attention_mask=np.ones_like(ids), max_new_tokens=np.int32(count))
        return found["output_ids"].numpy()[0].tolist()

    place = made.index(end)
    assert answer(12) == made[: place + 1] + [9] * (11 - place)
    assert answer(2) == made[:2]
    assert answer(0) == []
    context = lm.config.max_position_embeddings
    assert answer(9, [5] * (context - 4))[4:] == [9] * 5
    with pytest.raises(tf.errors.InvalidArgumentError, match="no room for an answer"):
        answer(1, [5] * context)


def test_images(served):
    tasks, _, found, labels = served
    np.testing.assert_allclose(found["logits"], tasks["vit"].logits({"pixel_values": PIXELS}), atol=1e-5)
    best = [dict(answers) for answers in tasks["vit"].predict({"pixel_values": PIXELS}, top=3)]
    for row, answers in zip(found["probabilities"], best, strict=True):
        np.testing.assert_allclose(row, [answers[label] for label in LABELS], atol=1e-6)
    assert labels == LABELS


def test_a_backbone_gives_hidden_states(tmp_path, tiny_preset):
    backbone = Backbone.from_preset(str(tiny_preset), backend="tensorflow")
    modelhub.to_saved_model(backbone, tmp_path / "backbone")
    signatures = tf.saved_model.load(str(tmp_path / "backbone")).signatures
    assert set(signatures) == {"serving_default", "serving_masked"}
    ids = np.arange(6, dtype=np.int32)[None]
    found = signatures["serving_default"](input_ids=ids)["hidden_states"]
    np.testing.assert_allclose(found, np.array(backbone(ids)), atol=1e-5)


class TestFolder:
    def test_what_is_there_stays(self, tmp_path):
        clf, folder = classifier("tensorflow"), tmp_path / "mine"
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="is not empty; give a new folder"):
            modelhub.to_saved_model(clf, folder)
        with pytest.raises(InputError, match="is no SavedModel"):
            modelhub.to_saved_model(clf, folder, overwrite=True)
        with pytest.raises(InputError, match="is a file"):
            modelhub.to_saved_model(clf, folder / "notes.txt")
        (folder / "link").symlink_to("nowhere")
        with pytest.raises(InputError, match="leads nowhere"):
            modelhub.to_saved_model(clf, folder / "link")
        (folder / "link").unlink()
        with pytest.raises(InputError, match="cannot be written"):
            modelhub.to_saved_model(clf, folder / "notes.txt" / "model")
        assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
        assert (folder / "notes.txt").read_text() == "mine"

    def test_a_saved_model_is_replaced_when_asked_for(self, tmp_path):
        clf, folder = classifier("numpy"), tmp_path / "model"
        modelhub.to_saved_model(clf, folder)
        clf.params = {name: -x for name, x in clf.params.items()}
        with pytest.raises(InputError, match="overwrite=True"):
            modelhub.to_saved_model(clf, folder)
        modelhub.to_saved_model(clf, folder, overwrite=True)
        found = tf.saved_model.load(str(folder)).signatures["serving_default"](pixel_values=PIXELS)
        np.testing.assert_allclose(found["logits"], clf.logits({"pixel_values": PIXELS}), atol=1e-5)
        (tmp_path / "current").symlink_to("model")
        modelhub.to_saved_model(clf, tmp_path / "current", overwrite=True)
        assert {path.name: path.is_symlink() for path in tmp_path.iterdir()} == {"model": False, "current": True}

    def test_other_files_are_never_removed(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        clf, folder = classifier("tensorflow"), tmp_path / "model"
        assert modelhub.to_saved_model(clf, "~/model") == folder
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="holds notes.txt, which overwrite=True would remove"):
            modelhub.to_saved_model(clf, folder, overwrite=True)
        (folder / "notes.txt").unlink()
        before = (folder / "saved_model.pb").read_bytes()

        def slow(module, path, signatures):
            (folder / "notes.txt").write_text("mine")  # meanwhile

        monkeypatch.setattr(tf.saved_model, "save", slow)
        with pytest.raises(InputError, match=r"notes\.txt"):
            modelhub.to_saved_model(clf, folder, overwrite=True)
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "saved_model.pb").read_bytes() == before and os.listdir(tmp_path) == ["model"]

    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch):
        def failing(module, path, signatures):
            (tmp_path / ".model.saving" / "variables").mkdir()
            raise OSError("No space left on device")

        clf = classifier("tensorflow")
        before = clf.logits({"pixel_values": PIXELS})
        monkeypatch.setattr(tf.saved_model, "save", failing)
        with pytest.raises(OSError, match="No space left"):
            modelhub.to_saved_model(clf, tmp_path / "model")
        assert not list(tmp_path.iterdir())
        np.testing.assert_array_equal(clf.logits({"pixel_values": PIXELS}), before)


@pytest.mark.parametrize("export", [modelhub.to_saved_model, modelhub.to_litert])
def test_what_is_no_task_is_refused(tmp_path, export):
    with pytest.raises(InputError, match="expected a CausalLM"):
        export({"weights": 1}, tmp_path / "out")
    with pytest.raises(InputError, match="single Module"):
        export(nn.Linear.abstract(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "export", [modelhub.to_saved_model, modelhub.to_litert, lambda x, path: modelhub.to_tensorflow(x)]
)
def test_a_layer_for_another_framework_is_refused(tmp_path, tiny_preset, export):
    @dataclass
    class OwnNorm(nn.RMSNorm):
        @classmethod
        def replacing(cls, old):
            return cls(old.weight, old.eps, old.offset)

        def __call__(self, xp, x):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    name = f"own norm {tmp_path.parent.name} {tmp_path.name}"
    modelhub.register("layer", name, backend="torch")(OwnNorm)
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", layers={"model.norm": name})
    before = lm.generate("The river", 4)
    with pytest.raises(ConfigError, match="registered for torch alone"):
        export(lm, tmp_path / "out")
    assert not list(tmp_path.iterdir()) and lm.backend == "torch"
    assert lm.generate("The river", 4) == before


class TestLiteRT:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_text(self, tiny_preset, tmp_path, dtype):
        lm = CausalLM.from_preset(str(tiny_preset), backend="torch", dtype=dtype)
        lm.enable_lora(2)
        path = modelhub.to_litert(lm, tmp_path / "lm.tflite", sequence_length=16, batch_size=2)
        assert (lm.backend, lm.dtype) == ("torch", dtype)
        ids = np.random.default_rng(0).integers(3, 400, (2, 16)).astype(np.int32)
        found = Interpreter(str(path)).get_signature_runner("serving_default")(input_ids=ids)["logits"]
        np.testing.assert_allclose(found, lm.logits(ids), atol=1e-4 if dtype == "float32" else 0.1)
        kinds = {detail["op_name"] for detail in Interpreter(str(path))._get_ops_details()}
        assert not {kind for kind in kinds if kind.startswith(("Flex", "Custom"))}

    def test_images(self, tmp_path):
        clf = classifier("jax")
        path = modelhub.to_litert(clf, tmp_path / "new" / "vit.tflite")
        run = Interpreter(str(path)).get_signature_runner("serving_default")
        for row in PIXELS:
            found = run(pixel_values=row[None])
            np.testing.assert_allclose(found["logits"], clf.logits({"pixel_values": row[None]}), atol=1e-4)
            np.testing.assert_allclose(found["probabilities"].sum(), 1, atol=1e-5)

    def test_bad_input(self, tiny_preset, tmp_path, monkeypatch):
        lm, path = CausalLM.from_preset(str(tiny_preset), backend="torch"), tmp_path / "lm.tflite"
        for options, message in (
            ({"sequence_length": 0}, "sequence_length must be a whole number from 1 to 128, got 0"),
            ({"sequence_length": 129}, "from 1 to 128, got 129"),
            ({"batch_size": 1.5}, "batch_size"),
        ):
            with pytest.raises(InputError, match=message):
                modelhub.to_litert(lm, path, **options)
        with monkeypatch.context() as patch:
            patch.setattr(litert, "_LARGEST", 1000)
            with pytest.raises(InputError, match="at most 2 GB"):
                modelhub.to_litert(lm, path)
        assert not list(tmp_path.iterdir())
        path.write_text("mine")
        with pytest.raises(InputError, match="there already"):
            modelhub.to_litert(lm, path)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(InputError, match="there already"):
            modelhub.to_litert(lm, "~/lm.tflite")
        with pytest.raises(InputError, match="cannot be written"):
            modelhub.to_litert(lm, path / "lm.tflite")
        assert path.read_text() == "mine" and os.listdir(tmp_path) == ["lm.tflite"]
