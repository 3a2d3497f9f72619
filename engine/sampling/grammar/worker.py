"""Compiles grammars beside an engine, as a process of its own.

A pathological grammar can take any time and memory. Here it takes neither from the engine nor from
other grammars: each is compiled in a fork of this process, at low priority, and the kernel ends it
at its limits of time and memory.
"""

import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import xgrammar

from engine.patterns import CHARACTER, of_output
from engine.structured_outputs import StructuredOutputs
from engine.text.tokenizer import Tokenizer

_NICENESS = 10
# Characters of white space in a row that JSON may have: enough to indent it, too few to never end.
_MAX_WHITESPACE = 32
# A byte that no text has. What begins with it can come where a grammar names the token, and nowhere
# else; a token without any bytes could not come at all.
_NO_TEXT = b"\xff"
# Of a pattern in a string of JSON, as grammars are printed.
_AUTOMATON = re.compile(r'Regex\("(.*)", json_string=true\)')
# Characters of what xgrammar says is wrong: it may quote all of the grammar.
_MAX_REASON = 500


def tokenizer_info(directory: str, vocab_size: int, eos_token_ids: Sequence[int]) -> Any:
    """What grammars are compiled for: an `xgrammar.TokenizerInfo` of a checkpoint's tokenizer.

    Args:
        vocab_size: the model's, which may exceed the tokenizer's.
        eos_token_ids: what may be sampled when the grammar is complete, and only then.
    """
    tokenizer = Tokenizer(Path(directory))
    vocabulary = [
        (_NO_TEXT if tokenizer.is_special(token) else b"") + tokenizer.token_bytes(token)
        for token in range(vocab_size)
    ]
    return xgrammar.TokenizerInfo(
        vocabulary,
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(eos_token_ids),
    )


def compile_grammar(compiler: Any, wanted: StructuredOutputs) -> Any:
    """An `xgrammar.CompiledGrammar`; raises what xgrammar raises."""
    if wanted.regex is not None:
        if (spelled := of_output(wanted.regex)) is not None:
            with suppress(RuntimeError):  # which would speak of the spelling
                return compiler.compile_grammar(f"root ::= Regex({json.dumps(spelled)})")
        return compiler.compile_regex(wanted.regex)
    if wanted.grammar is not None:
        return compiler.compile_grammar(wanted.grammar)
    if wanted.choice is not None:
        return compiler.compile_grammar("root ::= " + " | ".join(map(_literal, wanted.choice)))
    if wanted.structural_tag is not None:
        return compiler.compile_structural_tag(wanted.structural_tag)
    schema = {"type": "object"} if wanted.json_object else wanted.closed_schema()
    grammar = xgrammar.Grammar.from_json_schema(
        schema,
        any_whitespace=not wanted.disable_any_whitespace,
        max_whitespace_cnt=None if wanted.disable_any_whitespace else _MAX_WHITESPACE,
        strict_mode=False,  # in xgrammar's, an array without `items` could only be empty
    )
    _check_patterns(schema, grammar)
    return compiler.compile_grammar(grammar)


def _patterns(schema: Any) -> Iterator[str]:
    """The regular expressions of all strings in it."""
    if isinstance(schema, dict):
        if "string" in schema.get("type", ()) and "pattern" in schema:
            yield schema["pattern"]
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        yield from _patterns(part)


def _check_patterns(schema: Any, grammar: Any) -> None:
    """Raises ValueError for one of which xgrammar forgets that it writes a string of JSON.

    It does for what its automata cannot do.
    """
    printed = _AUTOMATON.findall(str(grammar))
    kept = {re.sub(r"\\(.)", r"\1", pattern) for pattern in printed}
    for pattern in _patterns(schema):
        if pattern not in kept and CHARACTER not in pattern:
            raise ValueError(f"json: the pattern {pattern!r} is not supported in a string of JSON")


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r")
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t") + '"'


def serve(control: socket.socket, info: Any, timeout_s: float, memory_gib: int) -> None:
    """Forks for every connection that is sent over `control`, until that is closed.

    The fork receives a `StructuredOutputs`, answers (serialized grammar, None) or (None, what is
    wrong), and ends; at a limit it ends without an answer.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        data, fds, *_ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            _limit(timeout_s, memory_gib)
            _answer(Connection(fds[0]), info)
            os._exit(0)
        os.close(fds[0])


def _limit(timeout_s: float, memory_gib: int) -> None:
    signal.setitimer(signal.ITIMER_REAL, timeout_s)  # SIGALRM ends the process
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + (memory_gib << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(connection: "Connection[Any, Any]", info: Any) -> None:
    threads = min(os.cpu_count() or 1, 8)
    compiler = xgrammar.GrammarCompiler(info, max_threads=threads, cache_enabled=False)
    answer: tuple[str | None, str | None]
    try:
        answer = compile_grammar(compiler, connection.recv()).serialize_json(), None
    except MemoryError:
        return
    except Exception as error:  # xgrammar's own are RuntimeErrors and others
        # Without the time and the C++ file that stand before it.
        reason = re.sub(r"^\[[\d:]+\] \S+\.(cc|h):\d+: ", "", str(error)).strip()
        answer = None, reason[:_MAX_REASON] or type(error).__name__
    connection.send(answer)


if __name__ == "__main__":
    os.nice(_NICENESS)
    serve(
        socket.socket(fileno=int(sys.argv[1])),
        tokenizer_info(**json.loads(sys.argv[2])),
        **json.loads(sys.argv[3]),
    )
