"""Claims about what makes a network fast: none of it changes what the network computes."""

import copy

import pytest
import torch
import torch.nn.functional as F

import speed
import train
from conftest import TINY, assert_equal_states
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


@pytest.mark.parametrize(("quota", "threads"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)])
def test_a_container_with_few_cores_gets_few_threads(tmp_path, quota, threads):
    before = torch.get_num_threads()
    (tmp_path / "cpu.max").write_text(quota)
    try:
        torch.set_num_threads(4)
        speed.limit_threads(str(tmp_path / "cpu.max"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
