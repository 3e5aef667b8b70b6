"""What makes a network fast on the machine at hand: the precision of its products, its attention, compiled blocks.

The scripts set OMP_WAIT_POLICY=PASSIVE before they load PyTorch. By default, idle threads of OpenMP busy-wait: beside
another program that uses the CPU, two threads on two cores would then be many times slower.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def best_precision(device: torch.device) -> str:
    """bf16 where the device has instructions for it, else fp32.

    CPUs have them as Intel's AMX, AVX512-BF16 or ARM's BF16; on others bf16 is emulated, and several times as slow.
    """
    if device.type == "cpu":
        instructions = torch.cpu.get_capabilities()
        return "bf16" if {"amx_bf16", "avx512_bf16", "bf16"} & {k for k, v in instructions.items() if v} else "fp32"
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else "fp32"


def fast_attention(device: torch.device, precision: str) -> AbstractContextManager:
    """Inside, attention is of the kind that is fastest in this precision, bf16 or fp32."""
    # In bfloat16 on a CPU, PyTorch's fused attention takes ten times as long as matrix products and a softmax.
    unfused = device.type == "cpu" and precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext()


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, matrix products are done in this precision, bf16 or fp32, with the attention that is fastest in it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), fast_attention(device, precision):
        yield


class CompiledGELU(nn.Module):
    """GELU (arXiv 1606.08415) in its tanh form, x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3).

    Since (1 + tanh u) / 2 is sigmoid(2u), both returns below are the same function. Compiled for a CPU, the sigmoid is
    three times as fast as the tanh, which saves one eighth of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
        return F.gelu(x, approximate="tanh")


def compile_blocks(blocks: list[nn.Module], dry_run: Callable[[], None]) -> bool:
    """Compile DiT blocks that are all alike, and therefore compiled once. Returns whether that is possible here.

    dry_run: runs them forward and backward, to see whether it is. Where it is not, they stay eager, with a warning.
    """
    for block in blocks:
        block.mlp.act = CompiledGELU()
        block.compile(dynamic=False)
    # Where there is CUDA's compiler and no GPU, PyTorch would warn that it could not use the one for the other.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        dry_run()
    except Exception as error:  # no compiler, no Triton, a GPU that is too old
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            raise  # the batch is too large, compiled or not
        for block in blocks:
            block._compiled_call_impl = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        warnings.warn(f"torch.compile does not work here ({reason}): training runs without it, slower", stacklevel=2)
        return False
    return True


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Compute the activations inside a block again in the backward pass, rather than keep them (arXiv 1604.06174).

    That takes about a third more time, and a small fraction of the memory.
    """
    from torch.utils.checkpoint import checkpoint  # takes seconds

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def limit_threads(quota_file: str = "/sys/fs/cgroup/cpu.max") -> None:
    """Use no more threads than a container may use cores: PyTorch sees all cores of the machine."""
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        quota, period = map(int, Path(quota_file).read_text().split())
        torch.set_num_threads(min(torch.get_num_threads(), max(1, quota // period)))
