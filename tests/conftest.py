"""What several tests stand on: small images, and a network trained on them for a few steps.

    pytest                the claims that matter, in about two minutes on two cores
    pytest -m slow        the long ones: kills, long work, full disks, thousands of command lines, the notebook
"""

import dataclasses
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker a core, and one thread a worker
os.environ["HF_HUB_OFFLINE"] = "1"             # autoencoders are only looked for on the disk

import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import checkpoint  # noqa: E402
import dataset  # noqa: E402
import dit  # noqa: E402
import metrics  # noqa: E402
import rundir  # noqa: E402
import train  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from sampling import TrainedModel  # noqa: E402

TINY = "--image-size 8 --model DiT-N/4 --batch-size 8 --warmup 2 --no-compile --device cpu".split()


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=12, help="how often test_kills.py kills a run (default: 12)")
    parser.addoption("--soak", type=float, default=0.2, help="minutes of training in test_soak.py (default: 0.2)")


def run_script(*arguments: object, cwd: Path, python: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    """Run one of our scripts as a user would, from the folder `cwd`."""
    command = [sys.executable, *python, *(str(ROOT / a) if str(a).endswith(".py") else str(a) for a in arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def settings_of(words: list[str]) -> tuple:
    """The settings and the device of a training with these flags."""
    parser = train.build_parser()
    return rundir.settings(parser, parser.given(words))


def trained(model: dit.DiT, diffusion, guidance: float = 1.0, interval: list[int] | None = None) -> TrainedModel:
    """A network with the guidance to sample with."""
    return TrainedModel(model, diffusion, dict(guidance=guidance, guidance_interval=interval))


def losses(folder: Path) -> list[float]:
    """The losses of a run, whose log has a line for each step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def assert_equal_states(a: object, b: object) -> None:
    """Two checkpoints, or parts of them, are the same to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def divided(state: dict) -> tuple[dict, dict]:
    """What a checkpoint holds, in plain types and in tensors, both nested as in it."""
    plain, tensors = {}, {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and value:
            parts = divided(value)
            for whole, part in zip((plain, tensors), parts, strict=True):
                if part:
                    whole[name] = part
        else:
            plain[name] = value
    return plain, tensors


def forge(path: Path, state: dict) -> bytes:
    """Write a checkpoint that holds this, with the checksum that belongs to it. Returns the content of the file."""
    checkpoint.save(path, *divided(state))
    return path.read_bytes()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of 3 classes of 20 grey images, each class of its own brightness."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("dark", "grey", "light")):
        (root / name).mkdir()
        for i in range(20):
            pixels = (torch.rand(8, 8, generator=generator) * 40 + 80 * label).byte().numpy()
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def tiny_run(images, tmp_path_factory) -> Path:
    """The folder of a finished run of 20 steps on these images."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    arguments = ["--dataset", str(images), *TINY, "--steps", "20", "--save-every", "10", "--run-dir", str(folder)]
    assert train.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def tiny_network(tiny_run):
    """DiT-N/4 with some 30,000 parameters, so that hundreds of checkpoints are written soon.

    The run of all tests is made before, with the network that the name stands for.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.MODELS, "DiT-N/4", dict(hidden_size=16, depth=2, num_heads=2, patch_size=4))
        yield


@pytest.fixture(scope="session")
def reference() -> metrics.Reference:
    return metrics.Reference()


@pytest.fixture(scope="session")
def digits() -> dataset.Images:
    """1,000 real digits in the proportions of the test set, in random order."""
    images = dataset.load("mnist-5000")
    labels = metrics.labels_as_in(metrics.Reference().tensors["labels.test"], 1000)
    some = metrics.with_same_labels(labels, images.labels)
    some = some[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    return dataclasses.replace(images, pixels=images.pixels[some], labels=images.labels[some])


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A network of MNIST's shape that was never trained."""
    config = dit.DiTConfig(hidden_size=8, depth=1, num_heads=1)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    about = checkpoint.describe(dit.DiT, config, Diffusion("linear", "eps", 50), dataset.DIGITS, "0 of MNIST", 0, 1.5)
    checkpoint.save(path, about, dit.DiT(config).state_dict())
    return path
