"""Claims about the tools: sweeps, the classifier that is trained anew, the benchmark."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import checkpoint
import classifier
import dataset
import metrics
import sweep
import train_classifier
from cli import UsageError
from conftest import run_script
from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig
from metrics import Reference
from shortcut import ShortcutDiT


def run(*arguments: object) -> dict:
    return json.loads(sweep.sweep(sweep.parse_args([str(a) for a in arguments])).read_text())


def test_jitter_moves_digits_and_keeps_them_readable(reference, digits):
    x = dataset.to_float(digits.pixels)
    moved = classifier.jitter(x, torch.Generator().manual_seed(0))
    assert (moved - x).abs().mean() > 0.05
    assert moved.min() >= -1.001 and moved.max() <= 1.001
    right = reference.networks["classifier"](moved).argmax(1) == digits.labels
    assert right.double().mean() > 0.98


@pytest.mark.slow
def test_the_classifier_learns(digits):
    model = classifier.fit(digits.pixels, digits.labels, epochs=6)
    right = model(dataset.to_float(digits.pixels)).argmax(1) == digits.labels
    assert right.double().mean() > 0.9


@pytest.mark.slow
def test_the_classifier_is_made_anew(digits, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dataset, "load", lambda *_, **__: digits)
    monkeypatch.setattr(train_classifier, "HELD_OUT", 200)
    for name, value in dict(COUNTS=(20, 100), CLASSIFIER=tmp_path / "c", REFERENCE=tmp_path / "r").items():
        monkeypatch.setattr(metrics, name, value)
    train_classifier.main([])
    made = Reference()
    seen = made.tensors["classifier.test"]
    features = metrics.features(made.networks["classifier"], digits.pixels)
    torch.testing.assert_close(features, seen, rtol=2e-3, atol=2e-3)  # kept as half
    assert made.tensors["random.held_out"].shape == (200, 64)
    assert made.tensors["classifier.floor"][0] > made.tensors["classifier.floor"][1] > 0
    assert capsys.readouterr().out.count("accuracy") == 2
    np.savez(tmp_path / "samples.npz", arr_0=digits.pixels[:, 0].numpy(), labels=digits.labels.numpy())
    train_classifier.main(["--npz", str(tmp_path / "samples.npz")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["trained on 1,000 samples", "trained on 1,000 real images"]


@pytest.mark.slow
@pytest.mark.parametrize("what", sweep.SWEEPS)
def test_a_sweep_plots_a_picture(what, weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flag, values = sweep.SWEEPS[what]
    short = dict(
        steps=[dict(steps=2), dict(steps=3)], guidance=[dict(guidance=1.0), dict(guidance=2.0)],
        sampler=[dict(sampler="ddim", steps=2), dict(sampler="ddpm", steps=3)],
    )[what]
    monkeypatch.setitem(sweep.SWEEPS, what, (flag, short))
    steps = ["--steps", 2] if what == "guidance" else []
    result = run(what, "--checkpoint", weights, "--count", 20, *steps, "--device", "cpu")
    nfe = dict(steps=[4, 6], guidance=[2, 4], sampler=[4, 6])[what]
    assert [point["nfe"] for point in result["sweep"]] == nfe
    assert (tmp_path / "outputs" / f"sweep-{what}-1.png").exists()


def test_the_sweep_over_samplers_sets_them_by_itself():
    for flags in (["--sampler", "ddim"], ["--sampler", "ddim", "--eta", "0.5"], ["--steps", "5"]):
        with pytest.raises(UsageError, match="sets --sampler and --steps by itself"):
            sweep.parse_args(["sampler", *flags])


def test_distilled_weights_are_swept_over_the_steps_that_they_learned(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "bootstrap", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(metrics, "neighbour_distance", lambda points: torch.ones(len(points)))
    config = DiTConfig(hidden_size=8, depth=1, num_heads=1)
    about = checkpoint.describe(ShortcutDiT, config, Diffusion("flow", "x0"), dataset.DIGITS, "MNIST", 0, 1.0)
    checkpoint.save(tmp_path / "fast.safetensors", about, ShortcutDiT(config).state_dict())
    result = run("steps", "--checkpoint", "fast.safetensors", "--count", 20, "--device", "cpu")
    assert [point["nfe"] for point in result["sweep"]] == [1, 2, 4, 8, 16, 32]
    for what, fix in (("guidance", "its guidance, which is fixed: set none"), ("sampler", "sweep steps")):
        with pytest.raises(UsageError, match=fix):
            run(what, "--checkpoint", "fast.safetensors")


def test_images_without_classes_are_swept_in_random_features_only(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "RESAMPLES", 5)
    monkeypatch.setitem(sweep.SWEEPS, "steps", ("--steps", [dict(steps=1), dict(steps=2)]))
    (tmp_path / "grey").mkdir()
    for i in range(80):
        Image.new("L", (8, 8), 3 * i).save(tmp_path / "grey" / f"{i}.png")
    config = DiTConfig(image_size=8, patch_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=0)
    about = checkpoint.describe(DiT, config, Diffusion("linear", "eps", 50), (), "80 images of grey", 0, 1.0)
    checkpoint.save(tmp_path / "weights.safetensors", about, DiT(config).state_dict())
    result = run("steps", "--checkpoint", "weights.safetensors", "--dataset", "grey", "--device", "cpu")
    assert [point["numbers"].keys() for point in result["sweep"]] == [{"FD, random", "rho, random"}] * 2
    assert "| --steps | NFE | seconds for 20 | rho, random |" in capsys.readouterr().out.splitlines()
    assert (tmp_path / "outputs" / "sweep-steps-1.png").exists()


def test_what_a_sweep_sets_itself_cannot_be_set(weights):
    for arguments, fix in (
        (["steps", "--steps", 7], "sets --steps by itself"),
        (["guidance", "--guidance", 2], "sets --guidance by itself"),
        (["sampler", "--checkpoint", weights], "the model knows 50: sweep guidance"),
    ):
        with pytest.raises(UsageError, match=fix):
            run(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["benchmark", "letters", "make_figures", "sweep", "train_classifier"])
def test_a_tool_runs_in_any_folder(tool, tmp_path):
    result = run_script(f"tools/{tool}.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert result.stdout.startswith(f"usage: {tool}.py")
    result = run_script(f"tools/{tool}.py", "--nonsense", cwd=tmp_path)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert result.stderr.startswith(f"{tool}.py: error: ") and result.stderr.count("\n") == 1


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


@pytest.mark.slow
def test_the_benchmark_prints_its_tables(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *_: 1e11)
    monkeypatch.setitem(benchmark.PRESETS["cpu"], "compile", False)
    monkeypatch.setattr(benchmark, "best_precision", lambda _: "bf16")
    monkeypatch.setattr(benchmark, "DEFAULT_STEPS", {"ddpm": 3, "ddim": 2, "dpm++": 2})
    benchmark.main(f"--models DiT-N/7 --rounds 1 --device cpu --checkpoint {tiny_run}".split())
    lines = capsys.readouterr().out.splitlines()
    for precision in ("fp32", "bf16"):
        assert sum(line.startswith(f"| DiT-N/7 | 16 | 128 x 5 | 1.6 | {precision}, ") for line in lines) == 3
    samplers = [line.split(",")[0] for line in lines if line.startswith(("| dd", "| dpm"))]
    assert samplers == ["| ddpm", "| ddim", "| dpm++"]
    assert "peak memory" in lines[-1]
