"""What users of Keras, transformers, PEFT and TRL type is told in their call's error, and nothing else changes."""

import inspect
import pickle
import subprocess
import sys

import pytest

import modelhub
from modelhub import CausalLM, ImageClassifier, optim
from modelhub.core.backends import backend_name, get_backend
from modelhub.errors import InputError, UnknownBackend
from modelhub.habits import ADVICE, ATTRIBUTES, CALLBACKS, KEYWORDS, dtype_name, explained
from modelhub.training import EarlyStopping


@pytest.fixture(scope="module")
def lm():
    return CausalLM.from_preset("gemma3_tiny", backend="numpy")


@pytest.fixture(scope="module")
def clf():
    return ImageClassifier.from_config(
        3, image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        backend="numpy",
    )  # fmt: skip


# What they write, the name of the call, and what the error says to write instead.
TYPED = [
    (lambda lm: lm.generate("a", max_length=5), "CausalLM.generate", "did you mean max_new_tokens=?"),
    (lambda lm: lm.generate("a", max_tokens=5), "CausalLM.generate", "did you mean max_new_tokens=?"),
    (lambda lm: lm.generate("a", do_sample=True), "CausalLM.generate", "temperature=, top_k=, top_p= or min_p="),
    (lambda lm: lm.generate("a", temprature=1.0), "CausalLM.generate", "did you mean temperature=?"),
    (lambda lm: lm.generate("a", learning_rate=1.0), "CausalLM.generate", "CausalLM.compile(learning_rate=...)"),
    (lambda lm: lm.chat([{"role": "user", "content": "a"}], max_tokens=5), "CausalLM.chat", "did you mean max_new_tokens=?"),
    (lambda lm: lm.compile(lr=1e-4), "CausalLM.compile", "did you mean learning_rate=?"),
    (lambda lm: lm.compile(weighted_metrics=[]), "CausalLM.compile", "did you mean metrics=?"),
    (lambda lm: lm.compile(jit_compile=True), "CausalLM.compile", "did you mean jit=?"),
    (lambda lm: lm.compile(run_eagerly=True), "CausalLM.compile", "jit=False compiles nothing"),
    (lambda lm: lm.compile(sampler="greedy"), "CausalLM.compile", "CausalLM.generate(sampler=...) takes it"),
    (lambda lm: lm.fit([], max_seq_length=9), "CausalLM.fit", "lm.preprocessor.sequence_length = 512"),
    (lambda lm: lm.fit([], sequence_length=9), "CausalLM.fit", "lm.preprocessor.sequence_length = 512"),
    (lambda lm: lm.fit([], eval_strategy="epoch"), "CausalLM.fit", "validation_data="),
    (lambda lm: lm.fit([], gradient_checkpointing=True), "CausalLM.fit", "CausalLM.compile(remat=...) takes it"),
    (lambda lm: lm.fit([], report_to="wandb"), "CausalLM.fit", "modelhub.training.WandbLogger()"),
    (lambda lm: lm.fit([], logging_steps=1), "CausalLM.fit", "History"),
    (lambda lm: lm.fit([], num_train_epochs=1), "CausalLM.fit", "did you mean epochs=?"),
    (lambda lm: lm.fit([], max_steps=1), "CausalLM.fit", "did you mean steps=?"),
    (lambda lm: lm.fit([], warmup_steps=1), "CausalLM.fit", "modelhub.optim.Linear(warmup_steps=100)"),
    (lambda lm: lm.fit([], gradient_accumulation_steps=1), "CausalLM.fit", "did you mean grad_accum=?"),
    (lambda lm: lm.fit([], steps_per_epoch=1), "CausalLM.fit", "steps of the whole run"),
    (lambda lm: lm.fit([], shuffle=True), "CausalLM.fit", "shuffled anew in each epoch"),
    (lambda lm: lm.fit([], sample_weight=[]), "CausalLM.fit", "compile(loss=...)"),
    (lambda lm: lm.fit([], lr=1e-4), "CausalLM.fit", "CausalLM.compile(learning_rate=...) takes it"),
    (lambda lm: lm.evaluate([], max_length=1), "CausalLM.evaluate", "lm.preprocessor.sequence_length"),
    (lambda lm: lm.score("a", batch_size=1), "CausalLM.score", "CausalLM.fit(batch_size=...) takes it"),
    (lambda lm: lm.enable_lora(r=8), "CausalLM.enable_lora", "did you mean rank=?"),
    (lambda lm: lm.enable_lora(lora_alpha=8), "CausalLM.enable_lora", "did you mean alpha=?"),
    (lambda lm: lm.enable_lora(lora_dropout=0.1), "CausalLM.enable_lora", "did you mean dropout=?"),
    (lambda lm: lm.enable_lora(target_modules=["q"]), "CausalLM.enable_lora", "did you mean targets=?"),
    (lambda lm: lm.backbone.enable_lora(r=8), "Backbone.enable_lora", "did you mean rank=?"),
    (lambda lm: CausalLM.from_preset("x", torch_dtype="auto"), "CausalLM.from_preset", "did you mean dtype=?"),
    (lambda lm: CausalLM.from_preset("x", device_map="auto"), "CausalLM.from_preset", "did you mean device=?"),
    (lambda lm: CausalLM.from_preset("x", trust_remote_code=True), "CausalLM.from_preset", "never run"),
    (lambda lm: CausalLM.from_preset("x", max_seq_length=9), "CausalLM.from_preset", "preprocessor.sequence_length"),
    (lambda lm: lm.save_to_preset("x", safe_serialization=True), "CausalLM.save_to_preset", "but safetensors"),
    (lambda lm: lm.publish("hf://a/b", commit_message=""), "CausalLM.publish", "did you mean message=?"),
    (lambda lm: lm.tokenizer.encode("a", add_special_token=True), "Tokenizer.encode", "add_special_tokens=?"),
    (lambda lm: optim.AdamW(lr=1e-4), "AdamW", "did you mean learning_rate=?"),
    (lambda lm: optim.Cosine(num_warmup_steps=1), "Cosine", "did you mean warmup_steps=?"),
    (lambda lm: EarlyStopping(restore_best_weights=True), "EarlyStopping", "BestCheckpoint"),
    (lambda lm: modelhub.Augment(random_flip=True), "Augment", "it takes"),
    (lambda lm: modelhub.to_onnx(lm, "x", opset_version=17), "to_onnx", "did you mean opset=?"),
    (lambda lm: modelhub.list_presets(famly="gemma"), "list_presets", "did you mean family=?"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "says"), TYPED, ids=[f"{name}-{i}" for i, (_, name, _) in enumerate(TYPED)])
def test_the_error_names_our_keyword(lm, call, name, says):
    with pytest.raises(TypeError) as caught:
        call(lm)
    assert isinstance(caught.value, InputError)  # the command line shows no traceback of it
    assert str(caught.value).startswith(f"{name}() has no ") and says in str(caught.value)
    assert "Traceback" not in str(caught.value) and caught.value.__cause__ is None


def test_images_have_the_same_help(clf):
    for call, says in [
        (lambda: clf.predict([], top_n=3), "ImageClassifier.predict() has no top_n; did you mean top=?"),
        (lambda: clf.fit([], x=[]), "did you mean data=?"),
        (lambda: clf.compile(label_smoothing_factor=0.1), "did you mean label_smoothing=?"),
        (lambda: clf.fit(data=[], y=[]), "fit((images, labels))"),
        (lambda: ImageClassifier.from_preset("x", num_labels=3), "did you mean num_classes=?"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert says in str(caught.value)


def test_several_at_once_and_the_other_mistakes_of_a_call(lm):
    with pytest.raises(TypeError, match=r"has no r; did you mean rank=\?; no lora_alpha; did you mean alpha=\?"):
        lm.enable_lora(r=8, lora_alpha=16)
    with pytest.raises(TypeError, match=r"^CausalLM.generate\(\) missing 1 required positional argument: 'prompt'"):
        lm.generate()
    with pytest.raises(TypeError, match=r"^CausalLM.enable_lora\(\) takes from 1 to 7 positional arguments"):
        lm.enable_lora(1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(TypeError, match=r"CausalLM\(\) missing .*To load a model: CausalLM.from_preset\(name\)"):
        CausalLM("gemma3_tiny")


def test_errors_from_inside_a_call_stay_what_they_are():
    @explained
    def outer(value):
        return inner(value)

    def inner(value, *, needed):
        return value

    with pytest.raises(TypeError, match="inner") as caught:
        outer(1)
    assert not isinstance(caught.value, InputError)

    @explained
    def fails(value):
        raise TypeError("of its own")

    with pytest.raises(TypeError, match="^of its own$"):
        fails(1)


def test_signatures_and_documentation_are_as_written():
    assert list(inspect.signature(CausalLM.generate).parameters)[:3] == ["self", "prompt", "max_new_tokens"]
    assert list(inspect.signature(CausalLM.from_preset).parameters)[0] == "preset"
    assert CausalLM.generate.__doc__.startswith("Continue a prompt")
    assert inspect.signature(optim.AdamW).parameters["weight_decay"].default == 0.01
    assert pickle.loads(pickle.dumps(optim.AdamW(1e-3))) == optim.AdamW(1e-3)
    assert inspect.signature(modelhub.to_onnx).parameters["opset"].default is None


def test_every_name_that_is_given_exists():
    """What the tables advise is there: a keyword that was renamed must be renamed in them."""
    calls = [
        getattr(cls, name)
        for cls in (CausalLM, ImageClassifier, modelhub.Backbone, modelhub.Tokenizer)
        for name in dir(cls)
        if not name.startswith("_") and callable(getattr(cls, name))
    ]
    calls += [optim.AdamW, optim.Cosine, EarlyStopping, modelhub.Augment, modelhub.to_onnx, modelhub.list_presets]
    from modelhub.conversion import convert

    known = {name for call in [*calls, convert] for name in inspect.signature(call).parameters}
    planned = {"quantize", "objective", "template_options"}
    missing = {ours for all_ours in KEYWORDS.values() for ours in all_ours} - known - planned - ADVICE.keys()
    assert not missing
    for theirs, ours in ATTRIBUTES.items():
        first = ours.split("(")[0].split(",")[0].split(";")[0].split(" ")[0].split(".")
        assert first[0] in ("modelhub", "nothing:") or any(
            hasattr(cls, first[0]) or first[0] in ("backbone", "tokenizer", "generation_config", "preset")
            for cls in (CausalLM, ImageClassifier)
        ), (theirs, ours)  # fmt: skip
    for theirs, ours in CALLBACKS.items():
        if ours.startswith("modelhub.training."):
            assert hasattr(modelhub.training, ours.split(".")[2].split("(")[0].split(",")[0].split(":")[0]), theirs


def test_attributes_of_other_libraries(lm, clf):
    for name, says in [
        ("push_to_hub", 'CausalLM has no push_to_hub: use publish("hf://owner/name")'),
        ("save_pretrained", "save_to_preset(folder)"),
        ("merge_and_unload", "merge_lora()"),
        ("state_dict", "params"),
        ("cuda", 'to(device="gpu")'),
        ("eval", "nothing: dropout is on in fit alone"),
        ("tokenize", "tokenizer.encode(text)"),
    ]:
        with pytest.raises(AttributeError) as caught:
            getattr(lm, name)
        assert says in str(caught.value)
    for thing, name in ((lm, "nothing_like_it"), (clf, "apply_chat_template"), (lm.tokenizer, "push_to_hub")):
        assert not hasattr(thing, name)
        with pytest.raises(AttributeError, match=f"object has no attribute '{name}'"):
            getattr(thing, name)


def test_a_property_that_fails_says_why(lm):
    class Broken(CausalLM):
        @property
        def summary_of_mine(self):
            return self.backbone.no_such_thing

    broken = Broken(lm.backbone, lm.tokenizer, {})
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = broken.summary_of_mine


@pytest.mark.parametrize(
    ("kind", "bases", "says"),
    [
        ("EarlyStopping", (), "modelhub.training.EarlyStopping"),
        ("ModelCheckpoint", (), "BestCheckpoint"),
        ("ReduceLROnPlateau", (), "schedule="),
        ("Mine", ("Callback",), "with the same hooks"),
    ],
)
def test_callbacks_of_other_libraries(tiny_preset, backend, kind, bases, says):
    if backend.name == "numpy":
        pytest.skip("it does not train")
    theirs = type(kind, tuple(type(base, (), {}) for base in bases), {})
    lm = CausalLM.from_preset(tiny_preset, backend=backend.name)
    with pytest.raises(InputError, match="callbacks must be objects of") as caught:
        lm.fit(["The river runs past the old mill."], callbacks=[theirs()])
    assert f"in place of {kind} take" in str(caught.value) and says in str(caught.value)


def test_what_is_trained_is_told_in_the_words_of_peft(capsys):
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy")
    lm.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 2,098,560 || all params: 2,098,560 || trainable%: 100.0000\n"
    lm.enable_lora(rank=4)
    count = sum(x.size for x in lm.backbone.adapter.params.values())
    share = 100 * count / (2_098_560 + count)
    lm.print_trainable_parameters()
    expected = f"trainable params: {count:,} || all params: {2_098_560 + count:,} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == expected


def test_what_is_trained_of_an_image_classifier(clf, capsys):
    head = 3 * 8 + 3
    clf.freeze_backbone()
    try:
        clf.print_trainable_parameters()
    finally:
        clf.freeze_backbone(False)
    assert capsys.readouterr().out.startswith(f"trainable params: {head} || ")


def test_reprs(clf):
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy")
    where = "backend='numpy', device='cpu', dtype='float32'"
    assert repr(lm) == f"CausalLM('gemma3_tiny', {where})"
    assert repr(lm.backbone) == f"Backbone('gemma3_text', 2,098,560 parameters, {where})"
    assert repr(clf) == f"ImageClassifier(a vit without a preset, 3 classes, {where})"
    lm.enable_lora(rank=4, name="mine")
    assert repr(lm) == f"CausalLM('gemma3_tiny', {where}, adapter='mine')"
    count = sum(x.size for x in lm.backbone.adapter.params.values())
    assert repr(lm.backbone.adapters) == (
        f"{{'mine': Adapter(rank=4, alpha=4, targets=['q_proj', 'v_proj'], {count:,} parameters)}}"
    )
    lm.merge_lora()
    assert repr(lm.backbone).endswith("adapter='mine' (merged))")


def test_backends_by_the_names_that_people_use(monkeypatch):
    for written, name in [
        ("PyTorch", "torch"),
        ("Torch", "torch"),
        ("tf", "tensorflow"),
        ("JAX", "jax"),
        ("np", "numpy"),
    ]:
        assert backend_name(written) == name
    assert get_backend("NumPy") is get_backend("numpy")
    monkeypatch.setenv("MODELHUB_BACKEND", "Numpy")
    assert get_backend().name == "numpy"
    assert CausalLM.from_preset("gemma3_tiny", backend="np", load_weights=False).backend == "numpy"
    for wrong in ("mxnet", "", 3):
        with pytest.raises(UnknownBackend, match="unknown backend"):
            backend_name(wrong)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [("numpy", "float32"), ("torch", "bfloat16"), ("jax.numpy", "bfloat16"), ("tensorflow", "float16"),
     ("ml_dtypes", "bfloat16")],
)  # fmt: skip
def test_dtypes_of_the_frameworks(module, attribute):
    theirs = getattr(pytest.importorskip(module), attribute)
    assert dtype_name(theirs) == attribute
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy", dtype=theirs, load_weights=False)
    assert lm.dtype == attribute and {lm.backbone.xp.dtype(x) for x in lm.params.values()} == {attribute}


def test_dtypes_in_short(clf, tmp_path):
    import numpy as np

    for written, name in [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("FP32", "float32")]:
        assert dtype_name(written) == name
    assert dtype_name("torch.bfloat16") == "bfloat16" and dtype_name(np.dtype("float32")) == "float32"
    assert dtype_name(None) is None
    lm = CausalLM.from_preset("gemma3_tiny", backend="numpy", dtype="bf16", load_weights=False)
    assert lm.dtype == "bfloat16"
    lm.save_to_preset(tmp_path / "half", dtype="fp16")
    assert CausalLM.from_preset(tmp_path / "half", backend="numpy").config.extra.get("dtype") == "float16"
    for wrong in ("int8", int, 3, "float64"):
        with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16"):
            CausalLM.from_preset("gemma3_tiny", backend="numpy", dtype=wrong)


def test_what_a_bare_import_has():
    script = "import modelhub; print(modelhub.errors.InputError.__name__, modelhub.convert.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["InputError", "convert"]
    assert {"convert", "errors"} <= set(modelhub.__all__)
