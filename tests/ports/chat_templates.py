"""Writes answers by real chat templates and reads them back, streamed and whole.

pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
python -m tests.ports.chat_templates llama_cpp_python-*/vendor/llama.cpp/models/templates

Each template is shown with the formats that it gives away, and what of an answer came back as it
was. "not written" is what the template itself leaves out of a conversation.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from tests.deployments.round_trip import Answer, RoundTrip

_PARAMETERS = {"city": "string", "days": "integer", "more": "object"}
_FUNCTIONS = [
    {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {n: {"type": t, "description": n} for n, t in _PARAMETERS.items()},
        },
    },
    {"name": "stop", "description": "Stops.", "parameters": {"type": "object", "properties": {}}},
]
_PARIS = {"city": 'Pa"ris\n{é漢}', "days": 3, "more": {"a": [1, True], "b": "x"}}
_ANSWERS = {
    "call": Answer(calls=(("weather", _PARIS),)),
    "calls": Answer(calls=(("weather", _PARIS), ("weather", {"city": "Oslo"}))),
    "bare call": Answer(calls=(("stop", {}),)),
    "text and call": Answer("I look.", calls=(("weather", _PARIS),)),
    "thought, text and call": Answer("I look.", "Hm, so.", (("weather", _PARIS),)),
    "thought and text": Answer("It rains.\n\nYes.", "Hm, so."),
    "text": Answer("It rains."),
}


def outcome(trip: RoundTrip, answer: Answer) -> str:
    try:
        prompt, text = trip.written(answer)
    except ValueError as error:
        return f"refused ({' '.join(str(error).split())[-60:]})"
    read = {trip.read(prompt, texts) for texts in ([text], list(text), [text[:9], text[9:]])}
    if read == {answer}:
        return "ok"
    if len(read) > 1:
        return "DEPENDS ON HOW IT IS CUT"
    is_written = all(
        part in text or json.dumps(part)[1:-1] in text
        for part in (answer.reasoning, answer.content, *(name for name, _ in answer.calls))
    )
    return "NOT READ" if is_written else "not written"


def main() -> int:
    total: Counter[str] = Counter()
    for path in sorted(Path(sys.argv[1]).glob("*.jinja")):
        trip = RoundTrip(path.read_text(), _FUNCTIONS)
        if trip.tools is None:
            print(f"{path.stem}: no format of tool calls is known by its template")
            continue
        found = {name: outcome(trip, answer) for name, answer in _ANSWERS.items()}
        total.update(result.partition(" (")[0] for result in found.values())
        others = {name: result for name, result in found.items() if result != "ok"}
        thoughts = trip.reasoning.name if trip.reasoning is not None else "no thoughts"
        print(f"{path.stem}: {trip.tools.name}, {thoughts}: {others or 'all ok'}")
    print(dict(total))
    return total["DEPENDS ON HOW IT IS CUT"]


if __name__ == "__main__":
    sys.exit(main())
