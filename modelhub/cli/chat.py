"""`modelhub chat`: a conversation in the terminal."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from modelhub.cli.options import answer_as_json, rate
from modelhub.errors import InputError, ModelhubError

HELP = """\
/reset         start over; the system message stays
/system TEXT   set the system message and start over; without TEXT remove it
/save FILE     write the conversation as JSON messages, or as text to a .txt file
/help          this list
/exit          leave, as does Ctrl-D
Ctrl-C stops an answer; what came so far stays in the conversation."""


class Chat:
    """One conversation. `say` streams an answer to standard output; `command` handles lines that begin with /.

    as_json: each answer is a line of JSON, whole.
    """

    def __init__(self, lm: Any, options: dict[str, Any], system: str | None = None, as_json: bool = False):
        _ = lm.chat_template  # a model that cannot chat says so now, not after the first question
        self.lm = lm
        self.options = options
        self.as_json = as_json
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        shown: list[str] = []
        stopped = False
        try:
            for piece in self.lm.chat(self.messages, stream=True, **self.options):
                shown.append(piece)
                if not self.as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            stopped = True
        except ModelhubError:
            self.messages.pop()  # the question cannot be answered: the conversation is as it was
            raise
        answer, run = "".join(shown), self.lm.last_run
        self.messages.append({"role": "assistant", "content": answer})
        if not self.as_json:
            print(flush=True)
        if stopped or run is None:
            self.err.print("stopped", style="dim")
        elif self.as_json:
            print(answer_as_json(self.lm, answer), flush=True)
        else:
            self.err.print(
                f"{self.lm.backend}: {run.new_tokens} tokens{rate(run, ', ')}, first after "
                f"{run.seconds_to_first_token:.2f} s ({run.prompt_tokens - run.reused_tokens} of {run.prompt_tokens} "
                f"tokens of the conversation were new)",
                style="dim",
            )

    def command(self, line: str) -> bool:
        """Returns False when the chat is over."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.reset()
            self.err.print("a new conversation", style="dim")
        elif name == "/system":
            self.system = argument or None
            self.reset()
            self.err.print("system message set" if argument else "system message removed", style="dim")
        elif name == "/save":
            self.save(argument)
        elif name == "/help":
            self.err.print(HELP)
        else:
            self.err.print(f"{name} is no command; /help lists them")
        return True

    def save(self, target: str) -> None:
        if not target:
            raise InputError("/save needs the name of a file, e.g. /save chat.json")
        path = Path(target).expanduser()
        if path.suffix == ".txt":
            text = "\n\n".join(f"{m['role']}: {m['content']}" for m in self.messages) + "\n"
        else:
            text = json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        self.err.print(f"{len(self.messages)} messages written to {path}", style="dim")

    def loop(self) -> None:
        """Read lines until the end. Prompts appear only where a person types."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                self.err.print("\nCtrl-D or /exit leaves", style="dim")
                continue
            if not line:
                continue
            try:
                if not line.startswith("/"):
                    self.say(line)
                elif not self.command(line):
                    break
            except ModelhubError as error:
                self.err.print(f"modelhub: {error}", markup=False)
