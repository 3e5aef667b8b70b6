"""Claims about the optimizers and the learning rate."""

import argparse

import pytest
import torch

import optim
from conftest import assert_equal_states
from optim import (
    COEFFICIENTS,
    Muon,
    learning_rate,
    load_optimizers,
    make_optimizers,
    optimizer_states,
    orthogonalize,
    take_step,
)


@pytest.mark.parametrize("shapes", [[(16, 16)], [(16, 48), (48, 16), (16, 64)]])
def test_orthogonalize_equals_its_iteration(shapes):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, in float64, without the detour through A = X X^T."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for G, ours in zip(matrices, orthogonalize(matrices), strict=True):
        X = G.double().mT if G.size(0) > G.size(1) else G.double()
        X = X / torch.linalg.svdvals(X).pow(4).sum() ** 0.25
        for a, b, c in COEFFICIENTS:
            A = X @ X.mT
            X = a * X + b * A @ X + c * A @ A @ X
        X = X.mT if G.size(0) > G.size(1) else X
        torch.testing.assert_close(ours.double(), X, atol=1e-4, rtol=1e-3)


def test_bfloat16_orthogonalizes_almost_as_well():
    generator = torch.Generator().manual_seed(0)
    for shape in ((128, 384), (512, 128)):
        U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        for values in (torch.linspace(0.5, 1, 128), torch.logspace(0, -3, 128)):
            exact, G = (U @ Vh).flatten(), U * values @ Vh
            results = [orthogonalize([G], dtype)[0].flatten() for dtype in (torch.float32, torch.bfloat16)]
            near = [torch.cosine_similarity(X, exact, dim=0) for X in results]
            assert near[1] > near[0] - 0.01
            assert torch.cosine_similarity(*results, dim=0) > 0.985


def test_singular_values_come_out_near_one():
    (out,) = orthogonalize([torch.randn(32, 96, generator=torch.Generator().manual_seed(0))])
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_polynomials_bring_all_from_a_hundredth_on_near_one():
    x = torch.linspace(0.01, 1, 10_000, dtype=torch.float64)
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    assert x.min() > 0.72
    assert x.max() < 1.28


def test_no_gradient_is_no_step():
    assert torch.equal(orthogonalize([torch.zeros(4, 8)])[0], torch.zeros(4, 8))


def test_muon_agrees_with_that_of_torch(monkeypatch):
    """Which rounds to bfloat16 on the way. Both iterate with one polynomial until it has converged."""
    newton_schulz = (1.875, -1.25, 0.375)
    monkeypatch.setattr(optim, "COEFFICIENTS", [newton_schulz] * 40)
    torch.manual_seed(0)
    start = [torch.randn(24, 64), torch.randn(24, 64), torch.randn(64, 24)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(4)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    options = dict(lr=0.1, momentum=0.95)
    scale = dict(weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_coefficients=newton_schulz, ns_steps=40)
    pair = (Muon(ours, **options), torch.optim.Muon(theirs, **scale, **options))
    for step in gradients:
        for params, optimizer in zip((ours, theirs), pair, strict=True):
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        moved = (q - first).norm()
        assert (p - q).norm() < 0.03 * moved


def settings(**options) -> argparse.Namespace:
    usual = dict(lr=1.0, warmup=10, steps=110, lr_schedule="cosine", optimizer="muon", precision="fp32")
    return argparse.Namespace(**{**usual, **options})


def test_learning_rate_rises_then_falls():
    args = settings()
    assert [learning_rate(step, args) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate(60, args) == pytest.approx(0.5)
    assert 0 < learning_rate(109, args) < 0.001
    assert learning_rate(109, settings(lr_schedule="constant")) == 1.0
    for warmup in (0, 10):  # while the number of steps is not known
        assert learning_rate(50, settings(steps=None, warmup=warmup)) == 1.0


def network() -> torch.nn.Module:
    model = torch.nn.Module()
    model.blocks = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    model.head = torch.nn.Linear(4, 4)
    return model


def test_beside_muon_adamw_takes_smaller_steps():
    for optimizer, lr, rates in (("muon", 1e-2, [1e-2, 3e-3]), ("muon", 1e-3, [1e-3, 1e-3]), ("adamw", 1e-2, [1e-2])):
        model = network()
        optimizers = make_optimizers(model, settings(optimizer=optimizer, lr=lr))
        model.head(model.blocks(torch.ones(2, 4))).sum().backward()
        take_step(optimizers, lr)
        assert [group["lr"] for o in optimizers for group in o.param_groups] == pytest.approx(rates)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_adamw_is_fused_on_every_device(monkeypatch, device):
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device(device))
    (adamw,) = make_optimizers(network(), settings(optimizer="adamw"))
    assert adamw.defaults["fused"]


def test_muon_is_for_the_matrices_of_the_blocks_and_nothing_is_trained_twice():
    model = network()
    muon, adamw = make_optimizers(model, settings())
    ours = [p for group in muon.param_groups for p in group["params"]]
    theirs = [p for group in adamw.param_groups for p in group["params"]]
    assert [p.shape for p in ours] == [(8, 4), (4, 8)]
    assert sorted(map(id, ours + theirs)) == sorted(map(id, model.parameters()))


def test_only_an_optimizers_own_state_is_restored():
    model = network()
    optimizers = make_optimizers(model, settings())
    model.head(model.blocks(torch.ones(2, 4))).sum().backward()
    take_step(optimizers, 0.1)
    for optimizer, name in zip(optimizers, ("momentum", "exp_avg"), strict=True):
        saved = optimizer_states([optimizer])
        load_optimizers([optimizer], saved)
        assert_equal_states(optimizer_states([optimizer]), saved)
        own = saved["0"]["0"][name]
        for wrong in (torch.zeros(3), torch.full_like(own, float("nan")), None, [1]):
            state = {"0": {**saved["0"], "0": {**saved["0"]["0"], name: wrong}}}
            with pytest.raises((ValueError, AttributeError)):
                load_optimizers([optimizer], state)
        for state in ({"0": {"99": saved["0"]["0"]}}, {"0": {"a": {}}}):
            with pytest.raises((ValueError, IndexError)):
                load_optimizers([optimizer], state)
