"""Claims about --init-from: a new run begins with weights that exist, and learns other images."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import distill
import dit
import train
from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, CheckpointError
from cli import UsageError
from conftest import TINY, assert_equal_states, losses, run_script
from diffusion import Diffusion
from dit import DiT, DiTConfig
from sampling import TrainedModel
from shortcut import ShortcutDiT

FAST = "--batch-size 8 --warmup 2 --no-compile --device cpu".split()
CLASSES = ("dark", "grey", "light")
AS_IT_IS = "--lr 0 --steps 1".split()  # a step that changes no weight


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks with some 30,000 parameters, and pictures in 2 steps."""
    for name, patch in (("DiT-N/4", 4), ("DiT-S/8", 8)):
        monkeypatch.setitem(dit.MODELS, name, dict(hidden_size=16, depth=2, num_heads=2, patch_size=patch))
    monkeypatch.setitem(TrainedModel.default_steps, "dpm++", 2)


def run(*arguments: object) -> int:
    return train.main([str(argument) for argument in arguments])


def checkpoint_of(network: type[DiT] = DiT, classes: tuple[str, ...] = CLASSES, **shape) -> dict:
    """A checkpoint as `checkpoint.load` returns it, all of whose weights are random."""
    sizes = dict(image_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=len(classes))
    config = DiTConfig(**{**sizes, **shape})
    torch.manual_seed(0)
    model = network(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    about = checkpoint.describe(network, config, Diffusion("flow", "x0", 1000), classes, "some images", 7, 2.0)
    return {**about, "ema": model.state_dict()}


def network_of(state: dict, weights: str) -> DiT:
    model = DiT(DiTConfig(**state["config"]))
    model.load_state_dict(state[weights])
    return model


def outputs(source: dict, begun: dict, x: torch.Tensor, x_begun: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network of a checkpoint, and that of the run that begins with it, predict for class 0."""
    t, y = torch.tensor([5, 700]), torch.tensor([0, 0])
    with torch.no_grad():
        return network_of(source, "ema")(x, t, y), network_of(begun, "model")(x_begun, t, y)


def weights_file(path, state: dict):
    checkpoint.save(path, {name: value for name, value in state.items() if name != "ema"}, state["ema"])
    return path


@pytest.fixture
def colours(tmp_path):
    """A folder of 12 colour images of 16 pixels, without classes."""
    (tmp_path / "colours").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 200, 255 - 20 * i)).save(tmp_path / "colours" / f"{i}.png")
    return tmp_path / "colours"


# ------------------------------------------------------------------------------------------------------ what may differ


def test_a_known_class_keeps_its_row_and_a_new_one_begins_as_the_null_class():
    source, name = checkpoint_of(), "y_embedder.embedding_table.weight"
    begun = checkpoint.start_from(source, DiT, (1, 8, 8), ("light", "red", "dark", "blue"))
    assert torch.equal(begun["model"][name], source["ema"][name][[2, 3, 0, 3, 3]])
    same = {key: value for key, value in begun["model"].items() if key != name}
    assert_equal_states(same, {key: value for key, value in source["ema"].items() if key != name})
    assert begun["config"] == {**source["config"], "num_classes": 4}


def test_classes_may_go_and_come():
    source, name = checkpoint_of(), "y_embedder.embedding_table.weight"
    without = checkpoint.start_from(source, DiT, (1, 8, 8), ())
    assert torch.equal(without["model"][name], source["ema"][name][3:])
    unconditional = checkpoint_of(classes=())
    begun = checkpoint.start_from(unconditional, DiT, (1, 8, 8), CLASSES)
    assert torch.equal(begun["model"][name], unconditional["ema"][name].expand(4, -1))


def test_another_image_size_has_positions_of_its_own():
    source = checkpoint_of()
    begun = checkpoint.start_from(source, DiT, (1, 16, 16), CLASSES)
    assert torch.equal(begun["model"]["pos_embed"], dit.position_table(4, 16))
    assert begun["config"] == {**source["config"], "image_size": 16}
    assert network_of(begun, "ema")(torch.zeros(1, 1, 16, 16), torch.zeros(1)).shape == (1, 1, 16, 16)
    same = checkpoint.start_from(source, DiT, (1, 8, 8), CLASSES)
    assert_equal_states(same["model"], source["ema"])


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_grey_images_give_the_same_output_with_other_channels(learn_sigma):
    """Also the second half of the output, of a learned variance. Three channels become one by their mean."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x3, halves = x.expand(-1, 3, -1, -1), 2 if learn_sigma else 1
    grey = checkpoint_of(learn_sigma=learn_sigma)
    was, now = outputs(grey, checkpoint.start_from(grey, DiT, (3, 8, 8), CLASSES), x, x3)
    torch.testing.assert_close(now.view(2, halves, 3, 8, 8), was.view(2, halves, 1, 8, 8).expand(-1, -1, 3, -1, -1))
    colour = checkpoint_of(learn_sigma=learn_sigma, in_channels=3)
    was, now = outputs(colour, checkpoint.start_from(colour, DiT, (1, 8, 8), CLASSES), x3, x)
    torch.testing.assert_close(now.view(2, halves, 8, 8), was.view(2, halves, 3, 8, 8).mean(2))


def test_what_cannot_differ_is_refused():
    for source, shape, fix in (
        (checkpoint_of(), (1, 10, 10), "patches of 4 pixels: use --image-size 8 or 12"),
        (checkpoint_of(in_channels=4), (3, 8, 8), "knows 4 channels, and here are 3"),
        (checkpoint_of(ShortcutDiT), (1, 8, 8), "begin with the checkpoint that they were distilled from"),
        ({**checkpoint_of(), "network": "Another"}, (1, 8, 8), "it holds a Another, not a DiT"),
        ({**checkpoint_of(), "ema": {}}, (1, 8, 8), "is missing"),
    ):
        with pytest.raises(CheckpointError, match=fix):
            checkpoint.start_from(source, DiT, shape, CLASSES)


# ----------------------------------------------------------------------------------------------------- the command line


def test_a_run_begins_with_the_averaged_weights_of_another(images, tmp_path):
    other = "--schedule cosine --prediction v --learn-sigma".split()
    assert run("--dataset", images, *TINY, *other, "--steps", 6, "--run-dir", tmp_path / "first") == 0
    first = checkpoint.load(tmp_path / "first")
    for i, source in enumerate((tmp_path / "first", tmp_path / "first" / "weights.safetensors")):
        folder = tmp_path / str(i)
        agreeing = ["--schedule", "cosine", "--model", "DiT-N/4", "--image-size", 8] if i else []
        words = ["--dataset", images, *FAST, *agreeing, "--init-from", source, "--run-dir", folder, "--seed", 5]
        assert run(*words, *AS_IT_IS) == 0
        second = checkpoint.load(folder)
        for name in ("model", "ema"):
            assert_equal_states(second[name], first["ema"])
        assert all(second[name] == first[name] for name in ("config", "diffusion", "classes"))
        assert second["step"] == len(losses(folder)) == 1
        assert second["settings"]["init_from"] == str(source) and second["settings"]["model"] == "DiT-N/4"


def test_the_bundled_weights_learn_the_images_of_a_folder(images, tmp_path, capsys):
    """Resized to the 28 pixels that the network knows."""
    words = ["--dataset", images, *FAST, "--init-from", BUNDLED_WEIGHTS, "--run-dir", tmp_path / "run"]
    assert run(*words, *AS_IT_IS) == 0
    assert f"DiT-U/7 from {BUNDLED_WEIGHTS}, 2.5 M parameters; flow x0" in capsys.readouterr().out
    begun, bundled = checkpoint.load(tmp_path / "run"), checkpoint.load(BUNDLED_WEIGHTS)
    assert begun["config"] == {**bundled["config"], "num_classes": 3} and begun["classes"] == list(CLASSES)
    table = begun["ema"].pop("y_embedder.embedding_table.weight")
    assert torch.equal(table, bundled["ema"].pop("y_embedder.embedding_table.weight")[-1:].expand(4, -1))
    assert_equal_states(begun["ema"], bundled["ema"])


def test_it_resumes_to_the_bit_when_its_source_is_gone(images, tmp_path):
    shutil.copy(weights_file(tmp_path / "w.safetensors", checkpoint_of()), tmp_path / "source.safetensors")
    words = ["--dataset", images, *FAST, "--init-from", tmp_path / "source.safetensors", "--lr-schedule", "constant"]
    assert run(*words, "--steps", 8, "--run-dir", tmp_path / "whole") == 0
    assert run(*words, "--steps", 4, "--run-dir", tmp_path / "parts") == 0
    (tmp_path / "source.safetensors").unlink()
    assert run("--resume", tmp_path / "parts", "--steps", 8) == 0
    for name in ("model", "ema", "optimizers"):
        assert_equal_states(*(checkpoint.load(tmp_path / folder)[name] for folder in ("whole", "parts")))
    with pytest.raises(UsageError, match="--init-from was .* in this run and cannot change: leave it out"):
        run("--resume", tmp_path / "parts", "--steps", 9, "--init-from", BUNDLED_WEIGHTS)


@pytest.mark.parametrize("form", ["plain", "training", "safetensors"])
def test_official_weights_begin_a_run(form, colours, tmp_path):
    """Of one class more than the data, which has none, and in each form that inference.py reads."""
    state = checkpoint_of(classes=("0",), image_size=16, patch_size=8, in_channels=3, learn_sigma=True)["ema"]
    path = tmp_path / ("official.safetensors" if form == "safetensors" else "official.pt")
    prefixed = {"module._orig_mod." + name: value for name, value in state.items()}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if form == "plain" else {"model": {}, "ema": prefixed, "opt": {}, "args": None}, path)
    words = ["--dataset", colours, *FAST, "--init-from", path, *AS_IT_IS, "--run-dir", tmp_path / "run"]
    with pytest.raises(CheckpointError, match="for official DiT weights add --model"):
        run(*words)
    assert run(*words, "--model", "DiT-S/8") == 0
    begun, table = checkpoint.load(tmp_path / "run"), "y_embedder.embedding_table.weight"
    assert begun["diffusion"] == dict(schedule="linear", prediction="eps", timesteps=1000)
    assert begun["config"]["learn_sigma"] and begun["config"]["num_classes"] == 0
    assert_equal_states(begun["ema"], {**state, table: state[table][1:]})


def test_a_run_on_latents_begins_another(colours, tmp_path):
    for name, size, classes in (("one", 8, ["a", "b"]), ("two", 12, ["b", "c"])):
        latents = np.random.default_rng(0).normal(size=(12, 4, size, size)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", arr_0=latents, labels=np.arange(12) % 2, classes=np.array(classes))
    words = [*FAST, *AS_IT_IS, "--run-dir"]
    assert run("--dataset", tmp_path / "one.npz", "--model", "DiT-N/4", *words, tmp_path / "one") == 0
    begin = ["--init-from", tmp_path / "one", *words]
    assert run("--dataset", tmp_path / "two.npz", *begin, tmp_path / "two") == 0
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    assert two["makes"] == "latents" and two["config"] == {**one["config"], "image_size": 12}
    table = "y_embedder.embedding_table.weight"
    assert torch.equal(two["ema"][table], one["ema"][table][[1, 2, 2]])
    with pytest.raises(UsageError, match="makes latents, not images: give a --dataset of these"):
        run("--dataset", colours, *begin, tmp_path / "three")
    with pytest.raises(UsageError, match="makes images, not latents: give a --dataset of these"):
        run("--dataset", tmp_path / "one.npz", "--init-from", BUNDLED_WEIGHTS, *words, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_flag_that_contradicts_the_checkpoint_is_refused(images, tmp_path):
    path = weights_file(tmp_path / "w.safetensors", checkpoint_of())
    odd = weights_file(tmp_path / "odd.safetensors", checkpoint_of(hidden_size=24))
    new = ["--dataset", images, *FAST, "--run-dir", tmp_path / "run", "--init-from"]
    for words, message in (
        ([path, "--model", "DiT-U/4"], "holds no DiT-U/4, but another network: leave --model out"),
        ([odd, "--model", "DiT-N/4"], "holds no DiT-N/4, but another network: leave --model out"),
        ([path, "--schedule", "linear"], r"--schedule contradicts .*, which was trained otherwise \(flow\): leave"),
        ([path, "--prediction", "v"], r"--prediction contradicts .*, which was trained otherwise \(x0\): leave"),
        ([path, "--learn-sigma"], r"--learn-sigma contradicts .*, which was trained otherwise \(False\): leave"),
        ([path, "--image-size", 10], "patches of 4 pixels: use --image-size 8 or 12"),
        ([DISTILLED_WEIGHTS], "begin with the checkpoint that they were distilled from"),
        ([tmp_path / "nowhere"], "no checkpoint .*nowhere"),
    ):
        with pytest.raises((UsageError, CheckpointError), match=message):
            run(*new, *words)
    assert not (tmp_path / "run").exists()
    assert run(*new, odd, "--steps", 2) == 0  # a network that has no name among MODELS
    assert run("--resume", tmp_path / "run", "--steps", 3) == 0


def test_a_run_that_began_with_weights_is_distilled(images, tmp_path):
    path = weights_file(tmp_path / "w.safetensors", checkpoint_of())
    assert run("--dataset", images, *FAST, "--init-from", path, "--steps", 2, "--run-dir", tmp_path / "run") == 0
    words = [tmp_path / "run", "--dataset", images, *FAST, "--steps", 2, "--run-dir", tmp_path / "fast"]
    assert distill.main([str(word) for word in words]) == 0
    assert checkpoint.load(tmp_path / "fast")["network"] == "ShortcutDiT"


@pytest.mark.slow
def test_two_processes_begin_as_one(images, tmp_path):
    path = weights_file(tmp_path / "w.safetensors", checkpoint_of())
    words = ["--dataset", images, *FAST, "--init-from", path, "--steps", 4, "--lr", 1e-3, "--precision", "fp32"]
    assert run(*words, "--run-dir", tmp_path / "one") == 0
    result = run_script(
        "train.py", *words, "--run-dir", "two", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        python=("-m", "torch.distributed.run", "--nproc-per-node=2"),
    )
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
