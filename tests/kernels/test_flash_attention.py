"""flash-attn as a backend: which needs it serves, and that it is asked the right questions.

The packages need a GPU. Here stand-ins with their signatures compute the answers in plain torch.
"""

import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import AttentionNeeds, Ops, reference, select_ops
from kernels.cuda import flash_attention
from kernels.cuda import ops as cuda
from kernels.types import AttentionInputs, KVCache, PagedKV
from tests.kernels.steps import Attention

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.cuda.launch import CompileWatch

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
NEEDS = AttentionNeeds("auto", torch.bfloat16, torch.bfloat16, head_dim=128, block_size=256)


def attend(
    q: Tensor,
    k: Tensor,  # [blocks, block_size, K, D]
    v: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    left: int | None,
    softcap: float,
) -> Tensor:
    _, block_size, kv_heads, head_dim = k.shape
    spec = PagedKV(block_size, kv_heads, head_dim, k.dtype)
    cache = KVCache(spec, k.transpose(1, 2), v.transpose(1, 2))
    nowhere = torch.empty(0, dtype=torch.int64)
    inputs = AttentionInputs(query_starts, context_lens, block_tables, nowhere, 0, len(q))
    window = None if left is None else left + 1
    return reference.attention.attend(q, cache, inputs, scale, window, softcap or None)


def flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    block_table: Tensor | None = None,
) -> Tensor:
    contexts = cu_seqlens_k.diff()
    check_lengths(cu_seqlens_q, contexts, max_seqlen_q, max_seqlen_k)
    assert causal and softmax_scale is not None and block_table is not None
    assert cu_seqlens_k[0] == 0 and window_size[1] == (-1 if window_size[0] < 0 else 0)
    left = None if window_size[0] < 0 else window_size[0]
    return attend(q, k, v, cu_seqlens_q, contexts, block_table, softmax_scale, left, softcap)


def flash_attn_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[Tensor, None]:
    assert cu_seqlens_q is not None and seqused_k is not None and page_table is not None
    assert max_seqlen_q is not None and max_seqlen_k is not None
    check_lengths(cu_seqlens_q, seqused_k, max_seqlen_q, max_seqlen_k)
    assert cu_seqlens_k is None and causal and softmax_scale is not None
    assert max_seqlen_q >= 512, "it would compile another kernel for short prompts"
    assert page_table.shape[0] == len(seqused_k) and page_table.stride(1) == 1
    left = window_size[0]
    return (
        attend(q, k, v, cu_seqlens_q, seqused_k, page_table, softmax_scale, left, softcap),
        None,
    )


def check_lengths(starts: Tensor, contexts: Tensor, longest_query: int, longest: int) -> None:
    assert starts.dtype == contexts.dtype == torch.int32
    assert len(starts) == len(contexts) + 1
    assert int(starts.diff().max()) <= longest_query and int(contexts.max()) <= longest


def backend(version: int) -> Ops:
    """The ops with a stand-in for flash-attn; decoding in plain torch."""
    varlen = {2: flash_attn_2, 4: flash_attn_4}[version]
    attention = flash_attention.FlashAttention(version, varlen, reference.attention)
    return Ops("test", attention=attention)


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 9), (1, 1), (1, 40)],  # decodes only
        [(5, 9), (30, 30)],  # prompts only
        [(1, 9), (1, 17), (4, 20), (1, 8), (16, 16)],  # both, and a single query among prompts
        [(1, 9), (0, 12), (3, 3)],
    ],
)
def test_splits_decodes_from_prompts(version: int, lengths: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    for window, softcap in ((None, None), (6, None), (None, 1.5)):
        step = Attention(
            random.Random(0), torch.float32, lengths, 16, 2, 2, 8, window, softcap=softcap
        )
        step.check(backend(version))


def imports(**modules: Any) -> Any:
    def import_module(name: str) -> Any:
        if name not in modules:
            raise ImportError(f"No module named {name!r}")
        return modules[name]

    return import_module


class Installed:
    flash_attn_varlen_func = staticmethod(flash_attn_4)


@pytest.mark.parametrize(
    "change, capability, installed, chosen",
    [
        ({}, HOPPER, ["flash_attn.cute", "flash_attn"], "flash-attn-4"),
        ({}, BLACKWELL, ["flash_attn.cute", "flash_attn"], "flash-attn-4"),
        ({}, AMPERE, ["flash_attn.cute", "flash_attn"], "flash-attn-2"),
        ({}, (12, 0), ["flash_attn.cute", "flash_attn"], "flash-attn-2"),
        ({}, HOPPER, ["flash_attn"], "flash-attn-2"),
        ({"backend": "flash-attn-2"}, HOPPER, ["flash_attn.cute", "flash_attn"], "flash-attn-2"),
        ({"head_dim": 256}, HOPPER, ["flash_attn.cute"], "flash-attn-4"),
        ({"block_size": 32}, HOPPER, ["flash_attn.cute"], "flash-attn-4"),
        # And where none serves, why:
        ({}, HOPPER, [], "No module named 'flash_attn.cute'"),
        ({}, (7, 5), ["flash_attn"], "is for Ampere and later"),
        ({}, (12, 0), ["flash_attn.cute"], "has no paged cache on compute capability 12.0"),
        ({"block_size": 32}, AMPERE, ["flash_attn"], "needs a block_size of 256, not 32"),
        ({"head_dim": 256}, BLACKWELL, ["flash_attn.cute"], "has no kernel for heads of 256"),
        ({"head_dim": 72}, HOPPER, ["flash_attn.cute"], "has no kernel for heads of 72"),
        ({"dtype": torch.float32}, HOPPER, ["flash_attn.cute"], "computes in 16 bits"),
        ({"cache_dtype": torch.float8_e4m3fn}, HOPPER, ["flash_attn.cute"], "does not mix"),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    capability: tuple[int, int],
    installed: list[str],
    chosen: str,
) -> None:
    monkeypatch.setattr(
        flash_attention, "import_module", imports(**{name: Installed for name in installed})
    )
    found = flash_attention.find(replace(NEEDS, **change), capability, num_processors=132)
    if isinstance(found, str):
        assert chosen in found
    else:
        assert found.name == chosen


class Hopper:
    name, multi_processor_count, major, minor = "Hopper", 132, 9, 0


def test_choosing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes flash-attn where it is; both can be asked for; what cannot serve is refused."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Hopper)
    device = torch.device("cuda")
    monkeypatch.setattr(flash_attention, "import_module", imports())
    assert select_ops(device, NEEDS).name == "cuda-triton"
    assert select_ops(device, replace(NEEDS, backend="triton")).name == "cuda-triton"
    with pytest.raises(
        ValueError, match=r"attention_backend: 'flash-attn-4' cannot serve here: .*No"
    ):
        select_ops(device, replace(NEEDS, backend="flash-attn-4"))
    monkeypatch.setattr(flash_attention, "import_module", imports(**{"flash_attn.cute": Installed}))
    for asked in ("auto", "flash-attn-4"):
        assert select_ops(device, replace(NEEDS, backend=asked)).name == "cuda-triton+flash-attn-4"
    assert select_ops(device, replace(NEEDS, backend="triton")).name == "cuda-triton"


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Ops:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Hopper)
    monkeypatch.setattr(cuda, "triton_ops", missing)
    with pytest.raises(ImportError, match=r"a GPU needs Triton, .*: No module named"):
        select_ops(torch.device("cuda"), NEEDS)


def test_a_cpu_has_no_choice() -> None:
    with pytest.raises(ValueError, match="attention_backend: 'triton' is for GPUs"):
        select_ops(torch.device("cpu"), replace(NEEDS, backend="triton"))


def test_kernels_that_flash_attn_4_compiles_late_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class JITCache(dict[Any, Any]):
        """As in flash_attn.cute.cache_utils: all that it compiles is kept in one."""

        def __setitem__(self, key: Any, kernel: Any) -> None:
            super().__setitem__(key, kernel)

    module: Any = ModuleType("flash_attn.cute.cache_utils")
    module.JITCache = JITCache
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kernels, first = JITCache(), CompileWatch()
    kernels["prompts"] = "compiled"
    first.start_serving()
    second = CompileWatch()  # of another engine, which is not serving yet
    kernels["many prompts"] = "compiled"
    assert kernels == {"prompts": "compiled", "many prompts": "compiled"}
    assert (first.late, second.late, second.num_compiled) == ([], [], 1)
    second.start_serving()
    kernels["more"] = "compiled"
    assert second.late == ["flash-attn 4"]


def test_what_flash_attn_4_compiles_is_kept_where_only_the_user_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("ENABLED", "DIR"):
        monkeypatch.setenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", "")  # to be as it was
        monkeypatch.delenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}")
    monkeypatch.setenv("MANTA_CACHE_DIR", str(tmp_path))
    flash_attention.find(NEEDS, HOPPER, 132)
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(tmp_path / "flash-attn-4")


@pytest.mark.parametrize(
    "capability, cache_dtype, refused",
    [
        ((7, 5), torch.bfloat16, "device: .* 8.0 .*; Card has 7.5"),
        ((8, 6), torch.float8_e4m3fn, "kv_cache_dtype: 'fp8' needs .* 8.9 .*; Card has 8.6"),
        ((8, 6), torch.bfloat16, None),
        ((8, 9), torch.float8_e4m3fn, None),
        ((12, 0), torch.float8_e4m3fn, None),
    ],
)
def test_gpus_that_cannot_serve_are_refused_by_name(
    capability: tuple[int, int], cache_dtype: torch.dtype, refused: str | None
) -> None:
    properties = SimpleNamespace(name="Card", major=capability[0], minor=capability[1])
    said = cuda.refusal(properties, replace(NEEDS, cache_dtype=cache_dtype))
    assert said == refused if refused is None else re.fullmatch(refused, said or "")
