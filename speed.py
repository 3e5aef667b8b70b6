"""What makes a network fast on the machine at hand: the precision of its products, its attention, compiled blocks.
"""

import errno
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from torch import nn
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


def unusable(device: torch.device) -> str:
    """Why this PyTorch cannot compute on a device, in one line, or "" where it can.

    A GPU that is older than any that this PyTorch was built for is "available" all the same. Only a kernel tells.
    """
    try:
        torch.ones(1, device=device).add(1).item()  # .item() waits until the kernel has run
    except Exception as error:  # the type depends on the device, and on what is wrong with it
        return first_line(error)
    return ""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the CPU or of a GPU is too small."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # PyTorch has an exception of its own for only some of the ways to run out of memory.
    words = ("allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or where it has none, its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compute the activations inside a block again in the backward pass, rather than keep them (arXiv 1604.06174).

    That takes about a third more time, and a small fraction of the memory. To compile the blocks as well, call
    `compile_blocks` afterwards.
    """
    from torch.utils.checkpoint import checkpoint  # takes seconds

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compiled(forward: Callable) -> Callable:
    """The method `forward` of a block, compiled at its first call."""
    from torch.utils.checkpoint import checkpoint

    if isinstance(forward, partial) and forward.func is checkpoint:
        # A checkpoint stays around what is compiled, since PyTorch compiles nothing that it finds inside of one.
        return partial(checkpoint, compiled(*forward.args), **forward.keywords)
    if isinstance(forward, MethodType):  # of the class, so that a copy of the block computes with its own weights
        return MethodType(torch.compile(forward.__func__, dynamic=False), forward.__self__)
    return torch.compile(forward, dynamic=False)


def compile_blocks(blocks: list[nn.Module], dry_run: Callable[[], None]) -> bool:
    """Compile DiT blocks that are all alike, and therefore compiled once. Returns whether that is possible here.

    dry_run: runs them forward and backward, to see whether it is. Where it is not, they stay eager, with a warning.
    """
    # Each size of a batch is compiled on its own, and distillation has a dozen. By default, all after the eighth would
    # run eagerly.
    torch._dynamo.config.recompile_limit = 100
    # Where there is CUDA's compiler and no GPU, PyTorch would warn that it could not use the one for the other.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    eager = [block.forward for block in blocks]
    try:
        for block in blocks:
            block.forward = compiled(block.forward)
        with warnings.catch_warnings():
            # On a GPU without bfloat16, PyTorch says only this, and goes on eagerly.
            warnings.filterwarnings("error", ".*does not support bfloat16 compilation")
            dry_run()
    except Exception as error:  # no compiler, no Triton, a GPU that is too old
        for block, forward in zip(blocks, eager, strict=True):
            block.forward = forward
        if out_of_memory(error):
            raise  # the batch is too large, compiled or not
        reason = first_line(error)
        warnings.warn(f"torch.compile does not work here ({reason}): training runs without it, slower", stacklevel=2)
        return False
    return True


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
