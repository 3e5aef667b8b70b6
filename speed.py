"""What makes a network fast on the machine at hand: the precision of its products, its attention, compiled blocks."""

import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@cache
def cpu_precision() -> str:
    """The precision in which a network is faster on this CPU: bf16 where its products take two thirds of fp32's time.

    Whether they do is measured, in some milliseconds. CPUs with matrix units for bfloat16 (Intel's AMX) or instructions
    (AVX512-BF16, ARM's BF16) are faster by far; on others bf16 is emulated, and several times as slow.
    """
    times = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):  # in turn, so that whatever else the machine does slows both
        for dtype, measured in times.items():
            x, weight = torch.ones(1024, 128, dtype=dtype), torch.ones(512, 128, dtype=dtype)
            begin = time.perf_counter()
            for _ in range(3):
                F.linear(x, weight)
            measured.append(time.perf_counter() - begin)
    return "bf16" if min(times[torch.bfloat16]) * 1.5 < min(times[torch.float32]) else "fp32"


def fast_attention(device: torch.device, precision: str) -> AbstractContextManager:
    """Inside, attention is of the kind that is fastest in this precision, bf16 or fp32."""
    # In bfloat16 on a CPU, PyTorch's fused attention takes ten times as long as matrix products and a softmax.
    plain = device.type == "cpu" and precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def compile_blocks(blocks: list[nn.Module], rehearse: Callable) -> bool:
    """Compile blocks that are all alike, and therefore compiled once. Returns whether that is possible here.

    rehearse: calls them once
    """
    for block in blocks:
        block.compile(dynamic=False)
    # Where there is CUDA's compiler and no GPU, PyTorch would warn that it could not use the one for the other.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        rehearse()
    except Exception as error:  # no compiler, no Triton, too old a GPU: training works without compiling
        if "out of memory" in str(error) or "allocate memory" in str(error):  # a batch that is too large without, too
            raise
        for block in blocks:
            block._compiled_call_impl = None
        reason = str(error).strip().splitlines()[0][:100]
        warnings.warn(f"torch.compile does not work here ({reason}): going on without, slower", stacklevel=2)
        return False
    return True


def make_deterministic(device: torch.device) -> None:
    """Make CUDA repeat itself to the bit, for resuming, and warn of operations that cannot. A CPU does so anyway."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
