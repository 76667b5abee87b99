"""Chat templates of Hugging Face models, rendered as transformers renders them, from files that nobody has vetted.

A template is a program that comes with the weights. Jinja's sandbox keeps it away from Python; a budget keeps it from
taking the machine. Everything runs in the caller's thread, and all that costs time or memory asks the budget first:

1. `_Metered` rewrites the parsed template so that loops, literals, slices, comparisons and `~` call private filters.
2. `_Environment` sees operators, calls, subscripts, attributes and output. Only attributes listed here can be reached.
3. Filters are those listed here, each wrapped. What no chat template needs (lipsum, urlize, attr) is left out.

No single step may then take long: a value never exceeds _SIZE_LIMIT, counted in full where parts are shared (ten lists,
each holding the one before ten times, are 10^10 strings once printed), and what takes more than linear time is priced
by its product. So it is enough to look at the clock between steps. A thread that is stopped from outside would do less:
it holds the interpreter's lock inside a long `'a' * n` or `repr`, where no one can stop it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache, wraps
from sys import getsizeof
from time import monotonic
from types import BuiltinMethodType, MethodType
from typing import Any

import numpy as np
from jinja2 import Template, TemplateSyntaxError, Undefined, nodes, pass_context, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from modelhub.errors import ChatTemplateError

ROLES = ("system", "developer", "user", "assistant", "tool")

_SIZE_LIMIT = 10_000_000  # characters of the output, and of any value on the way
_MEMORY_LIMIT = 128_000_000  # bytes of all values made in one render; no credit for those already dropped
_STEP = 64  # what a step costs where it makes nothing: two million steps in all
_DEPTH_LIMIT = 100  # of macro calls, of nested values, and of the parsed template, where the deepest known has 22
_BITS_LIMIT = 16_384  # of an integer; str() stops at 4300 digits
_SOURCE_LIMIT = 64_000  # characters of a template; the longest known have some 20,000


class ChatTemplate:
    """A model's chat template, ready to render. Safe to share between threads.

    source: the Jinja text, `Tokenizer.chat_template`.
    special_tokens: "bos_token" -> "<bos>" and so on, variables of the template. None counts as not there.
    Raises ChatTemplateError where the source is not a template.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str | None]) -> None:
        if not isinstance(source, str):
            raise ChatTemplateError(
                f"A chat template must be a str of Jinja, found {type(source).__name__}. "
                "Of several named templates give one, usually the one called 'default'."
            )
        self.source = source
        self.special_tokens = {name: token for name, token in special_tokens.items() if token is not None}
        _compiled(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        timeout: float = 5.0,
        **variables: Any,
    ) -> str:
        """The text of a chat, as transformers' `apply_chat_template(tokenize=False)` gives it.

        It holds the special tokens already: encode it with `add_special_tokens=False`.

        messages: dicts with "role" (one of ROLES) and "content" (a str, or a list of parts such as
        {"type": "text", "text": ...}, passed as they are); an assistant's content may be None beside "tool_calls".
        add_generation_prompt: whether the text ends with the opening of the assistant's turn.
        timeout: seconds after which the template is stopped.
        variables: what else the template reads: tools and documents (lists of dicts), enable_thinking, ...
        Raises ChatTemplateError: messages of another form, a template that refuses them, fails, or takes too much.
        """
        _check_messages(messages)
        _check_dicts("tools", variables.get("tools"), "a JSON schema; transformers.utils.get_json_schema(f) makes one")
        _check_dicts("documents", variables.get("documents"), 'such as {"title": ..., "text": ...}')
        template = _compiled(self.source)
        try:
            names = _plain({"tools": None, "documents": None, **self.special_tokens, **variables})
            names["messages"] = [_with_reasoning(_plain(message)) for message in messages]
            names["add_generation_prompt"] = add_generation_prompt
        except RecursionError:
            raise ChatTemplateError("The messages or variables are nested too deeply, or contain themselves.") from None
        _budget.start(timeout)
        try:
            return _joined(template.root_render_func(template.new_context(names)))
        except _Refused as error:
            raise ChatTemplateError(
                f"The chat template refuses these {len(messages)} messages (roles: {_roles(messages)}): {error} "
                "Change the messages, or the variables, to what this model was trained on."
            ) from error
        except _OverBudget as error:
            raise ChatTemplateError(
                f"The chat template was stopped{_line(template, error)}: {error}. Shorten the chat; if it is a short "
                "one, the template is faulty or hostile: do not use it."
            ) from error
        except SecurityError as error:
            raise ChatTemplateError(
                f"The chat template was stopped{_line(template, error)}: {str(error).rstrip('.')}. A template has no "
                "need of it: do not use this one."
            ) from error
        except Exception as error:
            message = f"{error!s:.500}".rstrip(".")
            raise ChatTemplateError(
                f"The chat template fails{_line(template, error)} with {type(error).__name__}: {message}. "
                "Check that the messages have all that it reads (tools and other variables are keyword arguments)."
            ) from error
        finally:
            _budget.stop()


def _check_messages(messages: Any) -> None:
    wanted = 'a list of dicts such as {"role": "user", "content": "Hello"}'
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages must be {wanted}, found {type(messages).__name__}: {messages!r:.80}")
    if not messages:
        raise ChatTemplateError(f"messages must be {wanted}, found an empty list. Give at least one message.")
    problems = [f"messages[{i}] {problem}" for i, m in enumerate(messages) if (problem := _problem(m))]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ChatTemplateError(f"messages must be {wanted}: {'; '.join(problems[:5])}{more}.")


def _problem(message: Any) -> str | None:
    """What is wrong with one message."""
    if not isinstance(message, Mapping):
        return f"is {type(message).__name__}: {message!r:.80}"
    role, content = message.get("role"), message.get("content")
    if "role" not in message:
        return f"has no role, only {list(message)!r:.80}"
    if not isinstance(role, str) or role not in ROLES:
        return f"has the role {role!r:.80}, not one of {', '.join(ROLES)}"
    if content is None and message.get("tool_calls"):
        return None
    if "content" not in message:
        return f"has no content, only {list(message)!r:.80}"
    if isinstance(content, str):
        return None
    if not isinstance(content, list | tuple):
        return f"has content that is neither str nor list of parts but {type(content).__name__}: {content!r:.80}"
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            return f'has the part content[{i}] that is no dict with a "type": {part!r:.80}'
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            return f'has the text part content[{i}] without a "text" that is a str: {part!r:.80}'
    return None


def _check_dicts(name: str, value: Any, wanted: str) -> None:
    if value is None:
        return
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise ChatTemplateError(f"{name} must be a list of dicts, found {type(value).__name__}: {value!r:.80}")
    for i, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise ChatTemplateError(
                f"{name}[{i}] must be a dict ({wanted}), found {type(entry).__name__}: {entry!r:.80}"
            )


def _roles(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = [message["role"] for message in messages]
    return ", ".join(roles if len(roles) <= 12 else [*roles[:6], "...", *roles[-5:]])


def _plain(value: Any) -> Any:
    """A copy in plain Python types: other objects have methods that the sandbox does not know to be dangerous."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if isinstance(value, np.generic):
        return _plain(value.item())
    return f"<{type(value).__name__}>"  # templates ask whether an image is there, not what it is


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Gives an assistant's reasoning the two names under which templates read it, as transformers does."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


# The budget


class _OverBudget(Exception):
    """The template takes too much; the message says of what."""


class _Refused(TemplateError):
    """The template called raise_exception."""


class _Budget(threading.local):
    """What is left of the render that runs in this thread; nothing outside of one."""

    memory = 0
    deadline = 0.0
    timeout = 0.0
    depth = 0

    def start(self, timeout: float) -> None:
        self.memory, self.timeout, self.deadline, self.depth = _MEMORY_LIMIT, timeout, monotonic() + timeout, 0

    def stop(self) -> None:
        self.memory = 0

    def spend(self, size: int) -> None:
        """Pays for `size` bytes, and looks at the clock."""
        self.memory -= size
        if self.memory < 0:
            raise _OverBudget(f"it made more than {_MEMORY_LIMIT // 10**6} MB of values, or took millions of steps")
        if monotonic() > self.deadline:
            raise _OverBudget(f"it ran for more than the timeout of {self.timeout:g} s")


_budget = _Budget()


def _room(size: int) -> None:
    """Refuses a value before it is made; size: its characters, or bytes where it is a list."""
    if size > _SIZE_LIMIT:
        raise _OverBudget(f"it asked for a value of more than {_SIZE_LIMIT // 10**6} million characters")


def _paid(value: Any, size: int = 0) -> Any:
    """Pays for a value that was just made; size: of its parts, where they are new too."""
    _budget.spend(max(size, getsizeof(value)))
    return value


def _metered(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _budget.spend(_STEP)
        yield value


def _size(value: Any) -> int:
    """What a value comes to when it is printed, compared or hashed: 16 for each part, and the characters.

    Refuses what is over the limit, or nested so deeply that C code would run out of stack.
    """
    if type(value) is str:
        return 16 + len(value)
    size, level = 0, [value]
    for _ in range(_DEPTH_LIMIT):
        below: list[Any] = []
        for item in level:
            size += 16
            inner: Iterable[Any] = ()
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length() // 3
            elif isinstance(item, _SEQUENCES):
                inner = item
            elif isinstance(item, dict):
                inner = (*item, *item.values())
            elif isinstance(item, MethodType):
                inner = (item.__self__,)  # which repr shows
            elif isinstance(item, range):
                size += len(item) * (16 + max(abs(item.start), abs(item.stop)).bit_length() // 3)
            _room(size + 16 * (len(below) + len(inner)))  # type: ignore[arg-type]
            below.extend(inner)
        if not below:
            return size
        level = below
    raise _OverBudget(f"it nested values more than {_DEPTH_LIMIT} deep")


_SEQUENCES: tuple[Any, ...] = (list, tuple, set, type({}.keys()), type({}.values()), type({}.items()))
_ITERATOR: Any = type(iter([]))  # the only iterators that templates see


def _whole(value: Any) -> Any:
    """A value that C code may walk: of bounded size; iterators made lists, so that their items count too."""
    if type(value) is _ITERATOR:
        value = list(value)
    elif type(value) is range:
        _budget.spend(64 * len(value))
    _size(value)
    return value


# The size of results, from the arguments, for what can make much of little


def _width(text: Any, width: int = 80, *_: Any) -> int:
    return max(len(str(text)), width)


def _replaced(text: Any, old: Any, new: Any, count: Any = -1) -> int:
    return len(str(text)) + str(text).count(str(old)) * len(str(new))


def _glued(glue: Any, items: Any) -> int:
    return _size(items) + len(str(glue)) * len(items)


def _pieces(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    pieces = len(text) // 2 if sep is None else text.count(sep)
    return 64 * (min(pieces, maxsplit) if maxsplit >= 0 else pieces)


def _lines(text: str) -> int:
    return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def _product(text: Any, part: Any = None, *_: Any) -> int:
    """Searching backwards and stripping take n x m steps at worst; some 10^9 a second."""
    return 0 if part is None else len(str(text)) * len(str(part)) // 8


_METHOD_SIZES: dict[str, Callable[..., int]] = {
    "center": _width,
    "ljust": _width,
    "rjust": _width,
    "zfill": _width,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "replace": _replaced,
    "join": _glued,
    "split": _pieces,
    "rsplit": lambda text, sep=None, maxsplit=-1: max(_pieces(text, sep, maxsplit), _product(text, sep)),
    "splitlines": lambda text, keepends=False: 64 * _lines(text),
    "rfind": _product,
    "rindex": _product,
    "rpartition": _product,
    "strip": _product,
    "lstrip": _product,
    "rstrip": _product,
}
_STR_METHODS = {*_METHOD_SIZES, "capitalize", "casefold", "count", "endswith", "find", "format", "format_map", "index"}
_STR_METHODS |= {"isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"}
_STR_METHODS |= {"isprintable", "isspace", "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix"}
_STR_METHODS |= {"startswith", "swapcase", "title", "upper"}


def _percent(text: Any, values: Any) -> int:
    """The size of `text % values`: every field may hold all of the values, and has its width."""
    if re.search(r"%\([^)]*\(", text):
        raise _OverBudget("it formats by a name with a parenthesis in it")
    size = len(text) + text.count("%") * _size(values)
    _room(size)
    for fields in re.finditer(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?", text):
        for number in fields.groups():
            if number == "*":  # the number is one of the values
                numbers = [value for value in values if isinstance(value, int)] if isinstance(values, tuple) else []
                size += max(map(abs, numbers), default=0)
            elif number:
                size += int(number)
        _room(size)
    return size


class _Formatter(SandboxedFormatter):
    """str.format in the sandbox, for one call; its fields may not come to more than a value may."""

    size = 0

    def convert_field(self, value: Any, conversion: Any) -> Any:
        _size(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        _size(value)
        for number in re.finditer(r"\d+", format_spec):
            _room(int(number[0]))
        text = _paid(super().format_field(value, format_spec))
        self.size += len(text)
        _room(self.size)
        return text


# Filters and tests

_FILTERS = ["abs", "capitalize", "center", "dictsort", "e", "escape", "float", "format", "indent", "int", "join"]
_FILTERS += ["lower", "max", "min", "replace", "round", "safe", "sort", "string", "sum", "title", "trim", "truncate"]
_FILTERS += ["upper"]
# These take items one by one, so a long list that is only passed on is not counted.
_LAZY_FILTERS = ["count", "d", "default", "first", "last", "length", "list"]
# Their iterators run to the end at once: a chain of 100,000 would overflow the stack when it is freed.
_ITERATING_FILTERS = ["items", "map", "reject", "rejectattr", "reverse", "select", "selectattr"]
# Tests that look no further than at the type, or the length.
_LAZY_TESTS = ["boolean", "callable", "defined", "divisibleby", "escaped", "even", "false", "float", "integer"]
_LAZY_TESTS += ["iterable", "mapping", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined"]


def _no_str(value: Any, *_: Any) -> int:
    if isinstance(value, str):  # `%` would format it
        raise TypeError(f"expected a number, found {value!r:.80}")
    return 0


def _rounded(value: Any, precision: int = 0, method: str = "common") -> int:
    if not isinstance(value, int | float):  # the filter multiplies it by a power of ten
        raise TypeError(f"expected a number, found {type(value).__name__}")
    return abs(precision) * 1000


def _summed(value: Any, attribute: Any = None, start: Any = 0) -> int:
    return 0 if isinstance(start, int | float) else _size(value) * len(value)  # lists are copied at each step


_FILTER_SIZES: dict[str, Callable[..., int]] = {
    "center": _width,
    "format": lambda text, *args, **kwargs: _percent(str(text), kwargs or args),
    "indent": lambda text, width=4, first=False, blank=False: (
        len(text) + _lines(text) * (64 + (len(width) if isinstance(width, str) else width))
    ),
    "int": lambda value, default=0, base=10: 0 if base == 10 or not isinstance(value, str) else len(value) * 1000,
    "join": lambda value, d="", attribute=None: _glued(d, value),
    "list": lambda value: 64 * len(value) if isinstance(value, str | range) else 0,
    "replace": _replaced,
    "round": _rounded,
    "sum": _summed,
    "title": lambda text: 32 * len(str(text)),
    "trim": _product,
}
_TEST_SIZES: dict[str, Callable[..., int]] = {"odd": _no_str, "even": _no_str, "divisibleby": _no_str}


def _bounded(
    function: Callable[..., Any], size: Callable[..., int] | None = None, *, lazy: bool = False, iterates: bool = False
) -> Any:
    """A filter or test that asks the budget first; lazy: it does not walk the value that it is applied to."""
    own = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja gives it the context, or the like, first
    start = own + lazy

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _budget.spend(_STEP)
        args = (*args[:start], *map(_whole, args[start:]))
        kwargs = {name: _whole(value) for name, value in kwargs.items()}
        room = 0 if size is None else size(*args[own:], **kwargs)
        _room(room)
        result = function(*args, **kwargs)
        if iterates and not isinstance(result, str | list):
            return iter(list(_metered(result)))
        return _paid(result, room)

    return run


@pass_environment
def _unique(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return FILTERS["unique"](environment, _metered(value), *args, **kwargs)  # see _Dict on hashes


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes, with the options that transformers gives."""
    size = _size(value)
    if separators is not None:
        _room(max(1000, size // 16) * sum(map(len, separators)))
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    # Each level of nesting holds its own indentation, and each line begins with it.
    _room((len(indent) if isinstance(indent, str) else indent) * _DEPTH_LIMIT**2)
    chunks, size = [], 0
    for chunk in encoder.iterencode(value):
        _budget.spend(_STEP)
        size += len(chunk)
        _room(size)
        chunks.append(chunk)
    return "".join(chunks)


# Private filters, which `_Metered` puts into templates. A template can call them, through map(" tick"): to no avail.
_TICK, _PAID, _WHOLE, _CONCAT = " tick", " paid", " whole", " concat"


def _tick(value: Any, cost: int) -> Any:
    _budget.spend(abs(cost))
    return value


@pass_eval_context
def _concat(eval_context: nodes.EvalContext, values: list[Any]) -> str:
    _room(sum(map(_size, values)))
    return _paid((markup_join if eval_context.autoescape else str_join)(values))


class _Metered(NodeTransformer):
    """Rewrites a parsed template: what Jinja compiles to bare Python asks the budget first."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        cost = _STEP + 16 * sum(1 for _ in node.find_all(nodes.Output))  # each output adds to a buffer
        tick = _filter(_TICK, nodes.Const(None, lineno=node.lineno), nodes.Const(cost))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = _filter(_TICK, node.test, nodes.Const(_STEP))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filter(_PAID, self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(_PAID, node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filter(_PAID, self.generic_visit(node))

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(_WHOLE, node.key)  # it will be hashed
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        parts = [node.expr, *[operand.expr for operand in node.ops]]
        bounded = sum(_is_constant(part) for part in parts) >= len(parts) - 1  # by what the template spells out
        self.generic_visit(node)
        if not bounded:
            node.expr = _filter(_WHOLE, node.expr)
            for operand in node.ops:
                operand.expr = _filter(_WHOLE, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(_PAID, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        return self._unpacking(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._unpacking(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return self._unpacking(node)

    def _unpacking(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filter("list", node.dyn_args)
        return node


def _is_constant(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)
    )


def _filter(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


# What templates find around them


class _Generation(Extension):
    """{% generation %}: marks what the assistant says, for training; renders its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, *given = args
        names = _Dict()(*given, **kwargs)
        for name in names:
            _Namespace._check(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # without its values, which may be namespaces that hold this one

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r:.80}, which begins with an underscore")


class _Dict:
    """`dict` in templates: makes dicts, and gives no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        # An item at a time: integers can be chosen so that all have one hash.
        made = self.fromkeys(())
        for source in args[:1]:
            if isinstance(source, dict):
                made.update(source)
            else:
                for key, value in _metered(source):
                    made[key] = value
        return dict(made, *args[1:], **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return {key: value for key in _metered(keys)}


def _raise_exception(message: Any) -> None:
    raise _Refused(f"{message!s:.1000}")


def _strftime_now(format: str) -> str:
    _room(10_000 * len(format))
    return datetime.now().strftime(format)


@pass_context  # or Jinja would call it on constants when it compiles
def _printed(context: Context, value: Any) -> str:
    _budget.spend(_STEP)
    if isinstance(value, str):
        return value
    _size(value)
    return _paid(str(value))


def _length(value: Any) -> int:
    """The room that a sequence takes in an operation that copies it; 0 for other values."""
    return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list | tuple) else 0


def _operation_size(operator: str, left: Any, right: Any) -> int:
    """The room that the result of an operator takes."""
    if operator == "%" and isinstance(left, str):
        return _percent(left, right)
    if operator == "+":
        return _length(left) + _length(right)
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            bits = left.bit_length() + right.bit_length()
        else:
            bits = left.bit_length() * max(right, 1) if operator == "**" else 0
        if bits > _BITS_LIMIT:
            raise _OverBudget("it asked for an integer of thousands of digits")
    elif operator == "*":
        many, times = (left, right) if isinstance(right, int) else (right, left)
        return _length(many) * times if isinstance(times, int) else 0
    elif not isinstance(left, float) or not isinstance(right, float):
        _size(left), _size(right)  # keys of dicts can be subtracted
    return 0


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, with the budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    # Attributes by the exact type of their object; none for types that are in neither table.
    _methods: Mapping[type, set[str]] = {
        str: _STR_METHODS,
        Markup: _STR_METHODS - {"format", "format_map"},
        dict: {"copy", "get", "items", "keys", "values"},
        list: {"copy", "count", "index"},
        tuple: {"count", "index"},
        _Dict: {"fromkeys"},
    }
    _open_types = (Undefined, LoopContext, Macro, TemplateReference, BlockReference, _Namespace, Cycler, Joiner)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) in self._methods:
            return attr in self._methods[type(obj)]
        return isinstance(obj, self._open_types) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        if attribute.startswith("_"):  # Jinja would print "" for it
            raise SecurityError(f"{attribute!r:.80} of a {type(obj).__name__} is not for templates")
        return super().unsafe_undefined(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _budget.spend(_STEP)  # sort(attribute="a.a.a") comes here from a loop of Jinja's
        if type(argument) is not str:
            _size(argument)  # it will be hashed
        item = super().getitem(obj, argument)
        if type(obj) not in self._methods:
            _size(item)  # join(attribute="x") prints what a namespace holds, which _size does not see in its input
        return item

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _room(_operation_size(operator, left, right))
        return _paid(self.binop_table[operator](left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.spend(_STEP)
        for name in ("_loop_vars", "_block_vars"):  # Jinja's, for functions that ask for the context; none here do
            kwargs.pop(name, None)
        if not isinstance(obj, Macro | LoopContext | BlockReference):  # these bind or loop, in metered code
            args = tuple(map(_whole, args))
            kwargs = {name: _whole(value) for name, value in kwargs.items()}
            owner, room = getattr(obj, "__self__", None), 0
            if isinstance(owner, str):
                size = _METHOD_SIZES.get(obj.__name__)
                room = 0 if size is None else size(owner, *args, **kwargs)
                _room(room)
            elif isinstance(owner, list | tuple):
                _size(owner)  # index and count compare
            return _paid(super().call(context, obj, *args, **kwargs), room)
        if _budget.depth >= _DEPTH_LIMIT:
            raise _OverBudget(f"it called macros more than {_DEPTH_LIMIT} deep")
        _budget.depth += 1
        try:
            return super().call(context, obj, *args, **kwargs)
        finally:
            _budget.depth -= 1

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if not isinstance(value, BuiltinMethodType) or value.__name__ not in ("format", "format_map"):
            return None
        text = value.__self__
        if type(text) is not str:
            return None
        named = value.__name__ == "format_map"

        def run(*args: Any, **kwargs: Any) -> str:
            _room(32 * text.count("{"))
            return _Formatter(self).vformat(text, () if named else args, args[0] if named else kwargs)

        return run

    def concat(self, pieces: Iterable[str]) -> str:
        return _paid(_joined(pieces))


def _joined(pieces: Iterable[str]) -> str:
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        _room(size)
        kept.append(piece)
    return "".join(kept)


@cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # it would run filters on constants, outside of the budget
        finalize=_printed,
    )
    environment.filters = {
        **{name: _bounded(FILTERS[name], _FILTER_SIZES.get(name)) for name in _FILTERS},
        **{name: _bounded(FILTERS[name], _FILTER_SIZES.get(name), lazy=True) for name in _LAZY_FILTERS},
        **{name: _bounded(FILTERS[name], lazy=True, iterates=True) for name in _ITERATING_FILTERS},
        "unique": _bounded(_unique, iterates=True),
        "tojson": _bounded(_tojson),
        _TICK: _tick,
        _PAID: _paid,
        _WHOLE: _whole,
        _CONCAT: _concat,
    }
    environment.tests = {
        name: _bounded(test, _TEST_SIZES.get(name), lazy=name in _LAZY_TESTS)  # type: ignore[arg-type]
        for name, test in TESTS.items()
    }
    environment.globals = {
        "range": environment.globals["range"],  # at most 100,000 long
        "cycler": Cycler,
        "joiner": Joiner,
        "namespace": _Namespace,
        "dict": _Dict(),
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    advice = "Correct it where it stands: chat_template.jinja, tokenizer_config.json, or the metadata of a GGUF file."
    if len(source) > _SOURCE_LIMIT:
        raise ChatTemplateError(
            f"The chat template has {len(source)} characters; at most {_SOURCE_LIMIT} are read. {advice}"
        )
    try:
        environment = _environment()
        tree = environment.parse(source)
        _check_nesting(tree)
        return environment.from_string(_Metered().visit(tree))
    except TemplateSyntaxError as error:
        message = (error.message or "").rstrip(".")
        raise ChatTemplateError(
            f"The chat template is not valid at line {error.lineno}: {message}. {advice}"
        ) from error
    except Exception as error:  # of Python's compiler: nested too deeply, a number too long
        raise ChatTemplateError(
            f"The chat template does not compile, {type(error).__name__}: {error!s:.500}. {advice}"
        ) from error


def _check_nesting(tree: nodes.Node) -> None:
    """Jinja's compiler takes quadratic time for nested loops, and stack for all that is nested."""
    level: list[tuple[nodes.Node, int]] = [(tree, 0)]
    for _ in range(_DEPTH_LIMIT):
        level = [
            (child, loops + isinstance(child, nodes.For)) for node, loops in level for child in node.iter_child_nodes()
        ]
        if not level:
            return
        for node, loops in level:
            if loops > 20:  # as many as Python compiles
                raise TemplateSyntaxError("more than 20 loops inside each other", node.lineno)
    raise TemplateSyntaxError(f"expressions or tags nested more than {_DEPTH_LIMIT} deep", level[0][0].lineno)


def _line(template: Template, error: BaseException) -> str:
    """Where in the template an error came up: " at line 3", or "" where that is not known."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f" at line {template.get_corresponding_lineno(trace.tb_lineno)}"
        trace = trace.tb_next
    return line
