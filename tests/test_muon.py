"""Claims about the optimizer."""

import pytest
import torch

import muon
from muon import COEFFICIENTS, Muon, orthogonalize


@pytest.mark.parametrize("shapes", [[(16, 16)], [(16, 48), (48, 16), (16, 64)]])
def test_orthogonalize_equals_its_iteration(shapes):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, in float64, without the shortcut through A = X X^T."""
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
    monkeypatch.setattr(muon, "COEFFICIENTS", [newton_schulz] * 40)
    torch.manual_seed(0)
    start = [torch.randn(24, 64), torch.randn(24, 64), torch.randn(64, 24)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(4)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    options = dict(lr=0.1, momentum=0.95, weight_decay=0.1)
    scale = dict(adjust_lr_fn="match_rms_adamw", ns_coefficients=newton_schulz, ns_steps=40)
    pair = (Muon(ours, **options), torch.optim.Muon(theirs, **scale, **options))
    for step in gradients:
        for params, optimizer in zip((ours, theirs), pair, strict=True):
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        moved = (q - first).norm()
        assert (p - q).norm() < 0.03 * moved
