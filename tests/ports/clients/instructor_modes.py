"""instructor, in each of its modes for OpenAI and Anthropic."""

import sys

import instructor
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel

url = sys.argv[1]


class Place(BaseModel):
    city: str


openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
anthropic = Anthropic(base_url=url, api_key="none", max_retries=0)
modes = instructor.Mode
failed = []
for mode in (
    *(modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA, modes.PARALLEL_TOOLS),
    *(modes.RESPONSES_TOOLS, modes.ANTHROPIC_TOOLS),
):
    try:
        if mode.value.startswith("anthropic"):
            client = instructor.from_anthropic(anthropic, mode=mode)
        else:
            client = instructor.from_openai(openai, mode=mode)
        found = client.chat.completions.create(
            model="manta-demo",
            response_model=list[Place] if mode is modes.PARALLEL_TOOLS else Place,
            messages=[{"role": "user", "content": "The weather in Paris?"}],
            max_tokens=300,
            max_retries=1,
        )
        found = list(found) if mode is modes.PARALLEL_TOOLS else found
        print(mode.value, repr(found))
    except Exception as error:
        failed.append(mode.value)
        print(mode.value, "FAILED", type(error).__name__, str(error)[:300])
sys.exit(bool(failed))
