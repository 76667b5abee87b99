"""Python functions as JSON schemas, and templates that read tools and options: equal to transformers."""

import json
from enum import Enum
from typing import Any, Literal, Optional, Union

import pytest
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import render_jinja_template

from modelhub.errors import ChatTemplateError, InputError
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tools import function_schema, tool_schemas


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


def weather(place: str, days: int = 1, unit: Unit = Unit.CELSIUS) -> dict[str, float]:
    """
    The weather at a place.

    With a second paragraph: it has a colon.

    Args:
        place: Where it is, as "town, country",
            over two lines.
        days: How many days ahead
        unit: What temperatures are in

    Returns:
        The temperature of each day,
        by its date.
    """
    return {}


def drink(beverage: str, size: Literal["small", "large", 3]) -> None:
    """Pours a drink.

    Args:
        beverage: What to pour (choices: ["tea", " coffee "])
        size: How much
    Raises:
        ValueError: when there is none
    """


def every_kind(
    a: list[int], b: tuple[int, str], c: dict[str, list[float]], d: Optional[int], e: Union[int, str],  # noqa: UP007,UP045
    f: int | list[str] | None, g: Any, h: dict, i: list, j: bool | None = None, k: list | tuple = (),
):  # fmt: skip
    """Takes all there is.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
        f: six
        g: seven
        h: eight
        i: nine
        j: ten
        k: eleven
    """


def nothing():
    """Takes nothing."""


class Shop:
    def price(self, thing: str) -> object:
        """What a thing costs.

        Args:
            thing: Its name
        """


TOOLS = [weather, drink, every_kind, nothing, Shop().price]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_schemas_of_functions(tool):
    """Keys in the same order too: templates write them as they stand."""
    assert json.dumps(function_schema(tool)) == json.dumps(get_json_schema(tool))


def without_docstring(x: int):
    pass


def without_hint(x):
    """Doc.

    Args:
        x: it
    """


def without_description(x: int, y: int):
    """Doc.

    Args:
        x: it
    """


def with_a_class(x: Shop):
    """Doc.

    Args:
        x: it
    """


def with_bad_choices(x: str):
    """Doc.

    Args:
        x: it (choices: tea)
    """


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([without_docstring], "without_docstring has no docstring"),
        ([without_hint], "no type hint for x"),
        ([without_description], "does not describe y: add it under Args:"),
        ([with_a_class], "x of the tool with_a_class: the type hint .*Shop.* has no JSON schema"),
        ([with_bad_choices], "must hold a JSON list"),
        (["weather"], "tool 0 must be a JSON schema"),
        (weather, "tools must be a list"),
        ({"type": "function"}, "tools must be a list"),
    ],
)
def test_what_is_no_tool(tools, says):
    with pytest.raises(InputError, match=says):
        tool_schemas(tools)


TEMPLATE = (
    "{{ bos_token }}{% if tools %}TOOLS {{ tools | tojson(indent=2) }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}{% if date_string is defined %}{{ date_string }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Is it raining?"}]


def test_tools_and_options_reach_the_template():
    template = ChatTemplate(TEMPLATE, special_tokens={"bos_token": "<s>"})
    for tools in (None, TOOLS, [get_json_schema(weather)]):
        for options in ({}, {"enable_thinking": False}, {"enable_thinking": True, "date_string": "today"}):
            [[wanted], _] = render_jinja_template(
                [MESSAGES], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<s>", **options
            )
            assert template.render(MESSAGES, tools=tools, options=options) == wanted
    assert template.options == ("date_string", "enable_thinking")


def test_what_the_template_does_not_read_is_said():
    template = ChatTemplate(TEMPLATE, special_tokens={"bos_token": "<s>"})
    with pytest.raises(
        ChatTemplateError, match="not read enable_thinkng.*its options are date_string, enable_thinking$"
    ):
        template.render(MESSAGES, options={"enable_thinkng": False})
    with pytest.raises(ChatTemplateError, match="not read messages"):
        template.render(MESSAGES, options={"messages": []})
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate("{% if %}", special_tokens={}).render(MESSAGES, options={"x": 1})


def test_tools_without_a_place_are_said_once(caplog):
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}", special_tokens={})
    assert template.render(MESSAGES) == template.render(MESSAGES, tools=[]) == "Is it raining?" and not caplog.text
    for _ in range(3):
        assert template.render(MESSAGES, tools=TOOLS) == "Is it raining?"
    assert caplog.text.count("has no place for tools") == 1
