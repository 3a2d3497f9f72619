"""A bundled demo model, so that a first run of the server needs no network.

What it is: a real Qwen3 checkpoint (bfloat16 safetensors, tied embeddings) with its own byte-level
BPE tokenizer and chat template, trained from scratch by `engine.demo.train` on conversations that
`engine.demo.tasks` generates. It repeats and reverses words, sorts short lists, adds and subtracts
numbers below 50, counts letters, extracts fields as JSON, calls declared tools and answers from
their results, thinks before answering when asked to, and recalls what it was told.

What it is not: a language model in the usual sense. It has a few million parameters, knows no
facts and has never seen text other than those conversations. Anything else gets a polite refusal
or nonsense. It is there to try the server and to test it, not to be useful.
"""

from pathlib import Path

DEMO_MODEL: Path = Path(__file__).resolve().parent / "model"
"""The checkpoint directory, in the layout of `transformers.save_pretrained`."""
