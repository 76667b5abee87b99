"""Renders chat templates in a process of its own: a template comes from a stranger and may try anything.

Run by modelhub.processing.chat_template; reads JSON requests from standard input, one a line, and answers likewise.
Jinja's sandbox keeps a template from Python's internals; the process boundary keeps one that never ends, or that asks
for all the memory, from taking the program with it. Environment and filters are those of transformers, so that
templates written for it render alike. Imports nothing of modelhub, to start quickly.
"""

import functools
import json
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MEMORY = 1_000_000_000  # bytes of address space of the process
LONGEST = 10_000_000  # characters of a rendered conversation


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant said; here it only shows it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter writes < > & ' as escapes, for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    return environment().from_string(source)


@functools.lru_cache(maxsize=64)
def variables(source: str) -> list[str]:
    """The names that a template reads and does not set itself."""
    return sorted(meta.find_undeclared_variables(environment().parse(source)) - environment().globals.keys())


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"text": rendered}, {"variables": names} where nothing is to be rendered, or {"error": what went wrong}."""
    try:
        if request["variables"] is None:
            return {"variables": variables(request["template"])}
        text = compile_template(request["template"]).render(**request["variables"])
        if len(text) > LONGEST:
            return {"error": f"makes {len(text):,} characters; the longest conversation may have {LONGEST:,}"}
        return {"text": text}
    except TemplateSyntaxError as error:
        return {"error": f"is not valid Jinja: line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": f"does what templates must not do: {error}"}
    except TemplateError as error:
        return {"error": f"refuses: {error.message}"}
    except MemoryError:
        return {"error": "asks for more memory than a template may have"}
    except Exception as error:  # whatever a stranger's code raises is that template's failure
        return {"error": f"fails: {type(error).__name__}: {error}"}


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: only the time is limited
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    limit_memory()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
