"""The ops of a CPU: C++ kernels where they are at hand or there is a compiler, else torch."""

import ctypes
from dataclasses import replace
from functools import partial

import torch

from kernels.cpu import build
from kernels.cpu.attention import CpuAttention
from kernels.cpu.compiler import Level
from kernels.cpu.layers import CpuLayers
from kernels.cpu.linear import LinearPacker, pack_linear_onednn
from kernels.cpu.recorder import CpuRecorder
from kernels.cpu.sampling import CpuSampling
from kernels.ops import REFERENCE, Ops


def cpu_ops() -> Ops:
    library = build.load_library()
    if library is None:
        return replace(REFERENCE, name="cpu-torch", pack_linear=pack_linear_onednn)
    return ops_of(library, build.choose_level())


def ops_of(library: ctypes.CDLL, level: Level) -> Ops:
    """They compute on as many threads as torch does now."""
    library.manta_set_num_threads(torch.get_num_threads())
    attention, layers, packer = CpuAttention(library), CpuLayers(library), LinearPacker(library)
    return Ops(
        name=f"cpu-{level.name}",
        products={
            torch.bfloat16: level.bfloat16,
            torch.float16: "widened to float32 in registers",
            "w8a8": level.bytes,
            "int4": level.bytes,
        },
        is_invariant=True,
        attention=attention,
        sampling=CpuSampling(library),
        new_recorder=partial(CpuRecorder, library),
        prepare_step=layers.prepare_step,
        embed=layers.embed,
        pack_linear=packer.pack_linear,
        pack_stored=packer.pack_stored,
        rms_norm=layers.rms_norm,
        add_rms_norm=layers.add_rms_norm,
        rotary=layers.rotary,
        silu_and_mul=layers.silu_and_mul,
        gelu_and_mul=layers.gelu_and_mul,
        fused_norm_rotary_store=attention.norm_rotary_store,
    )
