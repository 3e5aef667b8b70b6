"""Claims about checkpoint files: whole, safe, and self-describing."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import inference
import train
from checkpoint import RUN_FILE, WEIGHTS_FILE, CheckpointError
from cli import UsageError
from conftest import ROOT, assert_equal_states, forge
from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig
from rundir import newest_run


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_both_files_of_a_run_give_the_same_network(tiny_run):
    folder, file, weights = (
        checkpoint.load_model(path) for path in (tiny_run, tiny_run / RUN_FILE, tiny_run / WEIGHTS_FILE)
    )
    for trained in (file, weights):
        assert trained.diffusion.config == folder.diffusion.config
        assert trained.description == folder.description
        assert_equal_states(trained.model.state_dict(), folder.model.state_dict())


def test_a_folder_that_kept_only_its_weights_is_a_checkpoint(tiny_run, tmp_path, monkeypatch):
    """Wherever a checkpoint is given; it can only not be resumed, and then it is said what is missing."""
    shutil.copy(tiny_run / WEIGHTS_FILE, tmp_path)
    monkeypatch.chdir(tmp_path)
    whole, weights = checkpoint.load_model(tiny_run), checkpoint.load_model(tmp_path)
    assert_equal_states(weights.model.state_dict(), whole.model.state_dict())
    words = ["--checkpoint", ".", "--device", "cpu", "--steps", "1", "--per-class", "1", "--output", "grid.png"]
    assert inference.generate(inference.parse_args(words)).stat().st_size > 0
    with pytest.raises(UsageError, match=r"holds only weights.*: resume from the folder of a run that has its check"):
        train.main(["--resume", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_FILE, "grid.png"}


def test_resume_without_a_name_continues_the_newest_run_of_that_script(tiny_run, tmp_path, monkeypatch):
    """Whatever else is newer: a run of another script, a file that cannot be read, weights alone."""
    monkeypatch.chdir(tmp_path)
    for script in ("train.py", "distill.py"):
        with pytest.raises(UsageError, match=f"no run of {script} in runs: name its folder after --resume, or leave"):
            newest_run(script)
    for age, name in enumerate(("old", "new", "distilled", "broken", "published")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        shutil.copy(tiny_run / RUN_FILE, folder)
        if name == "distilled":
            forge(folder / RUN_FILE, {**checkpoint.load(folder), "script": "distill.py"})
        if name == "broken":
            (folder / RUN_FILE).write_bytes(b"broken")
        if name == "published":
            shutil.copy(tiny_run / WEIGHTS_FILE, folder / RUN_FILE)
        os.utime(folder / RUN_FILE, (10**9 + age, 10**9 + age))
    assert newest_run("distill.py").name == "distilled"
    assert train.main(["--resume", "--steps", "21"]) == 0
    steps = {name: checkpoint.load(Path("runs", name))["step"] for name in ("old", "new", "distilled")}
    assert steps == dict(old=20, new=21, distilled=20)


def test_tensors_keep_names_types_and_shapes_whatever_their_memory(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = dict(ema=dict(a=whole, b=whole.T, c=whole[1:, ::2]), optimizers={"0": {"7": dict(step=torch.tensor(3))}})
    tensors["ema"] |= dict(d=whole.bfloat16(), e=whole > 3, f=torch.zeros(0, 5), g=torch.tensor(2**40))
    about = dict(format=checkpoint.FORMAT, step=4)
    checkpoint.save(tmp_path / "file.safetensors", about, tensors)
    loaded = checkpoint.load(tmp_path / "file.safetensors")
    assert_equal_states(loaded, {**about, **tensors})
    assert all(loaded["ema"][name].dtype == value.dtype for name, value in tensors["ema"].items())


def test_a_checkpoint_holds_plain_types_only(tiny_run):
    """No object of ours, and no pickle: any program that knows safetensors can read it."""
    def look(value):
        if isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)
        else:
            assert value is None or type(value) in (torch.Tensor, str, int, float, bool)

    state = checkpoint.load(tiny_run)
    look(state)
    tensors = load_file(tiny_run / RUN_FILE)
    assert torch.equal(tensors["ema/pos_embed"], state["ema"]["pos_embed"])
    assert not [path for path in tiny_run.rglob("*") if path.suffix == ".pt"]


def test_nothing_in_a_malicious_file_is_run(tmp_path):
    touched = tmp_path / "touched"
    torch.save({"format": checkpoint.FORMAT, "model": Malicious(touched)}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious(touched)))
    torch.save(Malicious(touched), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "pickle.pt", "old.pt"):
        for place in (tmp_path / name, tmp_path / f"{name}.safetensors"):
            shutil.copy(tmp_path / name, place.with_name("copy")).rename(place)
            with pytest.raises(CheckpointError, match="nothing in it was run|damaged, or no checkpoint"):
                checkpoint.load(place, "DiT-S/2")
            with pytest.raises(CheckpointError, match=r"not a \.safetensors file: .*--model|damaged, or no checkpoint"):
                checkpoint.load(place)
    assert not touched.exists()


def test_files_that_are_no_checkpoint_end_in_one_line(tmp_path, tiny_run):
    content = (tiny_run / RUN_FILE).read_bytes()
    files = {
        "truncated": content[: len(content) // 2],
        "header": content[:1000],
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(100_000),
        "flipped": content[:200] + bytes(300) + content[500:],
        "longer": content + b"more",
    }
    for name, data in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "zip.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "list.safetensors", {"description": "[1, 2]"})
    save_file({}, tmp_path / "nothing.safetensors")
    checkpoint.save(tmp_path / "another.safetensors", {"format": "dit-from-scratch 1"}, {"weight": torch.zeros(2)})
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 13
    for path in paths:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nothing\.safetensors: give a \.safetensors file, or"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=f"no checkpoint .*{RUN_FILE}"):
        checkpoint.load(tmp_path)  # a folder without a checkpoint


def test_weights_of_another_shape_are_refused(tiny_run):
    state = checkpoint.load(tiny_run)
    for change in (dict(depth=3), dict(hidden_size=30), dict(surprise=1)):
        with pytest.raises(CheckpointError, match="do not fit"):
            checkpoint.build({**state, "config": {**state["config"], **change}})


def test_official_weights_load_by_the_name_of_their_model(tmp_path):
    config = DiTConfig(**MODELS["DiT-S/8"], image_size=32, in_channels=4, num_classes=1000, learn_sigma=True)
    model = DiT(config)
    torch.save(model.state_dict(), tmp_path / "official.pt")
    save_file(model.state_dict(), tmp_path / "official.safetensors")
    for name in ("official.pt", "official.safetensors"):
        trained = checkpoint.load_model(tmp_path / name, model="DiT-S/8")
        assert trained.model.config == config and not trained.is_image
        assert trained.diffusion.config == Diffusion("linear", "eps", 1000).config
        assert len(trained.description["classes"]) == 1000
        assert_equal_states(trained.model.state_dict(), model.state_dict())
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
    checkpoint.save(Path(sys.argv[1]), {"format": checkpoint.FORMAT, "step": step}, {"weight": weight})
"""


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    path, partial = tmp_path / RUN_FILE, tmp_path / f"{RUN_FILE}.partial"
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
        assert (state["ema"]["weight"] == state["step"]).all()
    assert killed_while_writing
