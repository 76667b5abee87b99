"""Chat templates as Hugging Face presets carry them: Jinja2, from strangers, so rendered in a guarded process."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from modelhub.errors import ChatTemplateError
from modelhub.processing.tools import tool_schemas

log = logging.getLogger("modelhub")

LONGEST = 1_000_000  # characters of a template; known ones have 20,000
_GIVEN = {"messages", "add_generation_prompt", "tools"}  # what is there without being asked for
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatTemplate:
    """A template with its preset's special tokens ({"bos_token": "<s>", ...}), which it sees as variables."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]):
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._told = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        timeout: float = 5.0,
        tools: Iterable[Mapping[str, Any] | Callable[..., Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to read it; equal to transformers' apply_chat_template.

        messages: [{"role": "user", "content": "..."}, ...]. add_generation_prompt: end with what opens an answer.
        timeout: seconds. tools: JSON schemas, or functions that tell their own, see modelhub.processing.tools. options:
        keyword arguments of the template's own, such as enable_thinking; variables: further ones, and the template may
        know them or not (documents, ...). All is plain data.

        Raises ChatTemplateError for messages of another form, for options that the template does not read, and for
        what it refuses or does wrong; InputError for tools that have no schema.
        """
        _check(messages)
        options = dict(options or {})
        if tools is not None and (schemas := tool_schemas(tools)):
            variables["tools"] = schemas
            self._check_place_for_tools()
        if unknown := [name for name in options if name not in self.options]:
            raise ChatTemplateError(
                f"the preset's chat template does not read {', '.join(map(str, unknown))}, which would change nothing; "
                f"its options are {', '.join(self.options) or 'none'}"
            )
        given = self.special_tokens | {"tools": None, "documents": None} | options | variables
        given |= {
            "messages": [_with_reasoning(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = json.dumps({"template": self.source, "variables": given})
        except (TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"messages and variables must be plain data (text, numbers, lists): {error}"
            ) from None
        return self._ask(request, timeout)["text"]

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The names that the template reads: of what it is always given, and of its own options."""
        return tuple(self._ask(json.dumps({"template": self.source, "variables": None}), 5.0)["variables"])

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the keyword arguments that are the template's own."""
        return tuple(n for n in self.variables if n not in _GIVEN and n not in self.special_tokens)

    def _check_place_for_tools(self) -> None:
        if "tools" not in self.variables and not self._told:
            self._told = True
            log.warning(
                "the preset's chat template has no place for tools: the model is not told which there are in a "
                "conversation, and learns calls without them"
            )

    def _ask(self, request: str, timeout: float) -> dict[str, Any]:
        if len(self.source) > LONGEST:
            raise ChatTemplateError(
                f"the preset's chat template has {len(self.source):,} characters, above {LONGEST:,}"
            )
        answer = _worker.ask(request, timeout)
        if "error" in answer:
            raise ChatTemplateError(f"the preset's chat template {answer['error']}")
        return answer


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates read an answer's reasoning as reasoning_content or as thinking; callers may call it reasoning too."""
    found = [message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else dict(message)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ChatTemplateError('messages must be a list such as [{"role": "user", "content": "Hello"}], and not empty')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f'message {index} must be a dict with a "role" and "content", got {message!r:.200}')
        if message["role"] not in ROLES:
            raise ChatTemplateError(f"message {index} has the role {message['role']!r}; known: {', '.join(ROLES)}")
        if not isinstance(message.get("content", ""), (str, list, type(None))):
            raise ChatTemplateError(
                f"message {index}: content must be text or a list of parts, got {message['content']!r:.200}"
            )


class _Worker:
    """The rendering process: started when first needed, ended when it takes too long, started anew after that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: str, timeout: float) -> dict[str, Any]:
        with self._lock:
            used = self._process is not None
            line, expired = self._exchange(request, timeout)
            if not line and used and not expired:
                # An earlier template's remains may have ended the process after its answer: not this one's doing.
                line, expired = self._exchange(request, timeout)
            if not line:
                reason = f"took longer than {timeout:g} s" if expired else "ended the process that rendered it"
                return {"error": f"{reason}; it is faulty or hostile"}
            return json.loads(line)

    def _exchange(self, request: str, timeout: float) -> tuple[str, bool]:
        """The answer, "" if there is none; and whether the time was over."""
        process = self._running()
        assert process.stdin and process.stdout
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it died while we were writing
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n") or expired.is_set():
            process.kill()
            process.wait()
            self._process = None
        return (line if line.endswith("\n") else ""), expired.is_set()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            # -P: what lies in the folder of the worker, or in the working directory, must not shadow a library.
            command = [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        return self._process


_worker = _Worker()
