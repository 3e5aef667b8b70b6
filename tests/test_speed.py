"""Claims about what makes a network fast: none of it changes what the network computes."""

import copy

import pytest
import torch
import torch.nn.functional as F

import speed
from dit import DiT, DiTConfig
from speed import CompiledGELU, checkpoint_blocks, compile_blocks
from test_dit import SMALL, inputs, randomized


def test_both_forms_of_gelu_are_one_function(monkeypatch):
    gelu, x = CompiledGELU(), torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    (compiled_slope,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(compiled_slope, slope)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))


def test_checkpointing_changes_no_gradient():
    plain = randomized(DiT(DiTConfig(**SMALL)))
    saving = copy.deepcopy(plain)
    checkpoint_blocks(saving.blocks)
    for model in (plain, saving):
        model(*inputs(model.config)).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(("instructions", "precision"), [
    ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True, "amx_bf16": False}, "bf16"), ({"bf16": True}, "bf16"),
    ({"avx512_f": True, "avx512_bf16": False}, "fp32"), ({}, "fp32"),
])
def test_the_precision_of_a_cpu_follows_from_its_instructions(monkeypatch, instructions, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert speed.best_precision(torch.device("cpu")) == precision
    assert speed.best_precision(torch.device("mps")) == "fp32"


def test_where_compiling_fails_the_blocks_stay_eager_with_a_warning():
    model = randomized(DiT(DiTConfig(**SMALL)))
    expected = model(*inputs(model.config))

    def fail():
        raise RuntimeError("no compiler here\nat all")

    with pytest.warns(UserWarning, match=r"does not work here \(no compiler here\)"):
        assert not compile_blocks(list(model.blocks), fail)
    torch.testing.assert_close(model(*inputs(model.config)), expected)


def test_too_little_memory_is_no_fault_of_the_compiler():
    def fail():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(RuntimeError, match="allocate memory"):
        compile_blocks(list(DiT(DiTConfig(**SMALL)).blocks), fail)
