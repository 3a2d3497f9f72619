"""Retrieval-augmented answers: what is retrieved comes first, so that prompts share prefixes.

Several questions are about the same document. With the document before the question its blocks
are computed once and found by all who come later; the other way round nothing could be shared.

    manta serve                                  # in another shell
    python docs/examples/rag.py
"""

import argparse
import math
import re
from collections import Counter

from openai import OpenAI

# Short notes as their authors dictated them: what the demo model can be asked about.
DOCUMENTS = [
    ["My name is Maria.", "I live in Paris.", "I have a cat.", "My favorite fruit is mango."],
    ["My name is Tom.", "I live in Oslo.", "I have a horse.", "My favorite fruit is pear."],
    ["My name is Anna.", "I live in Tokyo.", "I have a rabbit.", "My favorite fruit is lemon."],
]
QUESTIONS = ["Where do I live?", "What pet do I have?", "What is my favorite fruit?"]
NAMES = ["Maria", "Tom", "Anna"]


class Index:
    """Documents by TF-IDF cosine; a vector database in a real system."""

    def __init__(self, documents: list[list[str]]) -> None:
        self._documents = documents
        counts = [Counter(_words(" ".join(document))) for document in documents]
        seen = Counter(word for count in counts for word in count)
        self._rarity = {word: math.log(1 + len(counts) / seen[word]) for word in seen}
        self._vectors = [self._normed(count) for count in counts]

    def best(self, query: str) -> list[str]:
        wanted = self._normed(Counter(_words(query)))
        scores = [sum(v.get(word, 0) * x for word, x in wanted.items()) for v in self._vectors]
        return self._documents[scores.index(max(scores))]

    def _normed(self, count: "Counter[str]") -> dict[str, float]:
        vector = {word: n * self._rarity.get(word, 0) for word, n in count.items()}
        length = math.sqrt(sum(x * x for x in vector.values())) or 1
        return {word: x / length for word, x in vector.items()}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def prompt(document: list[str], question: str) -> list[dict[str, str]]:
    """The document, always in the same form, and the question last."""
    notes = [{"role": "user", "content": note} for note in document]
    noted = {"role": "assistant", "content": "Got it."}
    return [message for note in notes for message in (note, noted)] + [
        {"role": "user", "content": question}
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key=args.key)
    model = client.models.list().data[0].id
    index = Index(DOCUMENTS)
    total = cached = 0
    for question in QUESTIONS:
        for name in NAMES:
            document = index.best(f"{name}: {question}")
            answer = client.chat.completions.create(
                model=model, messages=prompt(document, question), temperature=0, max_tokens=32
            )
            usage = answer.usage
            hit = usage.prompt_tokens_details.cached_tokens
            total, cached = total + usage.prompt_tokens, cached + hit
            text = answer.choices[0].message.content
            print(f"{name}: {question:27} {text:34} {hit:3} of {usage.prompt_tokens} tokens cached")
    print(f"prefix hit rate {cached / total:.0%}")


if __name__ == "__main__":
    main()
