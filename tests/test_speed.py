"""Claims about what makes a network fast: none of it changes what the network computes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import speed
import train
from conftest import ROOT, TINY, assert_equal_states, run_script
from dit import DiT, DiTConfig
from speed import CompiledGELU, checkpoint_blocks, compile_blocks
from test_dit import SMALL, inputs, randomized


def gradients(model: DiT) -> dict[str, torch.Tensor]:
    model(*inputs(model.config)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_both_forms_of_gelu_are_one_function(monkeypatch):
    gelu, x = CompiledGELU(), torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(x).sum(), x)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    compiled = torch.compile(gelu, backend="eager")(x)
    torch.testing.assert_close(compiled, F.gelu(x, approximate="tanh"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(compiled, gelu(x))  # it was the compiled form
    (compiled_slope,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(compiled_slope, slope)


def test_checkpointing_changes_no_gradient():
    plain = randomized(DiT(DiTConfig(**SMALL)))
    saving = copy.deepcopy(plain)
    checkpoint_blocks(saving.blocks)
    calls = []
    for block in saving.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    assert_equal_states(gradients(saving), gradients(plain))
    assert len(calls) == 2 * len(saving.blocks)  # once forward, and once again in the backward pass


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
        args, device = train.build_parser().settings(words)
        if compiled:
            monkeypatch.setattr(torch, "compile", lambda f, compiled=compiled, **_: compiled(f))
            with pytest.warns(UserWarning, match=rf"torch.compile does not work here \({reason}\)"):
                trainer = train.Trainer(config, args, device)
        else:
            trainer = train.Trainer(config, args, device)
        assert not trainer.compiled
        trainer.step(0, x0, y)
        trainer.step(1, x0, y)
        states.append(trainer.state())
    assert_equal_states(states[1], states[0])
    assert_equal_states(states[2], states[0])


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    eager = randomized(DiT(DiTConfig(**SMALL)))
    compiled = copy.deepcopy(eager)
    assert compile_blocks(list(compiled.blocks), lambda: (gradients(compiled), compiled.zero_grad()))
    assert all(block._compiled_call_impl for block in compiled.blocks)
    expected, ours = gradients(eager), gradients(compiled)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-4 * scale)


def test_too_little_memory_is_no_fault_of_the_compiler():
    def fail():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(RuntimeError, match="allocate memory"):
        compile_blocks(list(DiT(DiTConfig(**SMALL)).blocks), fail)


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
        args, device = train.build_parser().settings([*TINY, "--steps", "5", "--guidance", "1"])
        trainer = train.Trainer(config, args, device)
        for step, number in enumerate(plan):
            torch.set_num_threads(number)
            trainer.step(step, x0, y)
        states.append(trainer.state())
    assert_equal_states(states[1], states[0])
    assert_equal_states(states[2], states[0])


BESIDE = """
import sys, time
import speed, torch, train
from cli import default_guidance
from dit import DiTConfig

args, device = train.build_parser().settings(["--model", "DiT-N/7", "--steps", "10000", "--no-compile"])
args.guidance = default_guidance(args)
trainer = train.Trainer(DiTConfig(), args, device)
x0, y = torch.zeros(128, 1, 28, 28), torch.zeros(128, dtype=torch.long)

def steps(seconds):
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        trainer.step(count, x0, y)
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
