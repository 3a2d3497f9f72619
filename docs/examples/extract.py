"""Structured extraction: sentences in, checked objects out, many at once.

The schema goes with the request, and the server lets through only tokens that keep to it.

    manta serve                                  # in another shell
    python docs/examples/extract.py
"""

import argparse
import asyncio

from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

SENTENCES = [
    "Maria is 31 years old and lives in Paris.",
    "Tom is from Oslo and is 54 years old.",
    "Anna lives in Tokyo and is 27.",
]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    age: int
    city: str


async def extract(client: AsyncOpenAI, model: str, sentence: str) -> Person:
    """Raises pydantic's ValidationError for what is no Person: the server sees that none comes."""
    answer = await client.chat.completions.create(
        model=model,
        messages=[
            {"role": "user", "content": f"Extract the name, age and city as JSON: {sentence}"}
        ],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True},
        },
        temperature=0,
        max_tokens=96,
    )
    return Person.model_validate_json(answer.choices[0].message.content or "")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.key) as client:
        model = (await client.models.list()).data[0].id
        for person in await asyncio.gather(*(extract(client, model, s) for s in SENTENCES)):
            print(repr(person))


if __name__ == "__main__":
    asyncio.run(main())
