"""What makes a network fast on the machine at hand: the precision of its products, its attention, compiled blocks.
"""

import logging
import math
import os
import time
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


class Threads:
    """Keeps PyTorch to as many threads as there are cores that other programs leave free, where Linux tells that.

    PyTorch's threads busy-wait for each other, many times in a training step. Where one of them gets no core, all of
    them wait: beside a busy program, two threads on two cores are many times slower than one. The number of threads
    changes no result.

    cpu_max, stat: the files in which Linux tells how many cores a container may use, and how busy all cores are
    """

    def __init__(self, cpu_max: str = "/sys/fs/cgroup/cpu.max", stat: str = "/proc/stat"):
        self.most, self.stat = torch.get_num_threads(), Path(stat)
        with suppress(OSError, ValueError):  # no container, or no limit ("max")
            quota, period = map(int, Path(cpu_max).read_text().split())
            self.most = min(self.most, max(1, quota // period))
        self.last = self.cpu_seconds()

    def cpu_seconds(self) -> tuple[float, float]:
        """The time now, and the seconds that all cores were busy with other programs so far."""
        with suppress(OSError):
            user, nice, system, _, _, irq, soft_irq, *_ = map(int, self.stat.read_text().split("\n")[0].split()[1:])
            ticks = user + nice + system + irq + soft_irq
            return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
        return time.perf_counter(), 0.0

    def adapt(self, seconds: float = 1.0) -> None:
        """Set the number of threads by what other programs did since the last time, if that is so many seconds ago."""
        now, others = self.cpu_seconds()
        then, others_then = self.last
        if now - then >= seconds:
            free = os.cpu_count() - (others - others_then) / (now - then)
            torch.set_num_threads(max(1, min(self.most, round(free))))
            self.last = now, others


threads = Threads()
