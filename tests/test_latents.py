"""Claims about latents: a folder is encoded, trained on and decoded again."""

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import cli
import dataset
import distill
import encode
import inference
import latents
import sample_npz
import train
from cli import UsageError
from conftest import losses
from dataset import DataError
from sampling import image_noise, to_uint8

SMALL = ["--model", "DiT-N/4", "--batch-size", "8", "--no-compile", "--device", "cpu"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """The folder of a tiny AutoencoderKL, which halves a side twice and has latents of 4 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
    options = dict(block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, shift_factor=0.5)
    AutoencoderKL(down_block_types=down, up_block_types=up, **options).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoded(vae, images, tmp_path_factory):
    """60 images of three classes as latents of 8 x 8."""
    path = tmp_path_factory.mktemp("latents") / "digits.npz"
    words = [images, "--vae", vae, "--output", path, "--image-size", 32, "--batch-size", 25, "--device", "cpu"]
    assert encode.encode(encode.parse_args([str(word) for word in words])) == path
    return path


@pytest.fixture(scope="module")
def latent_run(encoded, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "run"
    words = ["--dataset", str(encoded), *SMALL, "--steps", "4", "--save-every", "2", "--vae", vae]
    assert train.main([*words, "--run-dir", str(folder)]) == 0
    return folder


def sample(folder, output, *words) -> Image.Image | dict:
    """What inference.py makes, or for an .npz tools/sample_npz.py."""
    arguments = ["--checkpoint", folder, "--steps", 2, "--device", "cpu", *words]
    if output.suffix == ".npz":
        sample_npz.main([str(word) for word in [output, *arguments]])
        return dict(np.load(output))
    args = inference.parse_args([str(word) for word in [*arguments, "--output", output]])
    return Image.open(inference.generate(args))


def test_latents_are_those_of_the_autoencoder(encoded, vae, images):
    from diffusers import AutoencoderKL

    with np.load(encoded) as file:
        assert file["arr_0"].shape == (60, 4, 8, 8) and file["arr_0"].dtype == np.float32
        assert file["labels"].tolist() == [0] * 20 + [1] * 20 + [2] * 20
        assert file["classes"].tolist() == ["dark", "grey", "light"]
        first = torch.from_numpy(file["arr_0"][:1])
    autoencoder = AutoencoderKL.from_pretrained(vae)
    pixels = dataset.from_folder(images, 32).pixels[:1].expand(1, 3, 32, 32)
    posterior = autoencoder.encode(dataset.to_float(pixels)).latent_dist
    noise = image_noise(0, range(1), (4, 8, 8), "cpu")()
    expected = (posterior.mean + posterior.std * noise - 0.5) * autoencoder.config.scaling_factor
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    decoded = autoencoder.decode(first / autoencoder.config.scaling_factor + 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(latents.Autoencoder(vae).decode(first), decoded, rtol=1e-4, atol=1e-5)


def test_an_encoding_that_was_stopped_continues(encoded, vae, images, tmp_path, monkeypatch, capsys):
    words = [str(images), "--vae", vae, "--output", str(tmp_path / "new.npz"), "--image-size", "32",
             "--batch-size", "25", "--device", "cpu"]
    calls, read = [], encode.read_images

    def stopped(paths, *options):
        calls.append(len(paths))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(paths, *options)

    def status(*more: str) -> int | None:
        with pytest.raises(SystemExit) as caught:
            cli.run_script(lambda: print(encode.encode(encode.parse_args([*words, *more]))))
        return caught.value.code

    monkeypatch.setattr(encode, "read_images", stopped)
    assert status() == 130
    assert sorted(p.name for p in (tmp_path / "new.npz.parts").iterdir()) == ["000000000.npy", "about.json"]
    assert status("--seed", "1") == 2 and "of another command" in capsys.readouterr().err
    assert status() is None
    assert calls == [25, 25, 25, 10]
    with np.load(tmp_path / "new.npz") as new, np.load(encoded) as whole:
        assert all(np.array_equal(new[name], whole[name]) for name in ("arr_0", "labels", "classes"))
    assert [p.name for p in tmp_path.iterdir()] == ["new.npz"]


def test_a_run_on_latents_shows_decoded_samples_and_is_resumed(latent_run, encoded):
    state = checkpoint.load(latent_run)
    assert state["makes"] == "latents" and state["config"]["in_channels"] == 4 and state["config"]["image_size"] == 8
    assert state["classes"] == ["dark", "grey", "light"] and state["data"] == "60 latents of digits.npz"
    picture = Image.open(latent_run / "samples" / "step_0000004.png")
    assert picture.size[0] == (10 * 34 + 2) * 2 and picture.mode == "RGB"  # 32 pixels, twice as large
    assert train.main(["--resume", str(latent_run), "--steps", "6"]) == 0
    assert len(losses(latent_run)) == 6


def test_without_a_decoder_samples_are_three_channels(encoded, tmp_path):
    words = ["--dataset", str(encoded), *SMALL, "--steps", "1", "--run-dir", str(tmp_path / "run")]
    assert train.main(words) == 0
    assert Image.open(tmp_path / "run" / "samples" / "step_0000001.png").size[0] == (10 * 10 + 2) * 8


def test_latents_are_learned_without_clamping_or_rounding(encoded):
    data = latents.load_latents(encoded)
    with np.load(encoded) as file:
        x0, y = next(dataset.batches(data, 60, 0))
        assert torch.equal(x0[y == 0].flatten().sort().values, torch.from_numpy(file["arr_0"][:20]).flatten().sort()[0])


def test_samples_are_decoded(latent_run, vae, tmp_path):
    grid = sample(latent_run, tmp_path / "grid.png", "--vae", vae, "--labels", "dark", "--per-class", 2)
    assert grid.size == ((2 * 34 + 2) * 2, (34 + 2) * 2)
    path = sample(latent_run, tmp_path / "path.png", "--vae", vae, "--labels", "dark", "--trajectory")
    assert path.size[0] == (3 * 34 + 2) * 2
    arrays = sample(latent_run, tmp_path / "latents.npz", "--count", 4)
    assert arrays["arr_0"].shape == (4, 4, 8, 8) and arrays["arr_0"].dtype == np.float32
    assert arrays["labels"].tolist() == [0, 1, 2, 0]
    images = sample(latent_run, tmp_path / "images.npz", "--count", 4, "--vae", vae)["arr_0"]
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    decoded = latents.Autoencoder(vae).decode(torch.from_numpy(arrays["arr_0"]))
    difference = to_uint8(decoded).permute(0, 2, 3, 1).numpy().astype(int) - images
    assert abs(difference).max() <= 1


GOOD = dict(arr_0=np.zeros((6, 4, 8, 8), np.float32), labels=np.arange(6) % 3)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(labels=None), "cannot read latents and labels"),
        (dict(arr_0=None), "cannot read latents and labels"),
        (dict(arr_0=np.zeros((6, 4, 8, 9), np.float32)), "not float"),
        (dict(arr_0=np.zeros((6, 4, 8, 8), np.uint8)), "not float"),
        (dict(arr_0=np.full((6, 4, 8, 8), np.nan)), "not finite"),
        (dict(labels=np.arange(5)), "are not 6 numbers"),
        (dict(labels=np.arange(6) / 2), "are not 6 numbers"),
        (dict(labels=np.arange(6) - 1), "are not 6 numbers"),
        (dict(labels=np.arange(6) + 10**15), "are not 6 numbers"),
        (dict(classes=np.array(["a", "b"])), "are not 6 numbers"),
        (dict(labels=np.array([None] * 6)), "cannot read latents and labels"),
    ],
)
def test_wrong_latents_are_refused(changed, reason, tmp_path):
    arrays = {name: value for name, value in {**GOOD, **changed}.items() if value is not None}
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=reason):
        latents.load_latents(tmp_path / "wrong.npz")


def test_what_does_not_fit_names_the_fix(latent_run, tiny_run, encoded, vae, images, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "eight")
    np.savez(tmp_path / "good.npz", **GOOD)
    new = ["--dataset", str(encoded), *SMALL, "--steps", "1", "--run-dir", str(tmp_path / "run")]
    decoded = (latent_run, tmp_path / "a.png", "--vae", vae)
    monkeypatch.chdir(tmp_path)
    for work, fix in (
        (lambda: sample(latent_run, tmp_path / "a.png", "--vae", tmp_path / "eight"), "channels, and those of --vae 8"),
        (lambda: sample(latent_run, tmp_path / "a.png", "--vae", tmp_path / "none"), "name another by --vae"),
        (lambda: sample(latent_run, tmp_path / "a.png", "--trajectory"), "makes latents: add --vae"),
        (lambda: sample(*decoded, "--inpaint", "left", "x.png"), "add --vae, without --inpaint"),
        (lambda: sample(*decoded, "--from", "x.png"), "without --inpaint or --from"),
        (lambda: sample(tiny_run, tmp_path / "a.png", "--vae", vae), "--vae is for latents: leave it out"),
        (lambda: train.main([*new, "--vae", str(tmp_path / "eight")]), "8 channels, and these are 60 latents"),
        (lambda: train.main([*new, "--flip"]), "--flip is for images, and these are 60 latents"),
        (lambda: train.main([*new, "--image-size", "16"]), "leave --image-size out"),
        (lambda: train.main([*new[2:], "--dataset", "mnist-5000", "--vae", vae]), "--vae is for latents, and these"),
        (lambda: distill.main([str(latent_run), "--dataset", str(encoded), "--device", "cpu"]), "these are latents"),
        (lambda: encode.encode(encode.parse_args([str(images), "--vae", vae, "--image-size", "30"])), "use 28"),
        (lambda: encode.encode(encode.parse_args(["nowhere", "--vae", vae])), "no folder nowhere"),
    ):
        with pytest.raises((UsageError, DataError), match=fix):
            work()
    assert not (tmp_path / "run").exists() and not (tmp_path / "a.png").exists()
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(DataError, match="pip install diffusers"):
        latents.Autoencoder(vae)
