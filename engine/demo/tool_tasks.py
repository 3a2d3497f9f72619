"""Tool calling: choose a declared tool, fill in its arguments, answer from its result."""

import json
import random
from dataclasses import dataclass
from typing import Any

from engine.demo import words
from engine.demo.samples import Message, Sample, Tool, call_text, pick

CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy")
Value = str | int | bool


@dataclass(frozen=True)
class Slot:
    """A parameter: the names it may be declared under, its JSON type and description."""

    names: tuple[str, ...]
    type: str
    about: str


@dataclass(frozen=True)
class Intent:
    """Something a user may want, the tools that do it and how the result is told."""

    names: tuple[str, ...]
    about: str
    slots: dict[str, Slot]
    asks: tuple[str, ...]
    result: str
    pair: str = ""


CITY = Slot(("city", "location", "place", "town"), "string", "The city name")
PERSON = Slot(("name", "person", "to", "recipient", "contact"), "string", "The person")
A = Slot(("a", "x", "first", "left"), "integer", "The first number")
B = Slot(("b", "y", "second", "right"), "integer", "The second number")
INTENTS: dict[str, Intent] = {
    "weather": Intent(
        ("get_weather", "weather", "weather_lookup", "get_current_weather", "fetch_weather"),
        "Get the current weather in a city.", {"city": CITY},
        ("What is the weather in {city}?", "What's the weather in {city}?", "Weather in {city}?",
         "How is the weather in {city} today?", "What is the weather like in {city}?",
         "Tell me the weather in {city}.", "Is it sunny in {city}?", "Check the weather in {city}.",
         "What's the weather like in {city}?", "What is the weather in {city} today?"),
        "It is {temperature} degrees and {condition} in {city}.",
        "What is the weather in {city} and {other}?"),
    "unit": Intent(
        ("get_weather", "weather", "weather_lookup", "get_current_weather"),
        "Get the current weather in a city.",
        {"city": CITY, "unit": Slot(("unit", "units"), "string", "celsius or fahrenheit")},
        ("What is the weather in {city} in {unit}?", "Weather in {city} in {unit}, please.",
         "What's the temperature in {city} in {unit}?"),
        "It is {temperature} degrees and {condition} in {city}."),
    "time": Intent(
        ("get_time", "time_in_city", "current_time", "clock"), "Get the time in a city.",
        {"city": CITY},
        ("What time is it in {city}?", "Tell me the time in {city}.", "Time in {city}?"),
        "It is {time} in {city}.", "What time is it in {city} and {other}?"),
    "add": Intent(
        ("add", "add_numbers", "sum", "plus"), "Add two numbers.", {"a": A, "b": B},
        ("What is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?", "Compute {a} + {b}."),
        "The result is {number}."),
    "multiply": Intent(
        ("multiply", "multiply_numbers", "product", "times"), "Multiply two numbers.",
        {"a": A, "b": B},
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?"),
        "The result is {number}."),
    "message": Intent(
        ("send_message", "message", "send_text", "notify"), "Send a message to a person.",
        {"name": PERSON,
         "text": Slot(("text", "message", "body", "content"), "string", "The text to send")},
        ("Send {name} the message: {text}", "Tell {name}: {text}",
         "Send a message to {name} saying {text}", "Write to {name}: {text}"),
        "The message to {name} was sent."),
    "timer": Intent(
        ("set_timer", "start_timer", "timer"), "Start a timer.",
        {"minutes": Slot(("minutes", "duration", "length"), "integer", "How many minutes")},
        ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.",
         "Remind me in {minutes} minutes."),
        "The timer is set to {minutes} minutes."),
    "table": Intent(
        ("book_table", "reserve_table", "make_reservation"), "Book a table in a restaurant.",
        {"city": CITY, "people": Slot(("people", "guests", "seats"), "integer", "How many people")},
        ("Book a table for {people} in {city}.", "Reserve a table in {city} for {people} people.",
         "I need a table for {people} people in {city}."),
        "Your table for {people} in {city} is booked."),
    "price": Intent(
        ("get_price", "price_of", "lookup_price"), "Get the price of an item.",
        {"item": Slot(("item", "product", "fruit"), "string", "The item")},
        ("How much is one {item}?", "What is the price of {item}?", "What does {item} cost?"),
        "The price of {item} is {number}.", "What is the price of {item} and {other}?"),
    "search": Intent(
        ("search", "web_search", "find", "search_web"), "Search for some text.",
        {"query": Slot(("query", "q", "text", "keywords"), "string", "What to search for")},
        ("Search for {query}", "Find {query}", "Look up {query}", "Search the web for {query}"),
        "I found {word}."),
    "light": Intent(
        ("set_light", "switch_light", "lamp", "light"), "Turn a light on or off.",
        {"room": Slot(("room", "place", "where"), "string", "The room"),
         "on": Slot(("on", "state", "enabled"), "boolean", "Whether the light is on")},
        ("Turn {onoff} the light in the {room}.", "Switch the {room} light {onoff}.",
         "Turn the light in the {room} {onoff}."),
        "The light in the {room} is {onoff}."),
    "user": Intent(
        ("get_user", "lookup_user", "find_user", "user_info"), "Find a user by number.",
        {"id": Slot(("id", "user_id", "number"), "integer", "The number of the user")},
        ("Who is user {id}?", "Look up user {id}.", "Find the user with id {id}."),
        "User {id} is {person}."),
}  # fmt: skip
USE = (
    "Use {tool} with {args}.", "Call {tool} with {args}.", "Run {tool} with {args}.",
    "Please call {tool} with {args}.", "Use the {tool} tool with {args}.",
)  # fmt: skip
SPARE = (
    ("unit", {"type": "string", "enum": ["celsius", "fahrenheit"]}),
    ("verbose", {"type": "boolean"}), ("limit", {"type": "integer"}),
    ("language", {"type": "string"}),
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A question that needs a tool: the tool, the calls it takes, and results with answers."""

    tool: Tool
    question: str
    calls: list[dict[str, Any]]
    results: list[str]
    answer: str
    key: str


def declare(name: str, about: str, parameters: dict[str, Any], required: list[str]) -> Tool:
    """A tool in OpenAI's shape."""
    schema = {"type": "object", "properties": parameters, "required": required}
    function = {"name": name, "description": about, "parameters": schema}
    return {"type": "function", "function": function}


def drawn_values(rng: random.Random) -> dict[str, Value]:
    """A value for every slot and every result field."""
    phrase = " ".join(rng.sample(words.PLAIN, rng.randint(1, 4)))
    on = rng.random() < 0.5
    return {
        "city": rng.choice(words.CITIES), "unit": rng.choice(("celsius", "fahrenheit")),
        "a": rng.randrange(100), "b": rng.randrange(100), "name": rng.choice(words.NAMES),
        "text": phrase, "query": phrase, "minutes": rng.randint(1, 99), "item":
        rng.choice(words.FRUITS), "people": rng.randint(1, 12), "room": rng.choice(words.ROOMS),
        "on": on, "onoff": "on" if on else "off", "id": rng.randrange(1, 10000),
        "temperature": rng.randint(-9, 39), "condition": rng.choice(CONDITIONS),
        "time": f"{rng.randrange(24):02}:{rng.randrange(60):02}", "number": rng.randrange(1000),
        "word": rng.choice(words.PLAIN), "person": rng.choice(words.NAMES),
    }  # fmt: skip


RESULT_FIELDS = {
    "{temperature}": ("temperature", "condition"), "{time}": ("time",), "{number}": ("number",),
    "{word}": ("word",), "{person}": ("person",),
}  # fmt: skip


def tool_result(rng: random.Random, intent: Intent, values: dict[str, Value]) -> str:
    """What the tool answers, as JSON."""
    fields = next((f for mark, f in RESULT_FIELDS.items() if mark in intent.result), ())
    if fields == ("number",):
        return json.dumps({rng.choice(("result", "price", "value", "total")): values["number"]})
    if not fields:
        return json.dumps(rng.choice(({"status": "ok"}, {"ok": True}, {"status": "done"})))
    return json.dumps({f: values[f] for f in fields}, ensure_ascii=False)


def known_request(rng: random.Random) -> Request:
    """A request for an intent of the table, with the tool declared under one of its names."""
    topic, intent = rng.choice(list(INTENTS.items()))
    values = drawn_values(rng)
    labels = {slot: rng.choice(s.names) for slot, s in intent.slots.items()}
    if rng.random() < 0.25:
        labels = dict(zip(labels, rng.sample(words.NOUNS, len(labels)), strict=True))
    order = rng.sample(list(labels), len(labels)) if rng.random() < 0.2 else list(labels)
    described = rng.random() < 0.7
    parameters: dict[str, Any] = {
        labels[s]: {"type": intent.slots[s].type}
        | ({"description": intent.slots[s].about} if described else {})
        for s in order
    }
    required = list(parameters)
    if topic != "unit" and rng.random() < 0.15:
        parameters |= [rng.choice(SPARE)]
    name = rng.choice(intent.names)
    if rng.random() < 0.2:
        name = "_".join(rng.sample(words.PLAIN, 2))
    rounds, question = [values], rng.choice(intent.asks)
    if intent.pair and rng.random() < 0.15:
        rounds, question = [values, drawn_values(rng)], intent.pair
    other = rounds[-1][next(iter(intent.slots))]
    return Request(
        declare(name, intent.about, parameters, required),
        question.format(**values, other=other),
        [{"name": name, "arguments": {labels[s]: v[s] for s in order}} for v in rounds],
        [tool_result(rng, intent, v) for v in rounds],
        " ".join(intent.result.format(**v) for v in rounds),
        f"{topic} " + " ".join(str(v[s]) for v in rounds for s in intent.slots),
    )


def invented_request(rng: random.Random) -> Request:
    """A made-up tool that the user asks for by name, with made-up parameters."""
    name = "_".join(rng.sample(words.PLAIN, rng.randint(1, 2)))
    if rng.random() < 0.3:
        name = rng.choice(("get", "set", "find", "make", "run", "do")) + "_" + name
    parameters: dict[str, Any] = {}
    arguments: dict[str, Value] = {}
    for label in rng.sample(words.NOUNS, rng.randint(1, 3)):
        kind = rng.choice(("string", "string", "integer", "integer", "boolean"))
        parameters[label] = {"type": kind}
        draws: dict[str, Value] = {"string": rng.choice(words.ALL), "integer": rng.randrange(1000),
                                   "boolean": rng.random() < 0.5}  # fmt: skip
        arguments[label] = draws[kind]
    style = rng.choice(("{} set to {}", "{} = {}", "{} {}", "{}={}", "{} as {}"))
    plain = {k: str(v).lower() if isinstance(v, bool) else v for k, v in arguments.items()}
    shown = [style.format(k, v) for k, v in plain.items()]
    told = " and ".join(shown) if rng.random() < 0.5 else ", ".join(shown)
    result: Value = rng.choice((rng.randrange(1000), rng.choice(words.PLAIN)))
    content = json.dumps({"result": result}) if rng.random() < 0.7 else str(result)
    about = f"{rng.choice(words.PLAIN).capitalize()} {rng.choice(words.PLAIN)}."
    return Request(
        declare(name, about, parameters, list(parameters)),
        pick(rng, USE).format(tool=name, args=told),
        [{"name": name, "arguments": arguments}], [content], f"The result is {result}.",
        f"{name} {' '.join(map(str, arguments.values()))}",
    )  # fmt: skip


def request(rng: random.Random) -> Request:
    """A request of either sort."""
    return known_request(rng) if rng.random() < 0.65 else invented_request(rng)


def declared(rng: random.Random, wanted: Request) -> list[Tool]:
    """The wanted tool among up to two others that do something else, in any order."""
    tools = [wanted.tool]
    for _ in range(rng.choice((0, 1, 1, 2))):
        other = request(rng).tool
        taken = {t["function"][field] for t in tools for field in ("name", "description")}
        if not taken & {other["function"]["name"], other["function"]["description"]}:
            tools.append(other)
    return rng.sample(tools, len(tools))


def tool_call(rng: random.Random) -> Sample:
    """Answer a question with a call of the right declared tool."""
    wanted = request(rng)
    name = wanted.tool["function"]["name"]
    labels = ", ".join(wanted.calls[0]["arguments"])
    messages = [{"role": "user", "content": wanted.question}]
    return Sample("tool call", f"call {wanted.key}", messages, call_text(wanted.calls),
                  f"I call {name} with {labels}.", declared(rng, wanted), wanted.calls)  # fmt: skip


def tool_answer(rng: random.Random) -> Sample:
    """Answer from what the tool returned."""
    wanted = request(rng)
    calls = [
        {"id": f"call_{i}", "type": "function",
         "function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}}
        for i, c in enumerate(wanted.calls)
    ]  # fmt: skip
    messages: list[Message] = [
        {"role": "user", "content": wanted.question},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    for i, content in enumerate(wanted.results):
        messages.append({"role": "tool", "tool_call_id": f"call_{i}", "content": content})
    return Sample("tool answer", f"call {wanted.key}", messages, wanted.answer,
                  "The tool gave the answer.", declared(rng, wanted))  # fmt: skip
