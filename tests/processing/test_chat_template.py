"""Chat templates against transformers, and against people who mean harm."""

import concurrent.futures
import copy
import pickle
import random
import resource
import time

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from modelhub.errors import ChatTemplateError
from modelhub.processing import chat_template
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# Shortened, but with all the constructs of the originals; SmolLM2's is whole.
TEMPLATES = {
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "gemma3": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}""",
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "llama3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "llama3.1": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{#- The system message, so that it comes first #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\n\n"}}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral-v1": """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "mistral-nemo": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}""",
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You are a helpful assistant.' }}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>{\\"name\\": <function-name>}<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "chatml": """{% for message in messages %}
    {% if message['role'] == 'assistant' %}
{% generation %}{{ '<|im_start|>assistant\n' ~ message['content'] ~ '<|im_end|>\n' }}{% set leaks = 1 %}{% endgeneration %}
    {% else %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
    {% endif %}
{% endfor %}
{{ leaks is defined }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
}  # fmt: skip

SYSTEM, USER, BOT = "system", "user", "assistant"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Get the <weather> & "more" of Köln',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = [{"id": "a1b2c3d4e", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]
CHATS = {
    "one": [(USER, "Hi there")],
    "system": [(SYSTEM, " Be brief. "), (USER, "  Hi \n")],
    "turns": [(USER, "a"), (BOT, " b "), (USER, "c"), (BOT, "<think>\nhm\n</think>\n\nd"), (USER, "e <b>&'\" {{ x }}")],
    "system turns": [(SYSTEM, "s"), (USER, "ä"), (BOT, "😀"), (USER, "\\n")],
    "answered": [(USER, "a"), (BOT, "<think>x</think>b")],
    "developer": [("developer", "d"), (USER, "a")],
    "not alternating": [(USER, "a"), (USER, "b")],
    "late system": [(USER, "a"), (SYSTEM, "s"), (USER, "b")],
    "empty": [(USER, ""), (BOT, ""), (USER, "")],
    "parts": [(USER, [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}])],
}


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def expected(source, messages, **variables):
    """What transformers makes of it: the text, or an exception."""
    try:
        variables = {"add_generation_prompt": True, **SPECIAL, **variables}
        return render_jinja_template([messages], chat_template=source, **variables)[0][0]
    except Exception as error:  # from the template: any type
        return error


def assert_same(source, messages, **variables):
    want = expected(source, messages, **variables)
    before = copy.deepcopy(messages)
    template = ChatTemplate(source, special_tokens=SPECIAL)
    if isinstance(want, str):
        assert template.render(messages, **variables) == want
    else:
        with pytest.raises(ChatTemplateError):
            template.render(messages, **variables)
    assert messages == before


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_as_transformers(source, messages, add_generation_prompt):
    assert_same(source, chat(*messages), add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_tools_and_reasoning(source):
    call = [*chat((USER, "a")), {"role": BOT, "content": None, "tool_calls": CALL}]
    call += [{"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"t": 3}'}, *chat((BOT, "b"), (USER, "c"))]
    assert_same(source, call, tools=TOOLS)
    assert_same(source, call, tools=TOOLS, builtin_tools=["search", "code_interpreter"])
    thought = [*chat((USER, "a")), {"role": BOT, "content": "b", "thinking": "because"}]
    for thinking in (True, False):
        assert_same(source, thought, enable_thinking=thinking)


def test_most_templates_accept_most_chats():
    """Or the comparisons above would compare errors only."""
    texts = [expected(source, chat(*messages)) for source in TEMPLATES.values() for messages in CHATS.values()]
    assert sum(isinstance(text, str) for text in texts) > 0.65 * len(texts)


def test_random_chats():
    draw = random.Random(0)
    for _ in range(100):
        texts = ["".join(draw.choices(" \n\tab<>|'\"\\{}%&äß😀\u2028", k=draw.randrange(12))) for _ in range(5)]
        messages = chat(*zip([USER, BOT] * 3, texts, strict=False))
        assert_same(draw.choice(list(TEMPLATES.values())), messages, add_generation_prompt=draw.random() < 0.5)


EXPRESSIONS = (
    """
[1, 2.5, none, true, 'a"b', {'k': (1, 2)}] | 10 ** 3 | 7 // 2 - 1 * 3 % 2 | 'a' ~ 1 ~ none ~ [1] | 'ab' * 3 | [1] * 2 + [3]
'%s-%03d-%.2f' % ('x', 7, 1.5) | '%(a)s' % {'a': 'z'} | '100%%' % () | '{} {a:>5} {!r}'.format('x', 'y', a=1)
"{k}".format_map({'k': 1}) | messages[0] == messages[-1] | 'user' in messages[0].values() | 'role' in messages[0]
1 < 2 < 3 | 1 in (1, 2) | messages[1:] | messages[0].content[::-1] | messages[0]['nothing'] is defined | ''.join(['a', 'b'])
"a,b,,c".split(',') | "a b  c".split() | "a-b-c".rsplit('-', 1) | "a\\nb".splitlines() | 'xaxb'.replace('x', 'yy') | 'a'.center(5)
' a '.strip() + 'xxa'.lstrip('x') | 'abcabc'.rfind('bc') | 'abc'.partition('b') | 'ß'.upper() | 'tItle'.title() | 'a\\tb'.expandtabs(4)
'abc'.startswith(('x', 'a')) | {'a': 1, 'b': 2}.items() | {'a': 1}.get('z', 3) | dict(a=1, **{'b': 2}) | dict([('a', 1)])
dict.fromkeys([1, 2], 0) | range(2, 10, 3) is sequence | none is none | 3 is odd | 4 is divisibleby(2) | 'a' is lower | [] is iterable
3 is sameas 3 | 1 is eq 1 | 'a' is in 'abc' | namespace(a=1).a | cycler('a', 'b').next() | -5 + 3 | not true | 1 if false
raise_exception is callable | messages is mapping | undefined_name | strftime_now('%Y') | loop is defined | 'x' if 1 else 'y' | 1e3
""".strip()
    .replace("\n", " | ")
    .split(" | ")
)
FILTERS = (
    """
3.7|round ; 2.345|round(2) ; -3|abs ; '42'|int ; 'x'|int(7) ; 'ff'|int(0,16) ; '1.5'|float ; 'ab'|capitalize ; 'aB'|upper ; 'aB'|lower ; 'a-b'|title
'a'|center(7) ; {'b':1,'a':2}|dictsort ; none|default('d') ; ''|d('e',true) ; x|default('u') ; '<a>'|e ; '<a>'|escape|safe ; [3,1]|first ; [3,1]|last
'%s'|format(3) ; 'a\\nb'|indent ; 'a\\nb\\n\\nc'|indent(2,true) ; 'a\\nb'|indent('>>',blank=true) ; {'a':1}|items|list ; [1,2]|join('-')
[{'a':1},{'a':2}]|join(',',attribute='a') ; [1,2]|length ; 'ab'|list ; [1,'a']|map('string')|list ; messages|map(attribute='role')|join
[{'a':1},{}]|map(attribute='a',default=0)|list ; [3,1]|max ; [3,1]|min ; ['b','A']|max ; [1,2,3]|reject('odd')|list ; [1,0]|select|list
messages|selectattr('role','equalto','user')|map(attribute='content')|list ; messages|rejectattr('role','eq','user')|list|length
'aXb'|replace('X','Y') ; [1,2]|reverse|list ; 'abc'|reverse ; (1,2)|reverse|first ; [3,1,2]|sort ; ['b','A']|sort(case_sensitive=true)
messages|sort(attribute='content')|map(attribute='content')|list ; 12|string ; [1,2]|sum ; [{'a':1}]|sum(attribute='a') ; [[1],[2]]|sum(start=[])
'\\u00a0a '|trim ; 'xax'|trim('x') ; 'word word'|truncate(5) ; [1,1,2]|unique|list ; {'a':'<ä>'}|tojson ; {'b':1,'a':[1,{}]}|tojson(indent=2)
{'b':1,'a':2}|tojson(sort_keys=true,separators=(',',':')) ; 'ä'|tojson(ensure_ascii=true) ; []|tojson(indent='\\t') ; '<'|e~'<' ; '<'|safe+'<'
[]|select|length ; messages|tojson
""".strip()
    .replace("\n", " ; ")
    .split(" ; ")
)


@pytest.mark.parametrize("expression", EXPRESSIONS + FILTERS)
def test_expressions_and_filters(expression):
    assert_same("{{ " + expression + " }}", chat((USER, "b"), (BOT, "a")))


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in [1, 2, 3, 4] if a is odd %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ a }},{% endfor %}",
        "{% for a in [] %}x{% else %}none{% endfor %}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
        "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{{ loop.nextitem }}"
        "{% endfor %}",
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
        "{% macro m(a, b='x') %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, c=4) }}",
        "{% macro m() %}<{{ caller('c') }}>{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}",
        "{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(9) }}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x * 2 }}{% set y | upper %}b{% endset %}{{ y }}",
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ }}{% endraw %}",
        "{% set ns = namespace(a=[]) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}{% endfor %}{{ ns.a }}",
        "{% set a, b = 1, [2] %}{{ b }}{{ a }}{{ '{}{}'.format(*b + [a]) }}",
        "{% if messages|selectattr('role', 'equalto', 'tool') %}a lazy filter is true{% endif %}",
        "{% set g = [1, 2]|map('string') %}{{ g|list }}{{ g|list }}",
        "{% block b %}b{% endblock %}{{ self.b() }}{% autoescape true %}{{ '<' }}{{ '<' ~ 'b' }}{% endautoescape %}",
        "  {% if true %}\n  trimmed\n  {% endif %}\n\n",
        "{{ messages[0].content.nothing is defined }}{{ messages[0].nothing }}{{ a.b }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_statements(source):
    assert_same(source, chat((USER, "b"), (BOT, "a")))


def test_with_a_tokenizer(tmp_path):
    """From a saved folder to the text, as apply_chat_template."""
    backend = HFTokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.chat_template = TEMPLATES["mistral-nemo"]
    hf.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    template = ChatTemplate(tokenizer.chat_template, special_tokens=special)
    for name in ("one", "system turns"):
        messages = chat(*CHATS[name])
        assert template.render(messages) == hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert pickle.loads(pickle.dumps(template)).render(messages) == template.render(messages)


# Harm

MERSENNE = 2**61 - 1  # its multiples all have the hash 0
FOR = "{% for i in range(100000) %}"
END = "{% endfor %}"
NEST = "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(70) %}{% set n.a = (n.a, n.a) %}"
NEST += "{% set n.b = (n.b, n.b) %}{% endfor %}"  # small to hold, 2^70 parts to walk
KEEP = "{% set n = namespace(a=0) %}"

PYTHON = (
    """
''.__class__ | ''.__class__.__mro__[1].__subclasses__() | ''['__class__'] | ''|attr('__class__')
['']|map(attribute='__class__')|list | '{0.__class__}'.format('') | '{0[__class__]}'.format('') | '{x.__class__}'.format_map({'x': ''})
lipsum.__globals__ | lipsum(100000) | cycler.__init__.__globals__.os
joiner.__init__ | namespace.__init__.__globals__ | namespace(__class__=1) | namespace({'_Namespace__attrs': 1}) | dict.__class__
self.__init__ | self._TemplateReference__context | raise_exception.__globals__ | (messages|map('string')).gi_frame.f_globals
'a'.upper.__self__ | 'a'.encode('punycode') | 'a'.translate({97: 'b'}) | (5).to_bytes(10 ** 9, 'big') | ''.join.__call__
messages.append(1) | messages[0].update(a=1) | messages[0].pop('role') | messages[0].setdefault('a', 1) | messages.sort()
messages.clear() | messages.__class__ | messages[0].__init__ | x.__globals__ | (1).__class__ | none.__class__ | range.__class__
range(3).__class__ | {}.fromkeys([1]) | environment.from_string | get_flashed_messages.__globals__ | url_for()
""".strip()
    .replace("\n", " | ")
    .split(" | ")
)


@pytest.mark.parametrize("expression", PYTHON)
def test_python_is_out_of_reach(expression):
    messages = chat((USER, "a"), (BOT, "b"))
    before = copy.deepcopy(messages)
    try:
        text = ChatTemplate("{{ " + expression + " }}", special_tokens={}).render(messages)
    except ChatTemplateError:
        text = ""
    # Where Jinja does not raise, it gives an undefined value, that prints as nothing.
    assert text in ("", "b", "[Undefined]", "{1: None}") or text.startswith(("b'a", "<Namespace {"))
    assert messages == before


@pytest.mark.parametrize(
    "statement",
    [
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{% for i in [1] %}{{ loop._iterator }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends '/etc/passwd' %}",
        "{% do messages.append(1) %}",
    ],
)
def test_python_is_out_of_reach_of_statements(statement):
    try:
        assert ChatTemplate(statement, special_tokens={}).render(chat((USER, "a"))) == ""
    except ChatTemplateError as error:
        assert "/etc" not in str(error) or "no loader" in str(error)


BOMBS = {
    # One value that is too large
    "multiply": "{{ 'a' * 10 ** 10 }}",
    "multiply from the left": "{{ 10 ** 10 * 'a' }}",
    "multiply a list": "{{ [1] * 10 ** 10 }}",
    "multiply markup": "{{ ('a'|safe) * 10 ** 10 }}",
    "multiply parts": "{{ [['x' * 1000000] * 1000] * 1000 }}",
    "percent width": "{{ '%99999999999d' % 1 }}",
    "percent width 2": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent precision": "{{ '%.*f' % (999999999, 1.5) }}",
    "percent name": "{{ '%((a)b)999999999d' % {'(a)b': 1} }}",
    "percent often": "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
    "percent signs": "{{ ('%' * 9000000) % 1 }}",
    "percent markup": "{{ ('%999999999d'|safe) % 1 }}",
    "percent filter": "{{ '%999999999d'|format(1) }}",
    "percent test": "{{ '%999999999d' is odd }}",
    "percent test 2": "{{ '%*d' is divisibleby((999999999, 1)) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format nested width": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "format often": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "center method": "{{ 'a'.center(10 ** 9) }}",
    "center markup": "{{ ('a'|safe).center(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "indent": "{{ 'a\nb'|indent(10 ** 9) }}",
    "indent often": "{{ ('a\x0b' * 100000)|indent('x' * 100000) }}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power compared": "{{ 9 ** (9 ** 9) > 1 }}",
    "powers": KEEP + "{% set n.a = 3 %}" + FOR + "{% set n.a = n.a * n.a %}" + END,
    "round": "{{ 1|round(10 ** 9, 'floor') }}",
    "round text": "{{ 'a'|round(9, 'floor') }}",
    "large base": "{% set a = ('1' * 9000000)|int(0, 2) %}{{ a * a }}",
    "join": "{{ range(100000)|join('x' * 100000) }}",
    "join method": "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "sum": "{{ ([[1]] * 300000)|sum(start=[]) }}",
    "json indent": "{{ [[1]]|tojson(indent=10 ** 9) }}",
    "json separators": "{{ ([1] * 300000)|tojson(separators=('x' * 100000, ':')) }}",
    "list": "{{ ('\u4e00' * 9000000)|list|length }}",
    "split": "{{ ('a ' * 4500000).split()|length }}",
    "unpack": "{{ '{}'.format(*('\u4e00' * 9000000)) }}",
    "strftime": "{{ strftime_now('%A' * 1000000) }}",
    "doubling": KEEP + "{% set n.a = 'a' %}" + FOR + "{% set n.a = n.a + n.a %}" + END,
    "doubling with ~": KEEP + "{% set n.a = 'a' %}" + FOR + "{% set n.a = n.a ~ n.a %}" + END,
    "doubling a list": KEEP + "{% set n.a = [1] %}" + FOR + "{% set n.a = n.a + n.a %}" + END,
    "doubling a block": KEEP + FOR + "{% set x %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = x %}" + END,
    # Shared parts
    **{
        f"shared {use}": NEST + "{{ " + use + " }}"
        for use in (
            "n.a", "n.a ~ ''", "n.a == n.b", "n.a in [n.b]", "n.a is eq n.b", "[n.b].index(n.a)", "{n.a: 1}|length",
            "{}[n.a]", "{}.get(n.a)", "n.a in {}", "n.a is filter", "[n.a]|unique|list", "[1]|map(n.a)|list",
            "[n.a]|select('eq', n.b)|list", "[n]|join(attribute='a')", "[n]|unique(attribute='a')|list", "n.a|join",
            "n.a|string", "n.a|tojson", "n.a|tojson(indent=1)", "'a'|replace('a', n.a)", "'%s' % (n.a,)", "[n.a, n.b]|sort",
            "'{!r}'.format(n.a)", "'{0.a}'.format(n)", "raise_exception(n.a)", "n.a|max", "{1: n.a}.values()",
            "dict([(n.a, 1)])", "n.a is lower", "[cycler(n)]|join(attribute='current.a')", "[n.a]|map('string')|list",
        )
    },
    "shared method": "{{ [('x' * 9000000)|safe] | map(attribute='upper') | list * 100000 }}",
    "shared set": "{{ [dict.fromkeys(['x' * 9000000]).keys() - []] * 100000 }}",
    # Time
    "loops": FOR * 3 + END * 3,
    "loops with a test": FOR + "{% for j in range(100000) if false %}" + END * 2,
    "loops in a list": FOR + "{{ range(100000)|map('string')|list|length }}" + END,
    "loops that pay back": FOR * 2 + "{% set x = [1]|map(' tick', -10 ** 12)|list %}" + END * 2,
    "loops with break": FOR + "{% for j in range(100000) %}{% for k in [1] %}{% break %}" + END * 3,
    "loops that print": FOR * 3 + "x" + END * 3,
    "loops in a block": "{% set x %}" + FOR * 2 + "x" * 10000 + END * 2 + "{% endset %}",
    "loops in a macro": "{% macro m() %}" + FOR * 2 + "x" * 10000 + END * 2 + "{% endmacro %}{{ m() }}",
    "loops in a generation": "{% generation %}" + FOR * 3 + END * 3 + "{% endgeneration %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion, twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion of loops": "{% for x in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
    "recursion of calls": "{% macro m() %}{{ caller() if x }}{% call m() %}{% endcall %}{% endmacro %}{{ m() }}",
    "recursion of blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "search": "{{ ('a' * 9000000).rfind('b' + 'a' * 4000000) }}",
    "rsplit": "{{ ('a' * 9000000).rsplit('b' + 'a' * 4000000) }}",
    "strip": "{{ ('b' * 9000000).strip('a' * 9000000 + 'b') }}",
    "trim": "{{ ('b' * 9000000)|trim('a' * 9000000 ~ 'b') }}",
    "look up": "{% set s = 'x' * 9000000 %}{% set t = 'x' * 8999999 ~ 'y' %}{{ t in [s] * 100000 }}",
    "hashes": f"{{{{ range(0, 100000 * {MERSENNE}, {MERSENNE})|unique|list|length }}}}",
    "hashes in a dict": f"{{{{ dict.fromkeys(range(0, 100000 * {MERSENNE}, {MERSENNE}))|length }}}}",
    "long attribute": "{{ (messages * 100000)|sort(attribute='" + "content." * 5000 + "') }}",
    # Memory that is held
    "hold": KEEP + FOR + "{% set n.a = [n.a, 'a' * 9000000] %}" + END,
    "hold wide text": KEEP + FOR + "{% set n.a = [n.a, '😀' * 9000000] %}" + END,
    "hold pieces": KEEP + "{% set t = 'ab,' * 50000 %}" + FOR + "{% set n.a = [n.a, t.split(',')] %}" + END,
    "hold numbers": KEEP + FOR + "{% set n.a = [n.a, range(1000, 90000)|sort] %}" + END,
    "hold literals": KEEP + FOR * 2 + "{% set n.a = [" + "[]," * 999 + " n.a] %}" + END * 2,
    "hold slices": KEEP + "{% set t = 'a' * 9000000 %}" + FOR + "{% set n.a = [n.a, t[1:]] %}" + END,
    "hold printed lists": "{% set l = ['x' * 999] * 999 %}{% set x %}" + FOR + "{{ l }}" + END + "{% endset %}",
    # The interpreter's stack
    "deep": KEEP + FOR + "{% set n.a = [n.a] %}" + END + "{{ n.a }}",
    "deep, dropped": KEEP + FOR + "{% set n.a = [n.a]|map('default') %}" + END + "{% set n.a = 1 %}{{ 1 / 0 }}",
    "deep, compared": KEEP + FOR + "{% set n.a = [n.a] %}" + END + "{{ n.a == [n.a] }}",
    "deep source": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " + " + "-" * 9000 + "1 }}",
    "long sum": "{{ " + "+".join("1" * 9000) + " }}",
    "deep loops": "{% for i in [1] %}" * 60 + END * 60,
    "deep branches": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long number": "{{ " + "9" * 50000 + " }}",
    "long source": "x" * 1000000,
}  # fmt: skip


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_bombs(source):
    """Whatever a template does, this process has its answer in time and none of the memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        text = ChatTemplate(source, special_tokens={}).render(chat((USER, "a"), (BOT, "b")), timeout=0.3)
    except ChatTemplateError:
        text = ""
    assert time.monotonic() - start < 3
    assert len(text) <= 10_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    # The next conversation is served as if nothing had been.
    assert ChatTemplate("{{ messages[0].content }}", special_tokens={}).render(chat((USER, "a"))) == "a"


def test_most_bombs_are_errors():
    names = ["multiply", "percent width", "center", "range", "doubling with ~", "loops", "recursion"]
    for name in names:
        with pytest.raises(ChatTemplateError):
            ChatTemplate(BOMBS[name], special_tokens={}).render(chat((USER, "a")), timeout=1)


def test_threads():
    """Bombs off the main thread do not disturb the chats beside them."""
    messages = chat(*CHATS["system turns"])
    template = ChatTemplate(TEMPLATES["llama3"], special_tokens=SPECIAL)
    want = template.render(messages)

    def bomb(_):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(BOMBS["loops"], special_tokens={}).render(messages, timeout=0.2)
        return want

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(bomb, None) if i % 25 == 0 else pool.submit(template.render, messages) for i in range(100)]
        assert {job.result(timeout=30) for job in jobs} == {want}


def test_long_chats():
    messages = chat((USER, "word " * 400), (BOT, "more " * 400)) * 500
    for name in ("gemma", "qwen3", "mistral-nemo", "smollm2"):
        assert_same(TEMPLATES[name], messages)


# Errors


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a\n{% if %}", "not valid Jinja: line 2: Expected an expression"),
        ("{% for x in y %}", "line 1.*endfor"),
        ("{{ x|nosuch }}", "No filter named 'nosuch'"),
        ("{{ raise_exception('roles must alternate') }}", "refuses: roles must alternate"),
        ("{{ messages[0].pop('role') }}", "must not do: access to attribute 'pop'"),
        ("{{ messages[0].nothing.at_all }}", "refuses: .*'nothing'|UndefinedError.*nothing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 10 ** 10 }}", "more memory"),
        (FOR * 3 + END * 3, "took longer than 0.5 s"),
    ],
)
def test_errors_of_templates(source, says):
    with pytest.raises(ChatTemplateError, match=says):
        ChatTemplate(source, special_tokens={}).render(chat((USER, "a")), timeout=0.5)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hello", "messages must be a list such as"),
        ({"role": "user", "content": "a"}, "messages must be a list such as"),
        ([], "not empty"),
        (["Hello"], "message 0 must be a dict"),
        ([{"content": "a"}], 'message 0 must be a dict with a "role"'),
        (chat((USER, "a"), ("model", "b")), "message 1 has the role 'model'; known: system, developer, user"),
        (chat((USER, 3)), "message 0: content must be text or a list of parts, got 3"),
        ([{"role": "user", "content": "a", "x": {1, 2}}], "must be plain data"),
    ],
)
def test_errors_of_messages(messages, says):
    with pytest.raises(ChatTemplateError, match=says):
        ChatTemplate("{{ messages }}", special_tokens={}).render(messages)


def test_a_worker_that_dies_is_replaced(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}", special_tokens={})
    assert template.render(chat((USER, "a"))) == "a"
    chat_template._worker._process.kill()
    chat_template._worker._process.wait()
    assert template.render(chat((USER, "b"))) == "b"
