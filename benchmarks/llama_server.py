"""llama.cpp's server from the wheel `xllamacpp`, of a Python that has it: nothing is compiled.

    PYTHON benchmarks/llama_server.py FILE.gguf THREADS SEQUENCES TOKENS_OF_EACH

Says its address, and ends with its input.
"""

import os
import sys

import xllamacpp  # type: ignore[import-not-found]


def main() -> None:
    path = sys.argv[1]
    threads, sequences, tokens = map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = sequences
    params.n_ctx = sequences * tokens
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its destructor waits for a loop that nothing ends


if __name__ == "__main__":
    main()
