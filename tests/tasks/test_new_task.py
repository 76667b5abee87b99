"""A third kind of task, in one class and one registration: what the rest of the house makes of it without knowing it."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

import modelhub
from modelhub.errors import InputError
from modelhub.hub import publish
from modelhub.kinds import TASKS, TEXT, TaskKind, Usage, register_kind, text_hidden
from modelhub.tasks.task import Task

TEXTS = ["The river runs past the old mill.", "Numbers such as 12 are written with digits."]


def mean_pooled(xp, model, input_ids, attention_mask=None, position_ids=None):
    """float32 embeddings (B, D) of length 1: the mean over the tokens."""
    hidden = xp.cast(text_hidden(xp, model, input_ids, attention_mask, position_ids), "float32")
    if attention_mask is None:
        pooled = xp.mean(hidden, axis=1)
    else:
        mask = xp.expand_dims(xp.cast(attention_mask, "float32"), -1)
        pooled = xp.sum(hidden * mask, axis=1) / xp.sum(mask, axis=1)
    return pooled * xp.rsqrt(xp.sum(pooled * pooled, axis=-1, keepdims=True))


class TextEmbedder(Task):
    """Texts as vectors, whose products say how alike they are."""

    kind = register_kind(
        TaskKind(
            name="sentence-similarity", class_name="TextEmbedder", module="embedders", noun="text embedder",
            reads=frozenset({TEXT}), forward=mean_pooled, output="embeddings", head=None, unit="texts",
            pipeline="sentence-similarity", auto_class="AutoModel", processor="AutoTokenizer", peft="FEATURE_EXTRACTION",
            variable="embedder",
            usage=Usage(
                'print(embedder.embed(["The river"]))',
                ('inputs = tokenizer("The river", return_tensors="pt")',
                 "print(model(**inputs).last_hidden_state.mean(1))"),
            ),
        )
    )  # fmt: skip

    def __init__(self, backbone, tokenizer, preset=""):
        super().__init__(backbone, preset)
        self.tokenizer = tokenizer

    @classmethod
    def processors(cls, source):
        return (source.tokenizer(),)

    def write_processors(self, folder):
        self.tokenizer.save(folder)

    def embed(self, texts):
        """float32 (texts, width)."""
        now = self.backbone.weights.snapshot()
        program = now.program(
            "embed", lambda now: now.xp.compile(lambda model, ids: mean_pooled(now.xp, model, ids), now.skeleton)
        )
        rows = (self.backbone.check_ids([self.tokenizer.encode(text)]) for text in texts)
        return np.concatenate([now.xp.get(program(now.params, now.xp.array(row, "int32"))) for row in rows])


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    yield
    del TASKS["sentence-similarity"]


@pytest.fixture
def embedder(tiny_preset):
    return TextEmbedder.from_preset(tiny_preset, backend="torch", dtype="float32")


def theirs(folder, texts=TEXTS, adapter=None):
    """The same with transformers, and PEFT."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            pooled = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        rows.append((pooled / pooled.norm()).numpy())
    return np.stack(rows)


def adapted(embedder):
    """With an adapter that changes something."""
    embedder.enable_lora(rank=2, targets="all-linear")
    generator = np.random.default_rng(0)
    noise = {
        n: generator.normal(0, 0.1, tuple(x.shape)).astype(np.float32)
        for n, x in embedder.params.items()
        if ".lora." in n
    }
    embedder.load_params(noise)
    return embedder


def test_it_embeds_as_transformers_does(embedder, tiny_preset):
    np.testing.assert_allclose(embedder.embed(TEXTS), theirs(tiny_preset), atol=1e-5)


def test_what_it_is_made_of_is_not_written_twice(embedder):
    assert repr(embedder).startswith(f"TextEmbedder({embedder.preset!r}, backend='torch'")
    with pytest.raises(TypeError, match=r"TextEmbedder.from_preset\(\) has no torch_dtype; did you mean dtype="):
        TextEmbedder.from_preset("x", torch_dtype="auto")
    with pytest.raises(InputError, match="reads images; load it as ImageClassifier"):
        TextEmbedder.from_preset("vit_tiny_fashion", backend="numpy")


def test_saved_and_its_card(embedder, tmp_path):
    embedder.save_to_preset(tmp_path / "saved")
    np.testing.assert_allclose(theirs(tmp_path / "saved"), embedder.embed(TEXTS), atol=1e-5)
    again = TextEmbedder.from_preset(tmp_path / "saved", backend="numpy")
    np.testing.assert_allclose(again.embed(TEXTS), embedder.embed(TEXTS), atol=1e-5)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card and "A text embedder of the `gemma3_text` architecture" in card
    assert "from embedders import TextEmbedder" in card and "embedder.embed(" in card
    assert "from transformers import AutoModel, AutoTokenizer" in card and "CausalLM" not in card


def test_its_adapter_is_one_for_features(embedder, tmp_path, tiny_preset):
    before = embedder.embed(TEXTS)
    adapted(embedder).save_adapter(tmp_path / "adapter")
    wanted = embedder.embed(TEXTS)
    assert np.abs(wanted - before).max() > 0.01
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    np.testing.assert_allclose(theirs(tiny_preset, adapter=tmp_path / "adapter"), wanted, atol=1e-5)
    again = TextEmbedder.from_preset(tiny_preset, backend="numpy")
    again.load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(again.embed(TEXTS), wanted, atol=1e-5)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "An adapter (LoRA) for a text embedder" in card and 'embedder.load_adapter("path/to/this/folder")' in card
    assert "AutoModel.from_pretrained(" in card and "PeftModel.from_pretrained(model" in card


def test_exports_give_embeddings(embedder, tmp_path):
    ids = embedder.backbone.check_ids([embedder.tokenizer.encode(TEXTS[0])])
    mask, wanted = np.ones_like(ids), embedder.embed(TEXTS[:1])
    found = modelhub.to_torch(embedder)(torch.from_numpy(ids).long(), torch.from_numpy(mask))
    np.testing.assert_allclose(found.embeddings.detach().numpy(), wanted, atol=1e-5)
    params, fn = modelhub.to_jax(TextEmbedder.from_preset(embedder.preset, backend="numpy"))
    np.testing.assert_allclose(fn(params, ids, mask), wanted, atol=1e-5)


def test_onnx_gives_embeddings(embedder, tmp_path):
    session = pytest.importorskip("onnxruntime").InferenceSession
    pytest.importorskip("onnxscript")
    ids = embedder.backbone.check_ids([embedder.tokenizer.encode(TEXTS[0])]).astype(np.int64)
    running = session(modelhub.to_onnx(embedder, tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in running.get_outputs()] == ["embeddings"]
    padded = np.pad(ids, ((0, 0), (3, 0)))
    (found,) = running.run(None, {"input_ids": padded, "attention_mask": (padded > 0).astype(np.int64)})
    np.testing.assert_allclose(found, embedder.embed(TEXTS[:1]), atol=1e-4)


def test_published_and_loaded_again(embedder, tmp_path):
    hub = (tmp_path / "hub").as_uri() + "/me/embedder"
    plan = embedder.publish(hub, licence="mit", from_scratch=True, dry_run=True)
    assert isinstance(plan, publish.Plan) and "README.md" in {change.name for change in plan.files}
    done = adapted(embedder).publish(hub, licence="mit", from_scratch=True)
    again = TextEmbedder.from_preset(done.address, backend="numpy")
    np.testing.assert_allclose(again.embed(TEXTS), embedder.embed(TEXTS), atol=1e-4)
    assert "pipeline_tag: sentence-similarity" in (tmp_path / "hub" / "me" / "embedder" / "README.md").read_text()
