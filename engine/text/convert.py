"""A checkpoint's tokenizer as tokenizer.json, by transformers: `… FILE… DIRECTORY`.

In a process of its own: transformers takes long to load.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer


def convert(files: list[Path], directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, local_files_only=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    *paths, target = map(Path, sys.argv[1:])
    convert(paths, target)
