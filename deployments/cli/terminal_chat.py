"""`manta chat`: a conversation in the terminal, streamed as it comes."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from deployments.cli.client import Client, ServerError

HELP = """\
/system TEXT   change the system prompt (without TEXT: none)
/think         let the model reason first, or not any more
/undo          forget the last question and its answer
/new           start over
/help          this
\\ at the end of a line goes on in the next one"""


class Chat:
    """Keeps the conversation; one request for each question."""

    def __init__(
        self, url: str, key: str, model: str, system: str, sampling: dict[str, Any], think: bool
    ) -> None:
        self._client = Client(url, key)
        self._model = model
        self._system = system
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        self._think = think
        self._messages: list[dict[str, Any]] = []
        self._console = Console(highlight=False)

    def run(self) -> None:
        """Until the input ends. Raises SystemExit when there is no server."""
        try:
            there = [model["id"] for model in self._client.get("/v1/models")["data"]]
        except ServerError as error:
            sys.exit(f"error: {error}")
        if not self._model and len(there) == 1:
            (self._model,) = there
        if self._model not in there:
            asked = f"no model {self._model!r}" if self._model else f"{len(there)} models"
            names = ", ".join(there) or "none"
            sys.exit(f"error: {self._client.url} has {asked}; --model takes one of: {names}")
        say = self._console.print
        say(f"[bold]{self._model}[/] at {self._client.url}; /help for commands, Ctrl-D to leave")
        with _history():
            while (text := self._read()) is not None:
                if text.startswith("/"):
                    self._command(text)
                elif text.strip():
                    self._ask(text)

    def _read(self) -> str | None:
        lines: list[str] = []
        prompt = "\n> "
        while True:
            try:
                line = input(prompt)
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                lines, prompt = [], "\n> "
                continue
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)
            prompt = "… "

    def _command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name == "/system":
            self._system = value.strip()
        elif name == "/think":
            self._think = not self._think
            self._console.print("thinking is", "on" if self._think else "off", style="dim")
        elif name == "/undo":
            del self._messages[-2:]
        elif name == "/new":
            self._messages.clear()
        else:
            self._console.print(HELP, style="dim", markup=False)

    def _ask(self, text: str) -> None:
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self._system}] if self._system else []
        body = {
            "model": self._model,
            "messages": [*system, *self._messages, question],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # by which a stream that breaks goes on at once
            **self._sampling,
        }
        if self._think:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        answer = _Answer(self._console)
        try:
            for chunk in self._client.stream("/v1/chat/completions", body):
                answer.take(chunk)
        except KeyboardInterrupt:
            answer.stopped = True
        except ServerError as error:
            self._console.print(f"\nerror: {error}", style="red", markup=False)
            return
        answer.end()
        self._messages += [question, {"role": "assistant", "content": answer.text}]


class _Answer:
    """One answer as it comes: reasoning dim, then the text; Markdown once it is complete."""

    def __init__(self, console: Console) -> None:
        self.text = ""
        self.stopped = False
        self._console = console
        self._usage: dict[str, Any] = {}
        self._sent = time.perf_counter()
        self._first = 0.0

    def take(self, chunk: dict[str, Any]) -> None:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            thought = choice["delta"].get("reasoning_content") or ""
            text = choice["delta"].get("content") or ""
            if thought or text:
                self._first = self._first or time.perf_counter()
            self._show(thought, "dim italic")
            self._show(text if self.text else text.lstrip("\n"), None)
            self.text += text

    def _show(self, text: str, style: str | None) -> None:
        if text:
            self._console.print(text, style=style, end="", markup=False, soft_wrap=True)

    def end(self) -> None:
        now = time.perf_counter()
        print()
        if "```" in self.text and self._console.is_terminal:
            self._console.rule(style="dim")
            self._console.print(Markdown(self.text))
        tokens = self._usage.get("completion_tokens", 0)
        facts = ["stopped"] if self.stopped else []
        if self._first:
            facts.append(f"TTFT {(self._first - self._sent) * 1e3:.0f} ms")
        if tokens:
            facts.append(f"{tokens} tokens, {tokens / (now - self._sent):.0f} tok/s")
            cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            facts.append(f"prompt {self._usage['prompt_tokens']}, {cached} of it cached")
        self._console.print(" · ".join(facts), style="dim")


@contextlib.contextmanager
def _history() -> Any:
    """Line editing, with what was typed in earlier chats."""
    try:
        import readline
    except ImportError:  # a Python without it still reads lines
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "manta"
    path = state / "chat-history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            state.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
