"""Claims about sampling images."""

import os
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import cli
import inference
import model_flags
import sample_npz
from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, CheckpointError, load_model
from cli import UsageError
from conftest import ROOT, run_script, trained
from dataset import DataError
from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig
from model_flags import parse_labels
from sampling import image_noise, slerp, to_pil, to_uint8
from shortcut import ShortcutDiT


@pytest.fixture
def generate(tiny_run, tmp_path, monkeypatch):
    """Run a command line in an empty folder, on the weights of the tiny run: the path of the picture."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, weights: object = tiny_run):
        words = ["--checkpoint", weights, "--device", "cpu", *arguments] if weights else arguments
        return inference.generate(inference.parse_args([str(a) for a in words]))

    return run


@pytest.fixture
def many(tiny_run, tmp_path, monkeypatch):
    """The same for tools/sample_npz.py."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, weights: object = tiny_run):
        sample_npz.main([str(a) for a in ("--checkpoint", weights, "--device", "cpu", *arguments)])
        return max(tmp_path.rglob("*.npz"), key=lambda path: path.stat().st_mtime_ns)

    return run


@pytest.fixture(scope="module")
def network():
    """A network that answers to everything: noise, timestep and label."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(image_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return trained(model, Diffusion("flow", "v"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_an_image_is_the_same_in_any_batch_and_of_any_count(network, sampler):
    labels = torch.arange(7) % 3
    options = dict(seed=5, sampler=sampler, steps=6, guidance=2.0, eta=0.5 if sampler == "ddim" else 0.0)
    whole = network.sample_batch(labels, **options)
    parts = [
        network.sample_batch(labels[i : i + 2], indices=range(i, min(i + 2, 7)), **options) for i in (0, 2, 4, 6)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    assert (whole[0] - whole[3]).abs().max() > 0.1  # of the same label, but another image


def test_bfloat16_changes_the_images_a_little_and_float32_is_the_default(network):
    labels = torch.arange(4) % 3
    options = dict(sampler="dpm++", steps=6)
    exact, rounded = (network.sample_batch(labels, precision=p, **options) for p in ("fp32", "bf16"))
    assert torch.equal(network.sample_batch(labels, **options), exact)
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


def test_a_grid_has_the_labels_as_rows(generate):
    path = generate("--per-class", 4)
    assert str(path) == "outputs/grid-1.png"
    assert Image.open(path).size == ((4 * 10 + 2) * 8, (3 * 10 + 2) * 8)
    assert str(generate("--per-class", 4)) == "outputs/grid-2.png"


def test_one_image_a_class_is_one_row(generate):
    assert Image.open(generate("--per-class", 1, "--labels", 0, 2, 0, 2, 1)).size == ((5 * 10 + 2) * 8, 12 * 8)


def test_a_trajectory_ends_with_the_image_of_the_grid(generate):
    grid = np.asarray(Image.open(generate("--per-class", 1, "--labels", 0, 1)))
    trajectory = np.asarray(Image.open(generate("--trajectory", "--labels", 0, 1, "--steps", 20)))
    assert trajectory.shape == ((2 * 10 + 2) * 8, (8 * 10 + 2) * 8)  # of 20 steps every third, and the image
    assert np.array_equal(trajectory[2 * 8 : 10 * 8, -80:-16], grid[2 * 8 : 10 * 8, 2 * 8 : 10 * 8])


def test_an_animation_has_a_frame_a_step_and_rests(generate):
    path = generate("--gif", "--per-class", 2, "--steps", 7, "--output", "way.gif")
    with Image.open(path) as animation:
        assert animation.n_frames == 8
        animation.seek(7)
        assert animation.info["duration"] == 2000


def test_compared_guidance_is_a_row_a_weight(generate):
    image = np.asarray(Image.open(generate("--compare-guidance", 0, 1, 4, "--labels", 0, 1, 2)))
    assert image.shape == ((3 * 10 + 2) * 8, (3 * 10 + 2) * 8)
    command = ["--compare-guidance", 0, 1, 4, "--labels", 0, 1, 2, "--guidance", 1, 300, 400]
    between = np.asarray(Image.open(generate(*command)))  # only at these timesteps
    assert between.shape == image.shape and not np.array_equal(between, image)


def test_an_interpolation_goes_from_image_to_image(generate):
    """Its ends are the images of the seed; a film goes back to where it began."""
    row = np.array(Image.open(generate("--interpolate", "dark", "light", "--seed", 3, "--steps", 4)))
    ends = np.array(Image.open(generate("--labels", "dark", "light", "--per-class", 1, "--seed", 3, "--steps", 4)))
    cell = ends.shape[1] // 2
    assert row.shape[0] == ends.shape[0] and row.shape[1] > 4 * ends.shape[1]
    np.testing.assert_allclose(row[:, :cell].astype(int), ends[:, :cell], atol=1)
    np.testing.assert_allclose(row[:, -cell:].astype(int), ends[:, -cell:], atol=1)
    film = Image.open(generate("--interpolate", 0, 2, 1, "--gif", "--steps", 2))
    assert film.format == "GIF" and film.n_frames == 3 * 24


def test_slerp_keeps_the_length_of_noise():
    a, b = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for fraction in (0.0, 0.3, 0.5, 1.0):
        assert slerp(a, b, fraction).norm().item() == pytest.approx(28, rel=0.1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize(("half", "kept"), [("left", np.s_[:, :4]), ("bottom", np.s_[4:])])
def test_inpainting_keeps_its_half(generate, tiny_run, images, half, kept):
    image = next((images / "light").glob("*.png"))
    trained = checkpoint.load_model(tiny_run)
    known = inference.read_image(str(image), trained), inference.half_mask(half, 8)
    samples = to_uint8(trained.sample([0, 1, 2] * 2, inpaint=known))
    sampled, given = samples[:, 0].numpy(), np.array(Image.open(image))
    for i in range(6):
        assert np.array_equal(sampled[i][kept], given[kept]) and not np.array_equal(sampled[i], given)
    assert Image.open(generate("--inpaint", half, image, "--per-class", 2)).size[0] > 0


def test_images_to_begin_with_are_divided_into_batches_like_the_labels():
    trained = load_model(BUNDLED_WEIGHTS)
    images, mask = torch.rand(3, *trained.shape) * 2 - 1, inference.half_mask("left", trained.shape[1])
    for options in (dict(image=images, strength=0.5), dict(inpaint=(images, mask)), dict(start=images)):
        whole, parts = (trained.sample([3, 4, 5], size, steps=2, **options) for size in (3, 2))
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


def test_distilled_weights_keep_an_image_only_from_the_timesteps_that_they_know(generate, tmp_path):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "image.png")
    flags = ["--from", tmp_path / "image.png", "--labels", 3, "--per-class", 1]
    for steps, strength, least in ((1, 0.6, "1.00"), (2, 0.4, "0.50"), (4, 0, "0.25"), (8, 0.12, "0.13")):
        with pytest.raises(UsageError, match=f"begin with a --strength of {least} or more: set that, or more --steps"):
            generate(*flags, "--steps", steps, "--strength", strength, weights=DISTILLED_WEIGHTS)
        assert generate(*flags, "--steps", steps, "--strength", least, weights=DISTILLED_WEIGHTS).exists()
    assert generate(*flags, "--steps", 4, weights=DISTILLED_WEIGHTS).exists()
    assert generate(*flags, "--steps", 4, "--strength", 0.5, weights=BUNDLED_WEIGHTS).exists()  # any


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_an_image_to_begin_with_is_kept_as_far_as_the_strength_says(strength):
    """SDEdit: without noise almost nothing changes, and with all of it almost nothing stays."""
    trained = checkpoint.load_model(checkpoint.BUNDLED_WEIGHTS)
    image = inference.read_image(str(ROOT / "assets" / "three.png"), trained)
    samples, free = trained.sample([8, 8], image=image, strength=strength, steps=10), trained.sample([8, 8], steps=10)
    kept, changed = ((samples - x).abs().mean().item() for x in (image, free))
    assert (kept < 0.05) == (strength == 0)
    assert (changed < 0.05) == (strength == 1)


def test_an_image_becomes_what_the_labels_say(generate, images):
    image = next((images / "light").glob("*.png"))
    path = generate("--from", image, "--strength", 0.8, "--labels", 0, "--per-class", 3, "--steps", 4)
    assert Image.open(path).size == (3 * 80 + 16, 96)
    with pytest.raises(UsageError, match="--strength goes with --from"):
        generate("--strength", 0.5)
    with pytest.raises(UsageError, match="not allowed with"):
        generate("--from", image, "--inpaint", "left", image)
    with pytest.raises(DataError, match="nowhere.png"):
        generate("--from", "nowhere.png")


def test_a_model_is_used_from_python_in_a_line(tiny_run, capfd):
    """Quiet, with labels as a list or a tensor, and pictures of the result."""
    trained = checkpoint.load_model(tiny_run)
    images = trained.sample([0, 1, 2])
    assert images.shape == (3, 1, 8, 8) and images.device.type == "cpu" and images.abs().max() <= 1
    torch.testing.assert_close(images, trained.sample(torch.tensor([0, 1, 2]), 2))
    assert [picture.size for picture in to_pil(images)] == [(8, 8)] * 3
    x_t = trained.diffusion.q_sample(images, torch.full((3,), 500), torch.randn(3, 1, 8, 8))
    assert trained.predict_x0(x_t, 500, [0, 1, 2]).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="labels are 0 to 7: use 0 to 3"):
        trained.sample([0, 7])
    assert capfd.readouterr() == ("", "")


def test_an_npz_is_what_evaluators_read(many):
    path = many("samples.npz", "--count", 11, "--batch-size", 4)
    with np.load(path) as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.shape == (11, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert sorted(p.name for p in path.parent.iterdir() if "samples" in p.name) == ["samples.npz"]


@pytest.mark.slow
def test_ranks_share_an_npz(tiny_run, many, tmp_path):
    many("one.npz", "--count", 7, "--batch-size", 2)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    arguments = ("two.npz", "--checkpoint", tiny_run, "--count", 7, "--batch-size", 2, "--device", "cpu")
    result = run_script("tools/sample_npz.py", *arguments, cwd=tmp_path, python=torchrun)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
        assert np.array_equal(one["labels"], two["labels"])


def test_official_weights_write_latents(many, generate, tmp_path):
    config = DiTConfig(**MODELS["DiT-S/8"], image_size=16, in_channels=4, num_classes=10, learn_sigma=True)
    torch.save(DiT(config).state_dict(), tmp_path / "official.pt")
    arguments = ("--model", "DiT-S/8", "--steps", 2, "--sampler", "ddpm")
    with pytest.raises(UsageError, match="makes latents: add --vae"):
        generate(*arguments, weights=tmp_path / "official.pt")
    with np.load(many("--count", 2, *arguments, weights=tmp_path / "official.pt")) as file:
        assert file["arr_0"].shape == (2, 4, 16, 16)
        assert file["arr_0"].dtype == np.float32
        assert file["labels"].tolist() == [0, 1]


def test_official_weights_may_be_wrapped_or_safetensors(many, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "DiT-S/8", {**MODELS["DiT-S/8"], "depth": 1})  # the whole one is read above
    config = DiTConfig(**MODELS["DiT-S/8"], image_size=16, in_channels=4, num_classes=10, learn_sigma=True)
    weights = DiT(config).state_dict()
    torch.save({"model": {}, "ema": weights}, tmp_path / "nested.pt")
    torch.save({f"module._orig_mod.{name}": value for name, value in weights.items()}, tmp_path / "prefixed.pt")
    save_file(weights, tmp_path / "official.safetensors")
    for i, name in enumerate(("nested.pt", "prefixed.pt", "official.safetensors")):
        arguments = (f"{i}.npz", "--model", "DiT-S/8", "--count", 1, "--steps", 1)
        assert np.load(many(*arguments, weights=tmp_path / name))["arr_0"].shape == (1, 4, 16, 16)


def test_labels_are_numbers_names_or_ranges():
    digits = list("0123456789")
    assert parse_labels(["3", "1", "4"], digits) == [3, 1, 4]
    assert parse_labels(["0-9"], digits) == list(range(10))
    assert parse_labels(["7-8", "0"], digits) == [7, 8, 0]
    assert parse_labels(["dog", "t-shirt", "0", "0-1"], ["cat", "t-shirt", "dog"]) == [2, 1, 0, 0, 1]
    assert parse_labels(["cat-dog"], ["cat", "t-shirt", "dog"]) == [0, 1, 2]
    assert parse_labels(["cafe\u0301"], ["caf\u00e9"]) == [0]
    assert parse_labels(None, ["cat", "dog"]) == [0, 1]
    assert parse_labels(None, [str(i) for i in range(1000)]) == list(range(10))
    months = [str(i) for i in range(1, 13)]
    assert parse_labels(["2-4", "12", "1"], months) == [1, 2, 3, 11, 0]
    wrong = (["10"], ["8-12"], ["x"], ["5-3"], ["5-3", "1"], ["-1"], ["0-99999999999"])
    for words, classes in (*((words, digits) for words in wrong), (["0"], months), (["13"], months)):
        with pytest.raises(UsageError, match="no class .*: use"):
            parse_labels(words, classes)


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
        (["--labels", 3], "use numbers 0 to 2"),
        (["--labels", "seven"], "range of them: dark, grey, light"),
        (["--output", "digits.jpg"], "must end in .png"),
        (["--trajectory", "--per-class", 2], "leave --per-class out"),
        (["--sampler", "shortcut"], "was not distilled: use another --sampler"),
        (["--interpolate", 0], "needs two labels or more"),
        (["--interpolate", 0, 1, "--sampler", "ddpm"], "samplers that add no noise"),
        (["--interpolate", 0, 1, "--per-class", 3], "leave other flags out"),
        (["--inpaint", "middle", "x.png"], "one of left, right, top, bottom"),
    ],
)
def test_what_cannot_be_asked_for_names_the_fix(generate, arguments, fix, tmp_path):
    with pytest.raises(UsageError, match=fix):
        generate(*arguments)
    cli.remove_empty()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_image_to_complete_that_is_missing_is_named(generate):
    with pytest.raises(DataError, match="nowhere.png is not there"):
        generate("--inpaint", "left", "nowhere.png")


def test_a_file_that_is_there_is_not_overwritten(generate, many, tmp_path):
    commands = {"mine.png": lambda: generate("--output", "mine.png"), "mine.npz": lambda: many("mine.npz")}
    for name, command in commands.items():
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="is there already"):
            command()
        assert (tmp_path / name).read_text() == "mine"


def test_without_weights_it_says_how_to_get_some(generate, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "BUNDLED_WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"python train\.py"):
        generate(weights=None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        generate(weights="nowhere.pt")


def test_bare_it_takes_the_newest_run_then_the_bundled_weights(generate, monkeypatch, tmp_path, tiny_run):
    monkeypatch.setattr(checkpoint, "BUNDLED_WEIGHTS", tmp_path / "bundled.safetensors")
    (tmp_path / "bundled.safetensors").write_bytes((tiny_run / "weights.safetensors").read_bytes())
    assert checkpoint.find_checkpoint().name == "bundled.safetensors"
    assert generate("--per-class", 2, weights=None).exists()
    for name in ("old", "new"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(tiny_run / "checkpoint.safetensors", tmp_path / "runs" / name)
    os.utime(tmp_path / "runs" / "old" / "checkpoint.safetensors", (1, 1))
    assert checkpoint.find_checkpoint().parent.name == "new"


def test_the_guidance_of_the_weights_is_the_default_and_a_weight_of_ones_own_acts_throughout(tiny_run):
    def settings(*words):
        args = inference.parse_args(["--checkpoint", str(tiny_run), "--device", "cpu", *words])
        settings = model_flags.open_model(args).settings
        return settings["guidance"], settings["guidance_interval"]

    assert settings() == (2.0, [300, 800])
    assert settings("--guidance", "3") == (3.0, None)
    assert settings("--guidance", "3", "100", "200") == (3.0, [100, 200])


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """Weights of a shortcut network that was never trained."""
    shape = dict(image_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    model = ShortcutDiT(DiTConfig(**shape))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    path = tmp_path_factory.mktemp("distilled") / "fast.safetensors"
    description = checkpoint.describe(
        ShortcutDiT, model.config, Diffusion("flow", "x0"), ("a", "b", "c"), "nothing", 0, 1.0
    )
    checkpoint.save(path, description, model.state_dict())
    return path


def test_distilled_weights_sample_in_few_steps(generate, distilled, monkeypatch):
    calls, forward = [], ShortcutDiT.forward

    def watched(self, x, steps, y):
        calls.append(steps[0].tolist())
        return forward(self, x, steps, y)

    monkeypatch.setattr(ShortcutDiT, "forward", watched)
    two = ("--steps", 2, "--sampler", "shortcut")
    four = [[999, 749], [749, 499], [499, 249], [249, -1]]
    for steps, expected in (((), four), (("--steps", 1), [[999, -1]]), (two, [[999, 499], [499, -1]])):
        calls.clear()
        assert generate(*steps, weights=distilled).exists()
        assert calls == expected


def test_one_step_would_only_fade_pixels_so_an_interpolation_takes_two(generate, distilled):
    with pytest.warns(UserWarning, match="interpolating in 2 steps"):
        one = np.asarray(Image.open(generate("--interpolate", 0, 1, "--steps", 1, weights=distilled)))
    two = np.asarray(Image.open(generate("--interpolate", 0, 1, "--steps", 2, weights=distilled)))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--steps", 3], "use 1, 2, 4, 8, 16, 32, which a shortcut model learns"),
        (["--sampler", "ddim"], "was distilled: sample from it only with --sampler shortcut"),
        (["--guidance", 2], "distilled with its guidance, which is fixed: set none"),
        (["--compare-guidance", 1, 2], "which is fixed: set none"),
    ],
)
def test_what_distilled_weights_cannot_do_names_the_fix(generate, distilled, arguments, fix, tmp_path):
    with pytest.raises(UsageError, match=fix):
        generate(*arguments, weights=distilled)
    assert not list(tmp_path.iterdir())


def test_an_unconditional_model_samples_without_labels(generate, tmp_path):
    model, diffusion = DiT(DiTConfig(image_size=8, patch_size=4, num_classes=0)), Diffusion()
    description = checkpoint.describe(DiT, model.config, diffusion, (), "nothing", 0, guidance=1.0)
    checkpoint.save(tmp_path / "weights.safetensors", description, model.state_dict())
    assert generate("--steps", 2, "--per-class", 3, weights=tmp_path / "weights.safetensors").exists()
    with pytest.raises(UsageError, match="knows no labels"):
        generate("--labels", 1, weights=tmp_path / "weights.safetensors")


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run the script with these words, in this process: what it prints where it ends with status 2."""
    for module, name in ((sys, "stdout"), (sys, "stderr"), (warnings, "showwarning")):
        monkeypatch.setattr(module, name, getattr(module, name))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["inference.py", *words])
        with pytest.raises(SystemExit) as caught:
            cli.run_script(inference.main)
        assert caught.value.code == 2
        return capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_an_error_is_one_line_and_exit_status_2(refused):
    assert refused("--checkpoint", "nowhere.pt") == (
        "inference.py: error: no checkpoint nowhere.pt: give a .safetensors file, or the folder of a run\n"
    )


@pytest.mark.parametrize("environment", [
    dict(RANK="1", WORLD_SIZE="1"), dict(WORLD_SIZE="2"), dict(RANK="x"), dict(RANK="0", WORLD_SIZE="2"),
])
def test_an_environment_of_several_processes_that_are_not_there_is_refused(
    refused, monkeypatch, tmp_path, environment
):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, environment.get(name, ""))  # an empty one counts as unset
    assert cli.process_numbers() == (0, 0, 1)  # so are RANK and WORLD when the script is loaded
    line = refused()
    assert line.count("\n") == 1 and "start with torchrun, or unset both" in line
    assert not list(tmp_path.iterdir())
    for name in environment:
        monkeypatch.setenv(name, "")
    cli.check_environment()


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [">&-", "2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true"])
def test_output_that_goes_away_stops_nothing(tiny_run, tmp_path, outputs):
    command = f"{sys.executable} {ROOT / 'inference.py'} --checkpoint {tiny_run} --steps 2 --output new.png {outputs}"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, timeout=100)
    assert result.returncode == 0 and b"Traceback" not in result.stderr and b"Exception" not in result.stderr
    assert Image.open(tmp_path / "new.png").size[0] > 0


def test_sampling_imports_neither_torchvision_nor_matplotlib(tiny_run, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference; "
        f"inference.generate(inference.parse_args(['--checkpoint', {str(tiny_run)!r}, '--steps', '2'])); "
        "assert not {'torchvision', 'matplotlib', 'torch._dynamo'} & set(sys.modules), sys.modules.keys()"
    )
    result = run_script("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
