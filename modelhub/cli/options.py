"""Options that several commands share. Their names are the parameters' of the Python API."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from modelhub.errors import InputError


class _Flags:
    """Flags take no value, and show none."""

    def get_params(self, context: Any) -> list[Any]:
        params: list[Any] = super().get_params(context)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_Flags, TyperCommand):
    pass


class _Group(_Flags, TyperGroup):
    pass


class App(typer.Typer):
    def __init__(self, **settings: Any):
        super().__init__(cls=_Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable:
        return super().command(name, cls=_Command, **settings)


def option(help: str, panel: str | None = None, *names: str) -> Any:
    """panel: the group in `--help` it stands in."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


Preset = Annotated[str, typer.Argument(help="a registry name, a folder, a .gguf file or an hf:// address")]
Adapter = Annotated[str | None, option("a LoRA adapter on top: a folder of finetune or of PEFT")]
Backend = Annotated[str | None, option("jax, torch, tensorflow, numpy or fastest; default: the best installed")]
Device = Annotated[str | None, option("cpu, gpu, gpu:1, tpu or mps; default: the best present")]
Dtype = Annotated[str | None, option("float32, bfloat16 or float16; default: float32 on a CPU, else the preset's")]
Quantize = Annotated[
    str | None,
    option("int8, int4, keep (as a quantised file is), or *=int4,lm_head=int8; default: floats"),
]
Offline = Annotated[bool, option("use the cache only")]
Json = Annotated[bool, option("print JSON for scripts", None, "--json")]

MaxNewTokens = Annotated[
    int | None, option("stop after this many tokens (default: the preset's, else 64, in a chat 512)")
]
Temperature = Annotated[float | None, option("divide the logits by this before sampling")]
TopK = Annotated[int | None, option("sample among the k likeliest tokens")]
TopP = Annotated[float | None, option("sample among the likeliest that make up this probability")]
MinP = Annotated[float | None, option("... at least this likely, relative to the likeliest")]
RepetitionPenalty = Annotated[float | None, option("above 1: say less again")]
Seed = Annotated[int, option("the same seed gives the same text on every backend")]


def template_options(given: list[str] | None) -> dict[str, Any]:
    """{key: value} of KEY=VALUE; values are JSON where they can be read as such, else text."""
    found: dict[str, Any] = {}
    for entry in given or ():
        key, equals, value = entry.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--template-option must be KEY=VALUE, such as enable_thinking=false; got {entry!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def answer_as_json(lm: Any, text: str) -> str:
    about = {"preset": lm.preset, "backend": lm.backend, "device": lm.device, "text": text}
    return json.dumps(about | asdict(lm.last_run))


def rate(run: Any, before: str) -> str:
    """How fast it was, as text; nothing where too few tokens came to tell."""
    return "" if run.tokens_per_second is None else f"{before}{run.tokens_per_second:.1f} tokens/s"


DATA = "Data"
Data = Annotated[
    str | None,
    option(
        "a .jsonl, .json, .csv or .parquet file (dolly_style.jsonl is bundled); images: also a folder of folders", DATA
    ),
]
SequenceLength = Annotated[int | None, option("tokens of a row; longer examples are cut (default: 1024)", DATA)]
BatchSize = Annotated[int | None, option("rows of sequence_length in one step (default: 4; images: 32)", DATA)]
Packing = Annotated[bool | None, option("several examples in a row (default), or one", DATA)]
LossOn = Annotated[str | None, option("response (default), or all: prompts are learnt too", DATA)]
Template = Annotated[
    str | None, option("of instruction records: text with {instruction}, {context}, {response}; or chat", DATA)
]
TemplateOption = Annotated[
    list[str] | None,
    option(
        "KEY=VALUE for the chat template, such as enable_thinking=false; may be given several times",
        DATA,
        "--template-option",
    ),
]
OnError = Annotated[str | None, option("rows or images that cannot be read: raise (default), or skip", DATA)]
Kind = Annotated[str | None, option("of the records, if the keys do not tell: dolly, alpaca, prompt, ...", DATA)]
