"""Pages that are made while the site is built: the command line and the presets, from what defines them."""

import inspect
from collections.abc import Callable, Iterator
from typing import get_type_hints

from typer.models import ArgumentInfo, ParameterInfo

from modelhub import list_presets
from modelhub.cli.commands import app


def on_page_markdown(markdown: str, **_: object) -> str:
    """In place of the marks: what the command line and the cards say."""
    markdown = markdown.replace("<!-- the commands -->", "\n".join(commands()))
    return markdown.replace("<!-- the presets -->", "\n".join(presets()))


def commands() -> Iterator[str]:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        yield f"## {name}\n\n{inspect.cleandoc(command.callback.__doc__ or '')}\n"
        parameters = list(_parameters(command.callback))
        arguments = [names for names, _, info in parameters if isinstance(info, ArgumentInfo)]
        yield f"```bash\n{' '.join(['modelhub', name, *arguments, '[OPTIONS]'])}\n```\n"
        yield "| | |\n|---|---|"
        for names, default, info in parameters:
            yield f"| `{names}` | {_cell(info.help or '')}{f' (default: `{default}`)' if default else ''} |"
        yield ""


def _parameters(function: Callable) -> Iterator[tuple[str, str, ParameterInfo]]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        info = next((x for x in getattr(hints[name], "__metadata__", ()) if isinstance(x, ParameterInfo)), None)
        if info is None:  # typer's own context
            continue
        default = parameter.default
        shown = "" if default in (None, False, inspect.Parameter.empty) else str(default)
        if isinstance(info, ArgumentInfo):
            yield name.upper(), shown, info
        else:
            # Inside Annotated the first name stands where a default would.
            declared = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("-")]
            yield ", ".join(declared) or f"--{name.replace('_', '-')}", shown, info


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def presets() -> Iterator[str]:
    yield "| name | parameters | what it is |\n|---|--:|---|"
    for card in list_presets():
        described = (
            f"{_cell(card.description)}{' Its licence has to be accepted first.' if card.accept_licence else ''}"
        )
        yield f"| `{card.name}` | {_size(card.parameters)} | {described} |"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 0.9995e9 else f"{count / 1e6:.3g} million"
