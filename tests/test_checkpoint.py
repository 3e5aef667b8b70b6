"""Claims about checkpoint files: whole, safe, and self-describing."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import CheckpointError
from conftest import ROOT
from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_both_files_of_a_run_give_the_same_network(tiny_run):
    folder, file, weights = (
        checkpoint.build(checkpoint.load(path))
        for path in (tiny_run, tiny_run / "checkpoint.pt", tiny_run / "weights.safetensors")
    )
    for model, diffusion, description in (file, weights):
        assert diffusion.config == folder[1].config
        assert description == folder[2]
        for name, tensor in folder[0].state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_a_checkpoint_holds_plain_types_only(tiny_run):
    def look(value):
        if isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)
        else:
            assert value is None or type(value) in (torch.Tensor, str, int, float, bool)

    look(checkpoint.load(tiny_run))


def test_nothing_in_a_malicious_file_is_run(tmp_path):
    touched = tmp_path / "touched"
    torch.save({"format": checkpoint.FORMAT, "model": Malicious(touched)}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious(touched)))
    torch.save(Malicious(touched), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "pickle.pt", "old.pt"):
        for model in (None, "DiT-S/2"):
            with pytest.raises(CheckpointError, match="nothing in it was run"):
                checkpoint.load(tmp_path / name, model)
    assert not touched.exists()


def test_files_that_are_no_checkpoint_end_in_one_line(tmp_path, tiny_run):
    content = (tiny_run / "checkpoint.pt").read_bytes()
    files = {
        "truncated.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
        "flipped.pt": content[:200] + bytes(300) + content[500:],
        "truncated.safetensors": (tiny_run / "weights.safetensors").read_bytes()[:1000],
        "empty.safetensors": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"format": "dit-from-scratch 0"}, tmp_path / "another.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nothing\.pt"):
        checkpoint.load(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path)  # a folder without a checkpoint.pt


def test_weights_of_another_shape_are_refused(tiny_run):
    state = checkpoint.load(tiny_run)
    for change in (dict(depth=3), dict(hidden_size=30), dict(surprise=1)):
        with pytest.raises(CheckpointError, match="do not fit"):
            checkpoint.build({**state, "config": {**state["config"], **change}})


def test_official_weights_load_by_the_name_of_their_model(tmp_path):
    config = DiTConfig(**MODELS["DiT-S/8"], image_size=32, in_channels=4, num_classes=1000, learn_sigma=True)
    model = DiT(config)
    torch.save(model.state_dict(), tmp_path / "official.pt")
    built, diffusion, description = checkpoint.build(checkpoint.load(tmp_path / "official.pt", "DiT-S/8"))
    assert built.config == config
    assert diffusion.config == Diffusion("linear", "eps", 1000).config
    assert len(description["classes"]) == 1000
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.build(checkpoint.load(tmp_path / "official.pt", "DiT-B/8"))
    with pytest.raises(CheckpointError, match="unknown model 'DiT-Z/9': use one of"):
        checkpoint.load(tmp_path / "official.pt", "DiT-Z/9")
    with pytest.raises(CheckpointError, match="--model DiT-XL/2"):
        checkpoint.load(tmp_path / "official.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="leave --model out"):
        checkpoint.load(tmp_path / "foreign.pt", "DiT-S/8")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def write(file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_whole(tmp_path / "file", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


SAVE_FOREVER = """
import sys, torch, checkpoint
from pathlib import Path
for step in range(10**6):
    weight = torch.full((5_000_000,), float(step))
    checkpoint.save(Path(sys.argv[1]), {"format": checkpoint.FORMAT, "step": step, "weight": weight})
"""


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    partial = tmp_path / "checkpoint.pt.partial"
    killed_while_writing = 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(path)], cwd=ROOT)
        path.unlink(missing_ok=True)
        while not (path.exists() and partial.exists()):
            time.sleep(0.001)
        time.sleep(0.004 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_while_writing += partial.exists()
        state = checkpoint.load(path)
        assert (state["weight"] == state["step"]).all()
    assert killed_while_writing
