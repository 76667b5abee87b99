"""The model card: README.md of what is saved and published.

Its front matter is the Hugging Face Hub's (https://huggingface.co/docs/hub/model-cards). Only what is known is said.
Names come from users and from strangers' files: none of them can end the front matter or become markup.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from modelhub.errors import InputError
from modelhub.hub import licences
from modelhub.hub.markdown import clean, code, escaped, fenced, literal, table
from modelhub.hub.provenance import PRESET, Provenance, TrainingRun, is_repo_id
from modelhub.kinds import TaskKind, Usage, kind_named

_FLOATS = ("float32", "float16", "bfloat16")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # ISO 639, as the Hub asks
_RUNS_SHOWN = 10
_ROWS = 40  # of a table
_LOSSES_SHOWN = 8


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    task: the name of a TaskKind. parameters: of the model, or of the adapter. adapter: the folder is
    PEFT's. languages: ISO 639 codes. datasets: names on the Hub of what it was trained on. address: where it is
    published; None: a folder. curve: name of a picture in the folder. licence_files: names of texts in it.
    provenance: of an adapter, base and base_model are the weights that it goes on. layers: (pattern, name) of layers of
    the user's own, attention: the name of such a function, own_family: whether model_type is one's too: of all these
    nothing but the names is in the folder. classes: of an adapter's own head. problem_type: the config's. quantized:
    (scheme, number of matrices) of quantised weights, in compressed-tensors' form.
    """

    title: str
    task: str
    model_type: str
    parameters: int
    dtype: str
    provenance: Provenance
    adapter: bool
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    address: str | None = None
    has_chat_template: bool = False
    curve: str | None = None
    licence_files: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()
    attention: str | None = None
    own_family: bool = False
    classes: int = 0
    problem_type: str | None = None
    quantized: tuple[tuple[str, int], ...] = ()

    @property
    def kind(self) -> TaskKind:
        return kind_named(self.task)

    @property
    def usage(self) -> Usage:
        usage = self.kind.of_problem.get(self.problem_type or "", self.kind.usage)
        return self.kind.chat if self.has_chat_template and self.kind.chat else usage

    @property
    def own(self) -> list[tuple[str, str]]:
        """Kinds and names of what is to be registered before the model can be loaded."""
        pieces = [("layer", name) for name in dict.fromkeys(name for _, name in self.layers)]
        pieces += [("attention", self.attention)] if self.attention else []
        return pieces + ([("family", self.model_type)] if self.own_family else [])


def check_card(facts: CardFacts | Provenance) -> None:
    """Raises InputError, saying what to add, for a card without a licence or without an origin.

    An origin is a base model that others can get, or the statement that there is none. Warns where the base model's
    licence asks for something that only the publisher can do.
    """
    provenance = facts if isinstance(facts, Provenance) else facts.provenance
    licence, base_model = provenance.licence, provenance.base_model
    problems: list[str] = []
    if licence is None or licence.strip().lower() in ("", "other", "unknown"):
        found = f"licence={licence!r} names none" if licence else "it has no licence"
        problems.append(f'{found}: add licence="apache-2.0", "gemma" or another of {licences.LIST}, or a name of yours')
    elif len(licence) > 200:
        problems.append(f"licence={licence[:20]!r}... has {len(licence)} characters: give its identifier or its name")
    if base_model is not None and not is_repo_id(base_model):
        problems.append(
            f"base_model={base_model[:100]!r} is no repository on the Hugging Face Hub: give it as owner/name"
        )
    elif not base_model and not _origin(provenance) and isinstance(facts, CardFacts) and facts.adapter:
        problems.append(
            "the adapter goes on weights that nobody else can get (a folder of this machine, or trained since): "
            'publish the whole model first, or say base_model="owner/name", the repository on the Hub that holds them'
        )
    elif not base_model and not _origin(provenance) and not provenance.from_scratch:
        problems.append(
            'it does not say what the model was made from: add base_model="owner/name", a repository on the Hugging '
            "Face Hub, or from_scratch=True if the weights began random"
        )
    if problems:
        raise InputError(f"the model card is not complete: {'; '.join(problems)}")
    if terms := _terms(provenance):
        if licence and licence.lower() != terms.licence:
            warnings.warn(
                f"the base model is under the {terms.name}, which licence={licence!r} does not lift: the card and "
                f"NOTICE pass them on. licence={terms.licence!r} says it plainly",
                stacklevel=2,
            )
        if isinstance(facts, CardFacts) and terms.name_begins and not _begins(facts.title, terms.name_begins):
            warnings.warn(
                f"the {terms.name} asks that the name of a derived model begin with {terms.name_begins!r}; this one "
                f"is called {clean(facts.title, 100)!r}: publish it under another name",
                stacklevel=2,
            )


def _begins(title: str, wanted: str) -> bool:
    return re.sub(r"[\W_]+", "", title).lower().startswith(re.sub(r"\s", "", wanted).lower())


def inherited(provenance: Provenance) -> str | None:
    """The licence whose terms follow the weights into whatever is made of them; None: no such terms are known."""
    terms = _terms(provenance)
    return terms.licence if terms else None


def missing_licence(facts: CardFacts) -> str | None:
    """What to tell a publisher whose base model's terms want a copy of themselves to go along, and none is there."""
    terms = _terms(facts.provenance)
    if terms is None or _copies(facts):
        return None
    return (
        f"the {terms.name} ({terms.url}) are to go with every copy, and no text of them came with the base model: put "
        "it as LICENSE into the folder that the model is loaded from, or beside what is published"
    )


def _copies(facts: CardFacts) -> list[str]:
    return [name for name in facts.licence_files if not name.startswith("NOTICE")]


def notice(provenance: Provenance) -> str | None:
    """The text of the file NOTICE, where the licence wants one to be passed on."""
    terms = _terms(provenance)
    if terms is None:
        return None
    base = provenance.base_model or _origin(provenance)
    source = f", starting from {clean(base, 200)}" if base else ""
    return f"{terms.notice}\n\nFiles beside this one were modified or made with modelhub{source}; README.md says how.\n"


def render_card(facts: CardFacts) -> str:
    """The text of README.md: front matter and Markdown."""
    sections = {
        "": [f"# {escaped(facts.title, 100) or 'model'}", *_summary(facts)],
        "Use": _usage(facts),
        "Training": _training(facts),
        "Results": _results(facts.provenance.runs),
        "Licence": _licence(facts),
    }
    blocks = [f"---\n{_front_matter(facts)}\n---"]
    for heading, section in sections.items():
        blocks += [*([f"## {heading}"] if heading and section else []), *section]
    return "\n\n".join(blocks) + "\n"


# --- front matter ---------------------------------------------------------------------------------------------------


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub.repocard_data import ModelCardData

    provenance, runs = facts.provenance, facts.provenance.runs
    results = _validation(runs)
    base_model = _base_model(provenance)
    lora = ["lora"] if facts.adapter or any(run.adapter for run in runs) else []
    packed = ["compressed-tensors", *(f"{scheme[:4]}" for scheme, _ in facts.quantized)] if facts.quantized else []
    tags = [clean(tag, 60) for tag in dict.fromkeys(("modelhub", facts.model_type, *lora, *packed, *facts.tags))]
    relation = "adapter" if facts.adapter else "finetune" if runs else None
    if (facts.quantized or facts.dtype not in _FLOATS) and relation is None:
        relation = "quantized"
    data = ModelCardData(
        language=[name for name in facts.languages if _LANGUAGE.fullmatch(name)] or None,
        **licences.front_matter(provenance.licence or ""),
        library_name="modelhub" if facts.own else "peft" if facts.adapter else "transformers",
        pipeline_tag=facts.kind.pipeline,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        tags=[tag for tag in tags if tag],
        datasets=[name for name in facts.datasets if is_repo_id(name if "/" in name else f"datasets/{name}")] or None,
        metrics=sorted({"accuracy", "exact_match", "mae", "perplexity"} & results.keys())
        or None,  # those that the Hub knows
        model_name=clean(facts.title, 100) or "model",
        eval_results=_eval_results(facts, results) or None,
    )
    return data.to_yaml()


def _validation(runs: Sequence[TrainingRun]) -> dict[str, float]:
    """What the last run measured on validation data; earlier ones say nothing of these weights."""
    last = runs[-1].metrics if runs else {}
    return {name.removeprefix("val_"): value for name, value in last.items() if name.startswith("val_")}


def _eval_results(facts: CardFacts, results: dict[str, float]) -> list[Any]:
    from huggingface_hub.repocard_data import EvalResult

    task = facts.kind.pipeline or facts.task
    return [
        # Of the validation data nothing is known but that it went with the run.
        EvalResult(task, "unknown", "validation data of the training run", clean(name, 60), value)
        for name, value in list(results.items())[:_ROWS]
    ]


# --- body -----------------------------------------------------------------------------------------------------------


def _terms(provenance: Provenance) -> licences.Terms | None:
    licence = provenance.base_licence or provenance.licence
    return licences.terms_of(licence, provenance.base_model, provenance.base) or licences.terms_of(provenance.licence)


def _base_model(provenance: Provenance) -> str | None:
    return provenance.base_model if provenance.base_model and is_repo_id(provenance.base_model) else None


def _origin(provenance: Provenance) -> str | None:
    """base, if others can get it: not a path of some machine."""
    base = provenance.base or ""
    return base if re.match(r"(?!file:)[a-z]{2,}:", base) else None


def _link(repo: str) -> str:
    return f"[{repo}](https://huggingface.co/{repo})"


def _summary(facts: CardFacts) -> list[str]:
    provenance, kind = facts.provenance, facts.kind.noun
    base_model, origin = _base_model(provenance), _origin(provenance)
    what = f"An adapter (LoRA) for a {kind}" if facts.adapter else f"{'An' if kind[0] in 'aeiou' else 'A'} {kind}"
    size = f"{facts.parameters:,} parameters, {escaped(facts.dtype, 20)}"
    text = f"{what} of the {code(facts.model_type)} architecture: {size}."
    how = "Goes on top of" if facts.adapter else "Fine-tuned from" if provenance.runs else "Saved from"
    preset = (origin or "").startswith(PRESET)
    named = f"modelhub's preset {code(origin.removeprefix(PRESET))}" if origin and preset else code(origin or "")
    files = f" (its files: {named})" if origin and not origin.startswith(f"hf://{base_model}") else ""
    if base_model:
        text += f" {how} {_link(base_model)}{files} with modelhub."
    elif origin:
        text += f" {how} {named} with modelhub."
    elif provenance.from_scratch:
        text += " Trained from scratch with modelhub: there is no base model."
    if facts.quantized:
        kinds = ", ".join(f"{count} in {code(scheme)}" for scheme, count in facts.quantized)
        text += (
            f" Its weights are quantised: of the matrices {kinds}, with a scale for each 16 or 32 columns, in "
            'compressed-tensors\' form (transformers takes `pip install compressed-tensors`; `quantize="keep"` keeps '
            "them in modelhub)."
        )
    terms = _terms(provenance)
    return [text, *([f"**{terms.credit}**"] if terms and terms.credit else [])]


def _usage(facts: CardFacts) -> list[str]:
    provenance, address = facts.provenance, facts.address or "path/to/this/folder"
    place, revision = literal(address), ""
    setup: list[str] = []
    if address.startswith("hf://"):
        repo, _, named = address.removeprefix("hf://").partition("@")
        place, revision = literal(repo), f", revision={literal(named)}" if named else ""
    elif address.startswith("kaggle://"):
        handle = literal(address.removeprefix("kaggle://"))
        place, setup = "folder", [f"folder = kagglehub.model_download({handle})"]
    elif address.startswith("file://"):
        place = literal(url2pathname(urlsplit(address).path))
    base, origin = _base_model(provenance) or "path/to/the/base/model", _origin(provenance) or ""
    our_base = f"hf://{base}" if _base_model(provenance) else base
    if origin.startswith(PRESET) or "://" in origin:
        our_base = origin.removeprefix(PRESET)
    ours = fenced(_with_modelhub(facts, literal(address), literal(our_base)))
    if facts.own:
        named = ", ".join(f"the {kind} {code(name)}" for kind, name in facts.own)
        return [
            f"The model has pieces of its own, whose code is not in this folder: {named}. Run the code that registers "
            f'them (`@modelhub.register("{facts.own[0][0]}", ...)`) first. Other tools, such as transformers, would '
            f"compute something else. With modelhub:",
            ours,
        ]
    return [
        "With modelhub:",
        ours,
        "With transformers and PEFT:" if facts.adapter else "With transformers:",
        fenced(_with_transformers(facts, place, revision, literal(base), setup)),
    ]


def _with_modelhub(facts: CardFacts, where: str, base: str) -> list[str]:
    kind = facts.kind
    asked = ""  # of a whole model, config.json says it
    if facts.adapter and facts.layers:
        asked += f", layers={{{', '.join(f'{literal(at)}: {literal(layer)}' for at, layer in facts.layers)}}}"
    if facts.adapter and facts.attention:
        asked += f", attention={literal(facts.attention)}"
    if facts.classes:
        asked += f", num_classes={facts.classes}"
        if facts.problem_type and facts.problem_type in kind.of_problem:  # a new head is for a single label
            asked += f", problem_type={literal(facts.problem_type)}"
    load = [f"{kind.variable} = {kind.class_name}.from_preset({base if facts.adapter else where}{asked})"]
    if facts.adapter:
        load.append(f"{kind.variable}.load_adapter({where})")
    return [f"from {kind.module} import {kind.class_name}", "", *load, facts.usage.ours]


def _with_transformers(facts: CardFacts, where: str, revision: str, base: str, setup: list[str]) -> list[str]:
    kind, use = facts.kind, facts.usage
    source = base if facts.adapter else where + revision
    name = "tokenizer" if kind.processor == "AutoTokenizer" else "processor"
    own_head = f", num_labels={facts.classes}, ignore_mismatched_sizes=True" if facts.classes else ""
    return [
        *(["import kagglehub"] if setup else []),
        *(["from peft import PeftModel"] if facts.adapter else []),
        *use.imports,
        f"from transformers import {', '.join(sorted([kind.processor, kind.auto_class]))}",
        "",
        *setup,
        f"{name} = {kind.processor}.from_pretrained({source})",
        f"model = {kind.auto_class}.from_pretrained({source}{own_head})",
        *([f"model = PeftModel.from_pretrained(model, {where}{revision})"] if facts.adapter else []),
        *use.theirs,
    ]


def _training(facts: CardFacts) -> list[str]:
    runs = facts.provenance.runs
    blocks: list[str] = []
    if len(runs) > _RUNS_SHOWN:
        blocks.append(f"{len(runs)} runs; the last {_RUNS_SHOWN}:")
    for number, run in list(enumerate(runs, 1))[-_RUNS_SHOWN:]:
        if len(runs) > 1:
            blocks.append(f"### Run {number}")
        blocks += _run(run)
        if number == len(runs):
            if facts.curve:
                blocks.append(f"![The loss of each step]({quote(clean(facts.curve, 200))})")
            blocks += _losses(run)
    return blocks


def _run(run: TrainingRun) -> list[str]:
    amount = [f"{count:,} {name}" for count, name in [(run.examples, "examples"), (run.tokens, "tokens")] if count]
    text = f"Trained on {code(run.data)}" + (f" ({', '.join(amount)})" if amount else "")
    text += f": {_trained(run)}"
    text += f", on the backend {code(run.backend)}" + (f" in {_duration(run.seconds)}" if run.seconds else "")
    text += f"; it ended {code(run.date, 40)}." if run.date else "."
    settings = [
        (code(name, 60), code(value))
        for table in (run.settings, run.adapter or {})
        for name, value in table.items()
        if value is not None
    ]
    return [text, table(("setting", "value"), settings[:_ROWS])] if settings else [text]


def _trained(run: TrainingRun) -> str:
    """What of the model the run changed."""
    count = "" if run.trained is None else f"{run.trained:,} parameters"
    if run.adapter:
        what = "an adapter (LoRA)" + (" and the head" if run.part == "head" else "")
        return f"{what}, {count}" if count else what
    if run.part == "head":
        return f"the head ({count + '; ' if count else ''}the encoder is unchanged)"
    if run.settings.get("freeze_backbone") is True:  # noted before `part` was
        return "the head (the encoder is unchanged)"
    return f"all weights ({count})" if count else "all weights"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _losses(run: TrainingRun) -> list[str]:
    losses = run.losses
    if not losses:
        return []
    shown = min(_LOSSES_SHOWN, len(losses))
    chosen = [losses[i * (len(losses) - 1) // max(shown - 1, 1)] for i in range(shown)]
    return [table(("step", "loss"), [(str(step), f"{loss:.4g}") for step, loss in chosen])]


def _results(runs: Sequence[TrainingRun]) -> list[str]:
    if not runs or not (metrics := runs[-1].metrics):
        return ["No evaluation has been recorded."]
    said = "Of the last epoch: means over the data that was trained on, while it was learnt"
    if any(name.startswith("val_") for name in metrics):
        said += "; `val_`: measured after it, on validation data."
    else:
        said += ". Nothing was measured on other data."
    rows = [(code(name, 60), f"{value:.4g}") for name, value in list(metrics.items())[:_ROWS]]
    return [said, table(("measure", "value"), rows)]


def _licence(facts: CardFacts) -> list[str]:
    provenance = facts.provenance
    terms = _terms(provenance)
    blocks = [f"{code(provenance.licence)}."] if (provenance.licence or "").strip() else []
    if terms:
        blocks.append(
            f"{terms.notice.rstrip('.')}. Use and distribution are governed by the [{terms.name}]({terms.url}), which "
            f"you accept by using or distributing this model. Its use restrictions ({terms.restrictions}) bind "
            "everybody who uses it, passes it on or builds on it. Whoever passes it on gives a copy of these terms and "
            "the file NOTICE along."
        )
    if copies := _copies(facts):
        blocks.append(f"Beside this card are the texts that came with the base model: {', '.join(map(code, copies))}.")
    if _base_model(provenance) or _origin(provenance):
        blocks.append(_changes(facts))
    return blocks


def _changes(facts: CardFacts) -> str:
    """What licences such as Apache 2.0 (section 4b) and Gemma's (3.1) want said of modified files."""
    if facts.adapter:
        return "This is an adapter alone: the base model's own weights are not part of it."
    how = (
        " and ".join(sorted({_way(run) for run in facts.provenance.runs}, reverse=True))
        or "the files were written anew; no training has been recorded"
    )
    return f"Changed from the base model with modelhub: {how}."


def _way(run: TrainingRun) -> str:
    if run.adapter:
        return "a trained adapter was merged into the weights" + (
            ", under a trained head" if run.part == "head" else ""
        )
    head = run.part == "head" or run.settings.get("freeze_backbone") is True
    return "the head was trained, and the encoder left as it was" if head else "all weights were trained further"
