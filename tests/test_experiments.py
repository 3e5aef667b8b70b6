"""Claims about the experiments: four networks are conditioned in four ways, and each script runs to the end."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from conftest import ROOT, settings_of

sys.path.insert(0, str(ROOT / "experiments"))

import common  # noqa: E402
import conditioning  # noqa: E402
import fine_tuning  # noqa: E402
import scaling  # noqa: E402

from dit import DiTConfig  # noqa: E402

SMALL = DiTConfig(image_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)


@pytest.mark.parametrize("name", conditioning.NETWORKS)
def test_each_network_depends_on_image_timestep_and_label(name):
    torch.manual_seed(0)
    model = conditioning.NETWORKS[name](SMALL)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 2])
    assert not model(x, t, y).any()  # the last layer starts at zero
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = model(x, t, y)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for other in ((x + 1, t, y), (x, t - 4, y), (x, t, torch.tensor([1, 1]))):
        assert not torch.allclose(model(*other), out, atol=1e-4)


def test_only_adaln_zero_starts_as_the_identity():
    x, t, y = torch.randn(2, 4, 16), torch.tensor([5, 900]), torch.tensor([0, 2])
    for name, network in conditioning.NETWORKS.items():
        model = network(SMALL)
        assert torch.equal(model.blocks[0](x, model.condition(t, y)), x) == (name == "adaLN-Zero")


def test_the_clock_of_a_step_runs_over_five_whole_steps(monkeypatch):
    """On a GPU a step returns before it is computed. What is still to do when the clock starts would count as well."""
    happened = []

    class Norm:
        def item(self):
            happened.append("wait")

    class Trainer:
        shape = (1, 28, 28)

        def __init__(self, *_):
            pass

        def step(self, _, x0, y, lr):
            assert x0.device.type == y.device.type == "meta"  # moved there before
            happened.append("step")
            return {"gradient_norm": Norm()}

    args, _ = settings_of(["--device", "cpu"])
    monkeypatch.setattr(common, "settings", lambda *_: (args, torch.device("meta")))
    monkeypatch.setattr(common.train, "Trainer", Trainer)
    monkeypatch.setattr(common.time, "perf_counter", lambda: happened.append("clock") or float(len(happened)))
    common.seconds_a_step({"a": (None, None), "b": (None, None)}, [], rounds=1)
    assert happened == 2 * ["step", "wait", "clock", *5 * ["step"], "wait", "clock"]


def test_quick_results_are_not_mixed_with_those_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick, real = (common.parse_args("scaling", "", flags) for flags in (["--quick"], []))
    assert quick.results == quick.figures == Path("outputs/scaling-quick") and quick.results.is_dir()
    assert quick.runs != real.runs and real.figures == checkpoint.ASSETS


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count", "figures"), [(conditioning, 16, 1), (scaling, 8, 6), (fine_tuning, 4, 5)])
def test_an_experiment_runs_resumes_and_plots(script, count, figures, tmp_path, capsys):
    words = ["--quick", "--dataset", "mnist-5000", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    script.main(words)
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(rows) == count
    time = "minutes" if script is fine_tuning else "seconds_a_step"
    assert all(row["rho"] > 0 and row[time] > 0 and row.get("gflops", 1) > 0 for row in rows)
    assert len(list(tmp_path.glob("*.png"))) == figures
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    script.main(words)  # everything is in the JSON file already
    assert not (tmp_path / "runs").exists() and "checkpoint.safetensors" not in capsys.readouterr().out
