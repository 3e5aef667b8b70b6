"""Claims about drawing images."""

import os

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

import checkpoint
import cli
import inference
from checkpoint import CheckpointError
from cli import UsageError
from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig
from inference import parse_labels
from sampling import image_noise, sample, slerp


@pytest.fixture
def draw(tiny_run, tmp_path, monkeypatch):
    """Run a command line in an empty folder, on the weights of the tiny run: the path of the picture."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, weights: object = tiny_run):
        words = ["--checkpoint", weights, "--device", "cpu", *arguments] if weights else arguments
        return inference.draw(inference.parse_args([str(a) for a in words]))

    return run


@pytest.fixture(scope="module")
def network():
    """A network that answers to everything: noise, timestep and label."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model, Diffusion("flow", "v")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_an_image_is_the_same_in_any_batch_and_of_any_count(network, sampler):
    labels = torch.arange(7) % 3
    options = dict(seed=5, sampler=sampler, steps=6, guidance=2.0, eta=0.5 if sampler == "ddim" else 0.0)
    whole = sample(*network, labels, **options)
    parts = [sample(*network, labels[i : i + 2], indices=range(i, min(i + 2, 7)), **options) for i in (0, 2, 4, 6)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    assert (whole[0] - whole[3]).abs().max() > 0.1  # of the same label, but another image


def test_bfloat16_changes_the_images_a_little_and_float32_is_the_default(network):
    labels = torch.arange(4) % 3
    exact, rounded = (sample(*network, labels, steps=6, precision=precision) for precision in ("fp32", "bf16"))
    assert torch.equal(sample(*network, labels, steps=6), exact)
    assert 0 < (exact - rounded).abs().mean() < 0.05


def test_another_seed_is_another_image_and_seeds_share_none():
    noise = [image_noise(seed, range(100), (4,), "cpu")() for seed in (0, 1, 2**32 - 1)]
    every = torch.cat(noise)
    assert len(every.unique(dim=0)) == 300


def test_noise_is_normal_within_and_between_images():
    noise = image_noise(0, range(500), (1, 8, 8), "cpu")
    first, second = noise().flatten(1), noise().flatten(1)
    for x in (first, first[:, 0], second):
        assert abs(x.mean()) < 0.15
        assert 0.9 < x.std() < 1.1
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.02


def test_a_grid_has_the_labels_as_rows(draw):
    path = draw("--per-class", 4)
    assert str(path) == "outputs/grid-1.png"
    assert Image.open(path).size == ((4 * 10 + 2) * 8, (3 * 10 + 2) * 8)
    assert str(draw("--per-class", 4)) == "outputs/grid-2.png"


def test_one_image_a_class_is_one_row(draw):
    assert Image.open(draw("--per-class", 1, "--labels", 0, 2, 0, 2, 1)).size == ((5 * 10 + 2) * 8, 12 * 8)


def test_a_trajectory_ends_with_the_image_of_the_grid(draw):
    grid = np.asarray(Image.open(draw("--per-class", 1, "--labels", 0, 1)))
    trajectory = np.asarray(Image.open(draw("--trajectory", "--labels", 0, 1, "--steps", 20)))
    assert trajectory.shape == ((2 * 10 + 2) * 8, (8 * 10 + 2) * 8)  # of 20 steps every third, and the image
    assert np.array_equal(trajectory[2 * 8 : 10 * 8, -80:-16], grid[2 * 8 : 10 * 8, 2 * 8 : 10 * 8])


def test_an_animation_has_a_frame_a_step_and_rests(draw):
    path = draw("--gif", "--per-class", 2, "--steps", 7, "--output", "way.gif")
    with Image.open(path) as animation:
        assert animation.n_frames == 8
        animation.seek(7)
        assert animation.info["duration"] == 2000


def test_compared_guidance_is_a_row_a_weight(draw):
    image = np.asarray(Image.open(draw("--compare-guidance", 0, 1, 4, "--labels", 0, 1, 2)))
    assert image.shape == ((3 * 10 + 2) * 8, (3 * 10 + 2) * 8)
    command = ["--compare-guidance", 0, 1, 4, "--labels", 0, 1, 2, "--guidance", 1, 300, 400]
    between = np.asarray(Image.open(draw(*command)))  # at these timesteps alone
    assert between.shape == image.shape and not np.array_equal(between, image)


def test_an_interpolation_goes_from_image_to_image(draw):
    """Its ends are the images of the seed; a film goes back to where it began."""
    row = np.array(Image.open(draw("--interpolate", "dark", "light", "--seed", 3, "--steps", 4)))
    ends = np.array(Image.open(draw("--labels", "dark", "light", "--per-class", 1, "--seed", 3, "--steps", 4)))
    cell = ends.shape[1] // 2
    assert row.shape[0] == ends.shape[0] and row.shape[1] > 4 * ends.shape[1]
    np.testing.assert_allclose(row[:, :cell].astype(int), ends[:, :cell], atol=1)
    np.testing.assert_allclose(row[:, -cell:].astype(int), ends[:, -cell:], atol=1)
    film = Image.open(draw("--interpolate", 0, 2, 1, "--gif", "--steps", 2))
    assert film.format == "GIF" and film.n_frames == 3 * 24


def test_slerp_keeps_the_length_of_noise():
    a, b = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for fraction in (0.0, 0.3, 0.5, 1.0):
        assert slerp(a, b, fraction).norm().item() == pytest.approx(28, rel=0.1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize(("half", "kept"), [("left", np.s_[:, :4]), ("bottom", np.s_[4:])])
def test_inpainting_keeps_its_half(draw, images, half, kept):
    image = next((images / "light").glob("*.png"))
    out = draw("--inpaint", half, image, "--npz", "many.npz", "--count", 6)
    drawn, given = np.load(out)["arr_0"][..., 0], np.array(Image.open(image))
    for i in range(6):
        assert np.array_equal(drawn[i][kept], given[kept]) and not np.array_equal(drawn[i], given)
    assert Image.open(draw("--inpaint", half, image, "--per-class", 2)).size[0] > 0


def test_an_npz_is_what_evaluators_read(draw):
    path = draw("--npz", "samples.npz", "--count", 11, "--batch-size", 4)
    with np.load(path) as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.shape == (11, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert sorted(p.name for p in path.parent.iterdir() if "samples" in p.name) == ["samples.npz"]


def test_ranks_share_an_npz(tiny_run, draw, tmp_path):
    draw("--npz", "one.npz", "--count", 7, "--batch-size", 2)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    arguments = ("--checkpoint", tiny_run, "--npz", "two.npz", "--count", 7, "--batch-size", 2, "--device", "cpu")
    result = run_script("inference.py", *arguments, cwd=tmp_path, python=torchrun)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
        assert np.array_equal(one["labels"], two["labels"])


def test_official_weights_write_latents(draw, tmp_path):
    config = DiTConfig(**MODELS["DiT-S/8"], image_size=16, in_channels=4, num_classes=10, learn_sigma=True)
    torch.save(DiT(config).state_dict(), tmp_path / "official.pt")
    arguments = ("--model", "DiT-S/8", "--labels", 3, "--per-class", 2, "--steps", 2, "--sampler", "ddpm")
    with np.load(draw(*arguments, weights=tmp_path / "official.pt")) as file:
        assert file["arr_0"].shape == (2, 4, 16, 16)
        assert file["arr_0"].dtype == np.float32
        assert file["labels"].tolist() == [3, 3]


def test_labels_are_numbers_names_or_ranges():
    digits = list("0123456789")
    assert parse_labels(["3", "1", "4"], digits) == [3, 1, 4]
    assert parse_labels(["0-9"], digits) == list(range(10))
    assert parse_labels(["7-8", "0"], digits) == [7, 8, 0]
    assert parse_labels(["dog", "t-shirt"], ["cat", "t-shirt", "dog"]) == [2, 1]
    assert parse_labels(None, ["cat", "dog"]) == [0, 1]
    assert parse_labels(None, [str(i) for i in range(1000)]) == list(range(10))
    for wrong in (["10"], ["8-12"], ["x"], ["5-3"], ["-1"], ["0-99999999999"]):
        with pytest.raises(UsageError):
            parse_labels(wrong, digits)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--steps", 0], "use 1 to 1000"),
        (["--steps", 1001], "use 1 to 1000"),
        (["--per-class", 0], "use 1 to 10000"),
        (["--batch-size", -1], "use 1 or more"),
        (["--seed", -1], "use 0 to 4294967295"),
        (["--seed", 2**32], "use 0 to 4294967295"),
        (["--eta", 0.5], "with --sampler ddim"),
        (["--guidance", "nan"], "finite"),
        (["--guidance", 2, 500, 100], "LOW <= HIGH"),
        (["--labels", 3], "the classes are 0 to 2"),
        (["--labels", "seven"], "names: dark, grey, light"),
        (["--output", "digits.jpg"], "must end in .png"),
        (["--npz", "digits.zip"], "must end in .npz"),
        (["--npz", "digits.npz", "--labels", 1], "leave out --output, --labels"),
        (["--count", 5], "goes with --npz"),
        (["--trajectory", "--per-class", 2], "leave --per-class out"),
        (["--sampler", "shortcut"], "was not distilled: draw from it with any other --sampler"),
        (["--interpolate", 0], "needs two labels or more"),
        (["--interpolate", 0, 1, "--sampler", "ddpm"], "samplers that add no noise"),
        (["--interpolate", 0, 1, "--per-class", 3], "leave other flags out"),
        (["--inpaint", "middle", "x.png"], "one of left, right, top, bottom"),
        (["--inpaint", "left", "nowhere.png"], "cannot read the image nowhere.png"),
    ],
)
def test_what_cannot_be_asked_for_names_the_fix(draw, arguments, fix, tmp_path):
    with pytest.raises(UsageError, match=fix):
        draw(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_overwritten(draw, tmp_path):
    for name, arguments in (("mine.png", ["--output", "mine.png"]), ("mine.npz", ["--npz", "mine.npz"])):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="is there already"):
            draw(*arguments)
        assert (tmp_path / name).read_text() == "mine"


def test_without_weights_it_says_how_to_get_some(draw, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "BUNDLED_WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"python train\.py"):
        draw(weights=None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        draw(weights="nowhere.pt")


def test_bare_it_takes_the_newest_run_then_the_bundled_weights(draw, monkeypatch, tmp_path, tiny_run):
    monkeypatch.setattr(cli, "BUNDLED_WEIGHTS", tmp_path / "bundled.safetensors")
    (tmp_path / "bundled.safetensors").write_bytes((tiny_run / "weights.safetensors").read_bytes())
    assert cli.find_checkpoint().name == "bundled.safetensors"
    assert draw("--per-class", 2, weights=None).exists()
    for name in ("old", "new"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").write_bytes((tiny_run / "checkpoint.pt").read_bytes())
    os.utime(tmp_path / "runs" / "old" / "checkpoint.pt", (1, 1))
    assert cli.find_checkpoint().parent.name == "new"


def test_the_guidance_of_the_weights_is_the_default_and_a_weight_of_ones_own_acts_throughout(tiny_run):
    def settings(*words):
        args = inference.parse_args(["--checkpoint", str(tiny_run), "--device", "cpu", *words])
        settings = cli.open_model(args).settings
        return settings["guidance"], settings["interval"]

    assert settings() == (2.0, [300, 800])
    assert settings("--guidance", "3") == (3.0, None)
    assert settings("--guidance", "3", "100", "200") == (3.0, [100, 200])


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """Weights of a shortcut network that was never trained."""
    shape = dict(image_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    model = DiT(DiTConfig(**shape, shortcut=True))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    path = tmp_path_factory.mktemp("distilled") / "fast.safetensors"
    description = checkpoint.describe(model.config, Diffusion("flow", "x0"), ("a", "b", "c"), "nothing", 0, 1.0)
    checkpoint.save_weights(path, model.state_dict(), description)
    return path


def test_distilled_weights_draw_in_few_steps(draw, distilled, monkeypatch):
    calls, forward = [], DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y, d: calls.append(int(d[0])) or forward(self, x, t, y, d))
    two = ("--steps", 2, "--sampler", "shortcut")
    for steps, sizes in (((), [250] * 4), (("--steps", 1), [1000]), (two, [500] * 2)):
        calls.clear()
        assert draw(*steps, weights=distilled).exists()
        assert calls == sizes


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--steps", 3], "use 1, 2, 4, 8, 16, 32, which these weights learned"),
        (["--sampler", "ddim"], "was distilled: draw from it with --sampler shortcut alone"),
        (["--guidance", 2], "distilled with its guidance, which is fixed: set none"),
        (["--compare-guidance", 1, 2], "which is fixed: set none"),
    ],
)
def test_what_distilled_weights_cannot_do_names_the_fix(draw, distilled, arguments, fix, tmp_path):
    with pytest.raises(UsageError, match=fix):
        draw(*arguments, weights=distilled)
    assert not list(tmp_path.iterdir())


def test_an_unconditional_model_draws_without_labels(draw, tmp_path):
    model, diffusion = DiT(DiTConfig(image_size=8, patch_size=4, num_classes=0)), Diffusion()
    description = checkpoint.describe(model.config, diffusion, (), "nothing", 0, guidance=1.0)
    checkpoint.save_weights(tmp_path / "weights.safetensors", model.state_dict(), description)
    assert draw("--steps", 2, "--per-class", 3, weights=tmp_path / "weights.safetensors").exists()
    with pytest.raises(UsageError, match="knows no labels"):
        draw("--labels", 1, weights=tmp_path / "weights.safetensors")


@pytest.mark.parametrize("script", ["train.py", "inference.py", "evaluate.py", "judge.py", "benchmark.py"])
def test_a_flag_that_does_not_exist_is_one_line_and_exit_status_2(tmp_path, script):
    result = run_script(script, "--nonsense", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"{script}: error: unrecognized arguments: --nonsense (see --help)\n"


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    result = run_script("inference.py", "--checkpoint", "nowhere.pt", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "inference.py: error: no checkpoint nowhere.pt: give a .pt or .safetensors file, or the folder of a run\n"
    )


def test_drawing_imports_neither_torchvision_nor_pyplot(tiny_run, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference; "
        f"inference.draw(inference.parse_args(['--checkpoint', {str(tiny_run)!r}, '--steps', '2'])); "
        "assert not {'torchvision', 'matplotlib', 'torch._dynamo', 'dataset'} & set(sys.modules), sys.modules.keys()"
    )
    result = run_script("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
