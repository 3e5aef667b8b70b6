"""Claims about the figures: one command makes each of them anew, from the code and the weights."""

import numpy as np
import pytest
import torch
from PIL import Image

import make_figures
from cli import UsageError


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Make a figure in an empty folder, and open it."""
    monkeypatch.setattr(make_figures, "ASSETS", tmp_path)
    monkeypatch.setattr(make_figures, "COUNT", 20)

    def make(name):
        make_figures.FIGURES[name]()
        (path,) = tmp_path.iterdir()
        return Image.open(path)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in make_figures.FIGURES if name not in ("denoising", "loss") and "lab-" not in name]
)
def test_each_figure_is_made_in_the_same_width(made, name):
    picture = made(name)
    assert picture.width == 1540
    assert picture.convert("L").getextrema() == (0, 255) or name in ("dit_architecture", "shortcut")
    assert picture.getpixel((0, 0))[:3] == (255, 255, 255)


@pytest.mark.slow
def test_the_animation_ends_with_the_digits(made):
    picture = made("denoising")
    assert picture.n_frames == 21
    picture.seek(20)
    assert (np.asarray(picture.convert("L")) < 60).mean() > 0.7  # digits on black, and no noise


@pytest.mark.slow
def test_the_loss_figure_trains_its_own_network(made, monkeypatch, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    monkeypatch.setattr(make_figures, "RUNS", runs)
    monkeypatch.setattr(make_figures, "MARKS", (1, 2, 4))
    monkeypatch.setattr(make_figures, "TRAINING", "--steps 4 --dataset mnist-5000 --batch-size 8 --no-compile".split())
    assert made("loss").width == 1540
    for step in (1, 2, 4):
        assert make_figures.load_model(runs / "figure" / f"step_{step}.safetensors").description["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lab-5", "lab-9"])
def test_an_experiment_of_the_lab_is_run_as_it_is_written(made, monkeypatch, tmp_path_factory, name):
    page = tmp_path_factory.mktemp("page") / "lab.md"
    page.write_text(make_figures.LAB.read_text().replace("--steps 1500", "--steps 2 --batch-size 8 --no-compile"))
    monkeypatch.setattr(make_figures, "LAB", page)
    make_figures.run_changed.cache_clear()
    assert made(name).width == 1540


def test_the_median_of_a_curve_is_centred():
    values = torch.tensor([9.0, 1.0, 2.0, 3.0, 100.0, 5.0, 6.0])
    assert make_figures.centred_median(values, reach=1).tolist() == [9, 2, 2, 3, 5, 6, 5]
    rising = torch.arange(200.0)
    assert torch.equal(make_figures.centred_median(rising)[:150], rising[:150])


def test_attention_weights_add_up_to_one(monkeypatch):
    trained = make_figures.load_model(make_figures.BUNDLED_WEIGHTS)
    times, x_t, x0_hat, maps = make_figures.attention_maps(trained, 3, steps=4)
    config = trained.model.config
    assert maps.shape == (4, config.depth, config.num_heads, 16, 16)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert (len(times), len(x_t), len(x0_hat)) == (4, 4, 4)
    assert not any(block.attn.qkv._forward_hooks for block in trained.model.blocks)


def test_an_unknown_figure_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_figures.py", "portrait"])
    with pytest.raises(UsageError, match=r"no figure 'portrait': use digits, denoising, .*shortcut, lab-1, .*lab-10\Z"):
        make_figures.main()
