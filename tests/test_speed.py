"""Claims about what makes a network fast: none of it changes what the network computes."""

import copy
import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

import cli
import speed
import train
from cli import UsageError, pick_device
from conftest import ROOT, TINY, assert_equal_states, run_script, settings_of
from dit import GELU, DiT, DiTConfig
from speed import checkpoint_blocks, compile_blocks, out_of_memory
from test_dit import SMALL, inputs, randomized


def gradients(model: DiT) -> dict[str, torch.Tensor]:
    model(*inputs(model.config)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile captures, each with the number of its runs. They run as they are, uncompiled."""
    runs = []

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        def run(*inputs):
            runs[number] += 1
            return graph(*inputs)

        number = len(runs)
        runs.append(0)
        return run

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield runs
    torch.compiler.reset()


def test_both_forms_of_gelu_are_one_function(monkeypatch):
    gelu, x = GELU(), torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(x).sum(), x)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    compiled = torch.compile(gelu, backend="eager")(x)
    torch.testing.assert_close(compiled, F.gelu(x, approximate="tanh"))
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert torch.equal(compiled, gelu(x))  # it was the compiled form
    (compiled_slope,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(compiled_slope, slope)


def test_an_exported_network_contains_the_usual_gelu():
    program = torch.export.export(GELU(), (torch.zeros(2),))
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [torch.ops.aten.gelu.default]


def test_compiling_replaces_no_module(graphs):
    model = randomized(DiT(DiTConfig(**SMALL)))
    for block in model.blocks:
        block.mlp.act = torch.nn.SiLU()  # as a reader may change it
    modules, before = list(model.modules()), gradients(model)
    model.zero_grad()
    assert compile_blocks(list(model.blocks), lambda: None)
    after = gradients(model)
    assert graphs == [len(model.blocks)]
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


def test_a_copy_of_a_compiled_network_has_weights_of_its_own(graphs):
    model = randomized(DiT(DiTConfig(**SMALL)))
    checkpoint_blocks(model.blocks[:1])
    assert compile_blocks(list(model.blocks), lambda: model(*inputs(model.config)))
    other = copy.deepcopy(model)
    for p in other.blocks.parameters():
        torch.nn.init.zeros_(p)
    x, c = torch.ones(2, 16, 32), torch.ones(2, 32)
    assert all(torch.equal(block(x, c), x) for block in other.blocks)  # a block of zeros is the identity
    assert not any(torch.equal(block(x, c), x) for block in model.blocks)


def test_blocks_are_compiled_for_batches_of_as_many_sizes_as_distillation_has(graphs):
    block = GELU()  # stands for one, and is compiled sooner
    assert compile_blocks([block], lambda: None)
    for n in range(2, 22):
        block(torch.ones(n))
    assert graphs == [1] * 20


def test_checkpointing_changes_no_gradient():
    plain = randomized(DiT(DiTConfig(**SMALL)))
    saving = copy.deepcopy(plain)
    checkpoint_blocks(saving.blocks)
    calls = []
    for block in saving.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    assert_equal_states(gradients(saving), gradients(plain))
    assert len(calls) == 2 * len(saving.blocks)  # once forward, and once again in the backward pass


def test_checkpointed_blocks_are_compiled(graphs):
    config, (x0, _, y) = DiTConfig(**SMALL), inputs(DiTConfig(**SMALL), 8)
    states = []
    for more in (["--no-gradient-checkpointing"], ["--gradient-checkpointing"]):
        words = [*TINY, "--steps", "5", "--guidance", "1", "--compile"]
        args, device = settings_of([*words, *more])
        graphs.clear()
        torch.compiler.reset()
        trainer = train.Trainer(config, args, device)
        assert trainer.compiled
        for step in range(3):
            trainer.step(step, x0, y, 1e-3)
        states.append(trainer.state())
        passes = 2 if args.gradient_checkpointing else 1  # once forward, and once again in the backward pass
        assert graphs == [passes * config.depth * (1 + 3)]  # the dry run, and three steps
    assert_equal_states(states[1], states[0])


@pytest.mark.parametrize(("instructions", "precision"), [
    ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True, "amx_bf16": False}, "bf16"), ({"bf16": True}, "bf16"),
    ({"avx512_f": True, "avx512_bf16": False}, "fp32"), ({}, "fp32"),
])
def test_the_precision_of_a_cpu_follows_from_its_instructions(monkeypatch, instructions, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert speed.best_precision(torch.device("cpu")) == precision
    assert speed.best_precision(torch.device("mps")) == "fp32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_the_precision_of_a_gpu_follows_from_its_generation(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert speed.best_precision(torch.device("cuda")) == precision


class FailsBackward(torch.autograd.Function):
    """The identity, with a backward pass that fails."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, error: Exception) -> torch.Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        raise ctx.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no compiler here\nat all"), "no compiler here"), (AssertionError(), "AssertionError")],
)
def test_where_compiling_fails_training_is_eager_with_a_warning(monkeypatch, error, reason):
    """As soon as the forward pass, or not before the backward pass, whose gradients change no step."""
    def fails_forward(*_):
        raise error

    config, (x0, _, y) = DiTConfig(**SMALL), inputs(DiTConfig(**SMALL), 8)
    states = []
    for compiled in (None, lambda f: fails_forward, lambda f: lambda *inputs: FailsBackward.apply(f(*inputs), error)):
        words = [*TINY, "--steps", "5", "--guidance", "1", "--compile" if compiled else "--no-compile"]
        args, device = settings_of(words)
        if compiled:
            monkeypatch.setattr(torch, "compile", lambda f, compiled=compiled, **_: compiled(f))
            with pytest.warns(UserWarning, match=rf"torch.compile does not work here \({reason}\)"):
                trainer = train.Trainer(config, args, device)
        else:
            trainer = train.Trainer(config, args, device)
        assert not trainer.compiled
        trainer.step(0, x0, y, 1e-3)
        trainer.step(1, x0, y, 1e-3)
        states.append(trainer.state())
    assert_equal_states(states[1], states[0])
    assert_equal_states(states[2], states[0])


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
def test_compiled_blocks_compute_the_same(saving):
    eager = randomized(DiT(DiTConfig(**SMALL)))
    compiled = copy.deepcopy(eager)
    if saving:
        checkpoint_blocks(compiled.blocks)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_blocks(list(compiled.blocks), lambda: (gradients(compiled), compiled.zero_grad()))
    expected, ours = gradients(eager), gradients(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-4 * scale)


def test_a_gpu_without_bfloat16_is_not_called_compiled():
    """PyTorch warns so, and runs the block eagerly."""
    def dry_run():
        warnings.warn("Tesla T4 does not support bfloat16 compilation natively, skipping", stacklevel=1)

    with pytest.warns(UserWarning, match=r"torch.compile does not work here \(Tesla T4 does not support bfloat16"):
        assert not compile_blocks(list(DiT(DiTConfig(**SMALL)).blocks), dry_run)


OUT_OF_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),  # as Windows has it
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.AcceleratorError("CUDA error: invalid argument"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.png"), ValueError("out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_is_no_fault_of_the_compiler(error):
    def fail():
        raise error

    assert out_of_memory(error)
    with pytest.raises(type(error)):
        compile_blocks(list(DiT(DiTConfig(**SMALL)).blocks), fail)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_too_little_memory(error):
    assert not out_of_memory(error)


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that is there, and for which this PyTorch has no kernels."""
    def ones(*_, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            raise torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")
        return one(1)

    one = torch.ones
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_a_gpu_that_cannot_compute_leaves_the_work_to_the_cpu(old_gpu):
    with pytest.warns(UserWarning, match=r"cannot compute on the cuda device here \(CUDA error: no kernel image"):
        assert pick_device(None) == torch.device("cpu")


def test_a_gpu_that_cannot_compute_is_refused_by_its_name(old_gpu):
    with pytest.raises(UsageError, match=r"no kernel image is available\): use --device cpu") as error:
        pick_device("cuda")
    assert "\n" not in str(error.value)


def test_processes_do_not_part_between_a_gpu_and_the_cpu(old_gpu, monkeypatch):
    monkeypatch.setattr(cli, "WORLD", 2)
    with pytest.raises(UsageError, match="cannot compute on the cuda device"):
        pick_device(None)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("quota", "most"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)])
def test_a_container_with_few_cores_gets_few_threads(four_threads, monkeypatch, tmp_path, quota, most):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(quota)
    speed.Threads(str(tmp_path / "cpu.max"), str(tmp_path / "no stat")).adapt(0)
    assert torch.get_num_threads() == most


def test_other_programs_leave_fewer_threads(four_threads, monkeypatch, tmp_path):
    now, own, stat = [100.0], [7.0], tmp_path / "stat"

    def after(seconds, others, ours):  # 100 ticks are a second
        now[0], own[0] = now[0] + seconds, own[0] + ours
        busy[0] += 100 * (others + ours)
        stat.write_text(f"cpu  {busy[0]:.0f} 10 20 {busy[0] * 3:.0f} 5 1 2 0 0 0\ncpu0 1 2 3\n")
        threads.adapt()
        return torch.get_num_threads()

    busy = [50_000]
    stat.write_text("cpu  50000 10 20 150000 5 1 2 0 0 0\ncpu0 1 2 3\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed.time, "process_time", lambda: own[0])
    threads = speed.Threads("no quota", str(stat))
    assert after(2, others=0.2, ours=7.8) == 4
    assert after(2, others=2, ours=6) == 3      # one core is busy with something else
    assert after(2, others=12, ours=1) == 1     # more than there are
    assert after(0.5, others=0, ours=2) == 1    # too soon to tell
    assert after(2, others=0, ours=2) == 4


def test_a_training_takes_the_same_steps_with_any_number_of_threads(four_threads):
    config, (x0, _, y) = DiTConfig(**SMALL), inputs(DiTConfig(**SMALL), 8)
    states = []
    for plan in ([1] * 4, [4] * 4, [2, 1, 4, 1]):
        args, device = settings_of([*TINY, "--steps", "5", "--guidance", "1"])
        trainer = train.Trainer(config, args, device)
        for step, number in enumerate(plan):
            torch.set_num_threads(number)
            trainer.step(step, x0, y, 1e-3)
        states.append(trainer.state())
    assert_equal_states(states[1], states[0])
    assert_equal_states(states[2], states[0])


BESIDE = """
import sys, time
import rundir, speed, torch, train
from dit import DiTConfig

parser = train.build_parser()
args, device = rundir.settings(parser, parser.given(["--model", "DiT-N/7", "--steps", "10000", "--no-compile"]))
trainer = train.Trainer(DiTConfig(), args, device)
x0, y = torch.zeros(128, 1, 28, 28), torch.zeros(128, dtype=torch.long)

def steps(seconds):
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        trainer.step(count, x0, y, 1e-3)
        count += 1
        if sys.argv[1] == "adapt":
            speed.threads.adapt()
    return count / seconds

steps(3)
print(steps(5))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what other programs do")
def test_beside_a_busy_process_training_is_nearly_as_fast_as_with_one_thread():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() - 1)]
    try:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        one, ours = [], []
        for _ in range(3):  # in turn, since the machine may do other things as well
            one.append(run_script("-c", BESIDE, "one", cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}))
            ours.append(run_script("-c", BESIDE, "adapt", cwd=ROOT, env=environment))
    finally:
        for process in busy:
            process.kill()
    assert max(float(run.stdout) for run in ours) > 0.6 * max(float(run.stdout) for run in one), (ours, one)
