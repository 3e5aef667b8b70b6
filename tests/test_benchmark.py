"""Claims about the benchmark: it counts the operations of the network and measures what it says."""

import pytest
import torch

import benchmark
from dit import MODELS, DiT, DiTConfig


@pytest.mark.parametrize("P", [7, 2])
def test_flops_are_three_times_those_of_the_matrix_products_forward(P):
    config = DiTConfig(**MODELS[f"DiT-N/{P}"])
    N, D, depth = (28 // P) ** 2, 128, 5
    per_token = depth * (12 * D * D + 2 * N * D) + 2 * P * P * D     # qkv, proj, mlp; attention; the patches
    per_image = depth * 6 * D * D + 2 * D * D + 256 * D + D * D      # the modulations, and the embedder of t
    forward = 2 * (N * per_token + per_image)
    no_gradient = 2 * (N * P * P * D + 256 * D)                      # of the images and the timesteps
    assert benchmark.flops(config) == 3 * forward - no_gradient


def test_the_plain_step_learns_and_averages():
    config = DiTConfig(image_size=8, patch_size=4, hidden_size=8, depth=1, num_heads=1)
    step = benchmark.plain_step(config, 4, torch.device("cpu"))
    cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    model, average = cells["model"], cells["average"]
    assert isinstance(model, DiT) and model.config.learn_sigma
    for _ in range(3):
        step(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    moved = [(p.detach() - q).abs().max().item() for p, q in zip(model.parameters(), average.parameters(), strict=True)]
    assert max(moved) > 1e-4


def test_it_prints_its_tables(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *_: 1e11)
    monkeypatch.setitem(benchmark.PRESETS["cpu"], "compile", False)
    monkeypatch.setattr(benchmark, "cpu_precision", lambda: "bf16")
    monkeypatch.setattr(benchmark, "DEFAULT_STEPS", {"ddpm": 3, "ddim": 2, "dpm++": 2})
    command = f"benchmark.py --models DiT-N/7 --rounds 1 --device cpu --checkpoint {tiny_run}"
    monkeypatch.setattr("sys.argv", command.split())
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    for precision in ("fp32", "bf16"):
        assert sum(line.startswith(f"| DiT-N/7 | 16 | 128 x 5 | 1.6 | {precision}, ") for line in lines) == 3
    samplers = [line.split(",")[0] for line in lines if line.startswith(("| dd", "| dpm"))]
    assert samplers == ["| ddpm", "| ddim", "| dpm++"]
    assert "peak memory" in lines[-1]
