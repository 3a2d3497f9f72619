"""Writes a checkpoint with weights of fewer bits, in the format of compressed-tensors.

    python -m engine.quantize MODEL DIRECTORY [--scheme W4A16 | W8A8] [--group 32]

Its linear maps are rounded, but for the head; whatever reads the format computes the same. W4A16
has levels of 4 bits and a scale for each group of inputs, W8A8 whole bytes and a scale for each
output, and asks for activations of 8 bits.
"""

import argparse
from pathlib import Path

from engine.checkpoint.files import CheckpointError
from engine.checkpoint.source import resolve
from engine.quantize.write import quantize


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint directory or hub id")
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--scheme", choices=["W4A16", "W8A8"], default="W4A16")
    parser.add_argument("--group", type=int, choices=[32, 64, 128], default=32)
    arguments = parser.parse_args()
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} is there already")
    try:
        source = resolve(arguments.model)
        quantize(source, arguments.directory, arguments.scheme, arguments.group)
    except CheckpointError as error:
        parser.error(str(error))
    before, after = _megabytes(source), _megabytes(arguments.directory)
    print(f"{arguments.directory}: {arguments.scheme}, {after:.1f} MB instead of {before:.1f}")


def _megabytes(directory: Path) -> float:
    """Of weights."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
