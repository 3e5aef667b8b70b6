"""Claims about a fork: a layer, a field, a flag, a network or data of its own need no change elsewhere.

Most tests change a copy of the files as their owner would, and then train, resume and sample there.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import dit
import inference
import train
from checkpoint import BUNDLED_WEIGHTS, CheckpointError
from cli import UsageError
from conftest import ROOT, TINY, losses
from sampling import TrainedModel

# Command lines, one after the other in one process, with a small network and pictures in 2 steps.
COMMANDS = """
import json, sys
import dit, inference, train
from cli import run_script
from sampling import TrainedModel

dit.MODELS["DiT-N/4"].update(hidden_size=16, depth=2, num_heads=2)
TrainedModel.default_steps["dpm++"] = 2

def work():
    for script, *words in json.loads(sys.argv[1]):
        if script == "train.py":
            assert train.main(words) == 0
        else:
            print(inference.generate(inference.parse_args(words)))

run_script(work)
"""
RESUME = ["train.py", "--resume", "run", "--steps", 12]
SAMPLE = "inference.py --checkpoint run --labels dark --per-class 2 --steps 2 --device cpu --output out.png".split()


def new_run(images: Path, folder: str, *more: object) -> list:
    return ["train.py", "--dataset", images, *TINY, "--steps", 10, "--run-dir", folder, *more]


class Fork:
    """A copy of the files that training and sampling need."""

    def __init__(self, folder: Path):
        self.folder = folder
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        (folder / "assets").mkdir()
        shutil.copy(BUNDLED_WEIGHTS, folder / "assets")

    def edit(self, name: str, pattern: str, new: str) -> None:
        """Replace what matches a pattern in a file."""
        text, count = re.subn(pattern, lambda _: new, (self.folder / name).read_text(), flags=re.DOTALL)
        assert count, f"nothing in {name} is like {pattern}"
        (self.folder / name).write_text(text)

    def run(self, *commands: list) -> subprocess.CompletedProcess:
        text = json.dumps([[str(word) for word in command] for command in commands])
        command = [sys.executable, "-c", COMMANDS, text]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result


@pytest.fixture
def fork(tmp_path) -> Fork:
    (tmp_path / "fork").mkdir()
    return Fork(tmp_path / "fork")


@pytest.fixture
def small_network(monkeypatch) -> None:
    """DiT-N/4 with some 30,000 parameters, and pictures in 2 steps."""
    monkeypatch.setitem(dit.MODELS, "DiT-N/4", dict(hidden_size=16, depth=2, num_heads=2, patch_size=4))
    monkeypatch.setitem(TrainedModel.default_steps, "dpm++", 2)


# -------------------------------------------------------------------------------------------------------------- layers


def test_compiled_training_keeps_the_activation_of_the_network(fork, images):
    """A network with SiLU in place of GELU takes the same steps, compiled and eager."""
    fork.edit("dit.py", r"self\.act = [^\n]*", "self.act = nn.SiLU()")
    exact = ["--precision", "fp32", "--lr", "1e-3"]  # so that differences of rounding stay small
    words = new_run(images, "run", *exact, "--compile"), new_run(images, "eager", *exact)
    result = fork.run(*words, RESUME, SAMPLE)
    assert ", compiled\n" in result.stdout and ", eager\n" in result.stdout
    assert losses(fork.folder / "run")[:10] == pytest.approx(losses(fork.folder / "eager"), rel=1e-4)
    assert (fork.folder / "out.png").exists()


ATTENTION = '''class Attention(nn.Module):
    """Other names, other shapes, a norm, rotary positions, and numbers that are read of a tensor."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        width = hidden_size // num_heads
        self.num_heads, self.norm, self.sizes = num_heads, nn.LayerNorm(width), torch.linspace(0.5, 1, 2).tolist()
        self.query, self.key_value = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        angle = torch.outer(torch.arange(64), 100 ** -torch.linspace(0, 1, width // 2)).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        N = x.shape[2]
        return x * self.cos[:N] + torch.cat([-b, a], dim=-1) * self.sin[:N]

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = (z.view(B, N, self.num_heads, -1).transpose(1, 2)
                   for z in (self.query(x), *self.key_value(x).chunk(2, dim=-1)))
        x = F.scaled_dot_product_attention(self.rotate(self.norm(q)), self.rotate(self.norm(k)), v)
        return self.sizes[0] * self.out(x.transpose(1, 2).reshape(B, N, D))


'''
MLP = '''class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * int(hidden_size * mlp_ratio))
        self.down = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * x)


'''


def test_layers_are_changed_in_one_file(fork, images):
    for name, new in (("Attention", ATTENTION), ("Mlp", MLP)):
        fork.edit("dit.py", rf"class {name}\(nn\.Module\):.*?\n(?=(class|def) )", new)
    fork.run(new_run(images, "run"), RESUME, SAMPLE)
    weights = checkpoint.load(fork.folder / "run")["ema"]
    assert weights["blocks.0.mlp.up.weight"].shape == (128, 16) and "blocks.1.attn.norm.weight" in weights
    assert not any("fc1" in name or "qkv" in name or "cos" in name for name in weights)
    with pytest.raises(CheckpointError, match="blocks.0.attn.key_value.bias is not a part of the network"):
        checkpoint.load_model(fork.folder / "run")  # here, where there are no such layers


NETWORK = '''
import torch.nn.functional as F
from torch import nn

from dit import TimestepEmbedder


class ConvNet(nn.Module):
    """Convolutions, with t and y as a bias."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.t_embedder, self.y_embedder = TimestepEmbedder(16), nn.Embedding(config.num_classes + 1, 16)
        self.first = nn.Conv2d(config.in_channels, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(16, config.in_channels, 3, padding=1)

    def forward(self, x, t, y):
        c = (self.t_embedder(t) + self.y_embedder(y))[:, :, None, None]
        x = self.first(x)
        for block in self.blocks:
            x = x + block(F.silu(x + c))
        return self.last(x)
'''


def test_a_network_of_its_own_needs_two_lines(fork, images):
    (fork.folder / "convnet.py").write_text(NETWORK)
    for name, pattern, new in (
        ("train.py", "    network = DiT\n", "    network = ConvNet\n"),
        ("checkpoint.py", "NETWORKS = {", 'NETWORKS = {"ConvNet": (ConvNet, TrainedModel), '),
    ):
        fork.edit(name, "from diffusion import ", "from convnet import ConvNet\nfrom diffusion import ")
        fork.edit(name, pattern, new)
    fork.run(new_run(images, "run"), RESUME, SAMPLE)
    assert checkpoint.load(fork.folder / "run")["network"] == "ConvNet"
    with pytest.raises(CheckpointError, match="it holds a ConvNet, not a DiT or ShortcutDiT"):
        checkpoint.load_model(fork.folder / "run")


# --------------------------------------------------------------------------------------------------- fields and flags


def test_files_from_before_a_new_field_and_new_flags_are_still_read(fork, images, tiny_run):
    fork.edit("dit.py", "    learn_sigma: bool = False\n", "    learn_sigma: bool = False\n    dropout: float = 0.0\n")
    fork.edit("dit.py", r"self\.x_embedder\(x\) \+ self\.pos_embed",
              "F.dropout(self.x_embedder(x) + self.pos_embed, config.dropout, self.training)")
    fork.edit("train.py", r"learn_sigma=args\.learn_sigma\)", "learn_sigma=args.learn_sigma, dropout=args.dropout)")
    fork.edit("train.py", "import copy\n", "import copy\nfrom pathlib import Path\n")
    fork.edit("train.py", r'    flag\("--learn-sigma"', """    flag("--dropout", 0.0, "of the tokens", type=float)
    flag("--betas", [0.9, 0.99], "of AdamW", type=float, nargs=2)
    flag("--notes", None, "a file", type=Path)
    flag("--learn-sigma\"""")
    shutil.copytree(tiny_run, fork.folder / "before")
    bundled = ["inference.py", "--checkpoint", "assets/dit-mnist.safetensors", *SAMPLE[3:-1], "bundled.png"]
    bundled[bundled.index("dark")] = "3"
    new = new_run(images, "run", "--dropout", 0.25, "--betas", 0.5, 0.75, "--notes", "notes/first.txt")
    result = fork.run(["train.py", "--resume", "before", "--steps", 22], bundled, new, RESUME, SAMPLE)
    assert "warning" not in result.stderr
    for name, values in (("before", (0.0, [0.9, 0.99], None)), ("run", (0.25, [0.5, 0.75], "notes/first.txt"))):
        assert len(losses(fork.folder / name)) == (22 if name == "before" else 12)
        settings = json.loads((fork.folder / name / "settings.json").read_text())
        assert tuple(settings[flag] for flag in ("dropout", "betas", "notes")) == values
        if name == "run":  # here, where there is no such field
            with pytest.raises(CheckpointError, match=r"DiTConfig has no field dropout, and .*: use") as caught:
                checkpoint.load_model(fork.folder / name)
            assert "\n" not in str(caught.value)


def test_a_run_from_before_a_flag_was_removed_resumes_with_one_warning(fork, tiny_run):
    fork.edit("train.py", r'    flag\("--min-snr"[^\n]*\n', "")
    fork.edit("train.py", r"args\.min_snr", "None")
    shutil.copytree(tiny_run, fork.folder / "before")
    commands = [["train.py", "--resume", "before", "--steps", steps] for steps in (21, 22)]
    lines = [line for line in fork.run(*commands).stderr.splitlines() if line.strip() and "%|" not in line]
    assert lines == ["-c: warning: train.py has no flags for these settings of the run: min_snr"]
    assert len(losses(fork.folder / "before")) == 22


@pytest.mark.usefixtures("small_network")
def test_memory_and_precision_may_change_on_resume(images, tmp_path, recwarn):
    """As when a run goes on where there is another device. What else was chosen stays."""
    arguments = ["--dataset", str(images), *TINY, "--run-dir", str(tmp_path / "run"), "--steps"]
    assert train.main([*arguments, "4", "--precision", "fp32"]) == 0
    resume = ["--resume", str(tmp_path / "run"), "--steps"]
    assert train.main([*resume, "8", "--precision", "bf16", "--grad-accum-steps", "4"]) == 0
    settings = checkpoint.load(tmp_path / "run")["settings"]
    assert (settings["precision"], settings["grad_accum_steps"], settings["batch_size"]) == ("bf16", 4, 8)
    assert train.main([*resume, "10", "--precision", "fp32", "--grad-accum-steps", "1"]) == 0
    assert not recwarn.list and len(losses(tmp_path / "run")) == 10
    with pytest.raises(UsageError, match="--batch-size was 8 in this run and cannot change"):
        train.main([*resume, "12", "--batch-size", "4"])


# --------------------------------------------------------------------------------------------------------------- data


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_latents_of_any_number_of_channels_are_known_as_latents(channels, tmp_path):
    latents = torch.randn(24, channels, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(tmp_path / "latents.npz", arr_0=4 * latents, labels=np.arange(24) % 3)
    arguments = "--model DiT-N/4 --batch-size 8 --warmup 2 --no-compile --device cpu --steps 10".split()
    arguments += ["--dataset", str(tmp_path / "latents.npz"), "--run-dir", str(tmp_path / "run")]
    assert train.main(arguments) == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "12"]) == 0
    trained = checkpoint.load_model(tmp_path / "run")
    assert trained.shape == (channels, 8, 8) and trained.description["makes"] == "latents"
    assert not trained.is_image and not trained.settings["clip"]
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    words = ["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--output", str(tmp_path / "out.png")]
    with pytest.raises(UsageError, match="this model makes latents: add --vae"):
        inference.generate(inference.parse_args(words))
