"""Claims about training: it is resumed to the bit, in one process or several, and loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import checkpoint
import dataset
import distill
import dit
import inference
import train
from checkpoint import CheckpointError
from cli import UsageError, WorkError
from conftest import ROOT, TINY, assert_equal_states, losses, run_script, trained
from dataset import IDX_FILES, DataError
from dit import DiT
from optim import update_ema
from rundir import RunDir, new_folder
from runlog import progress_bar
from sampling import TrainedModel
from train import Trainer

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")


@pytest.fixture(autouse=True)
def quick_pictures(tiny_run, monkeypatch):
    """The pictures at checkpoints are sampled in 2 steps rather than 20, but for those of the run of all tests."""
    monkeypatch.setitem(TrainedModel.default_steps, "dpm++", 2)


@pytest.fixture
def small_network(monkeypatch):
    """DiT-N/4 with some 30,000 parameters, for claims in which the network plays no part."""
    monkeypatch.setitem(dit.MODELS, "DiT-N/4", dict(hidden_size=16, depth=2, num_heads=2, patch_size=4))


def run(*arguments: object) -> int:
    return train.main([str(a) for a in arguments])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_is_bit_for_bit_the_whole_run(images, tmp_path, monkeypatch, optimizer):
    """15 steps, a SIGTERM, and 15 more, against 30 without a stop."""
    half = 15
    arguments = ["--dataset", images, *TINY, "--steps", 2 * half, "--save-every", 1000, "--optimizer", optimizer]
    assert run(*arguments, "--run-dir", tmp_path / "whole") == 0

    step = Trainer.step

    def interrupted(self, number, *batch):
        if number == half - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert run(*arguments, "--run-dir", tmp_path / "parts") == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "parts")["step"] == half
    monkeypatch.setattr(Trainer, "step", step)
    assert run("--resume", tmp_path / "parts") == 0

    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    assert_equal_states(whole, parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.usefixtures("small_network")
def test_the_progress_bar_counts_the_time_of_steps_and_not_that_of_pictures(images, tmp_path, monkeypatch):
    """Where it prints a line a minute, too, and pictures are made more often than that."""
    bars, step, pictures = [], Trainer.step, TrainedModel.sample
    monkeypatch.setattr("runlog.progress_bar", lambda *args: bars.append(progress_bar(*args)) or bars[-1])
    monkeypatch.setattr(Trainer, "step", lambda *args: time.sleep(0.1) or step(*args))
    monkeypatch.setattr(TrainedModel, "sample", lambda *args, **kwargs: time.sleep(0.4) or pictures(*args, **kwargs))
    assert run("--dataset", images, *TINY, "--steps", 4, "--save-every", 1, "--run-dir", tmp_path / "run") == 0
    assert 0.4 <= bars[0].format_dict["elapsed"] < 2.0  # with the pictures, it would be more


@pytest.mark.usefixtures("small_network")
def test_steps_after_the_last_checkpoint_are_taken_again(images, tmp_path, monkeypatch):
    """As after a power cut: the log is ahead of the checkpoint."""
    arguments = ["--dataset", images, *TINY, "--steps", 30, "--save-every", 10]
    assert run(*arguments, "--run-dir", tmp_path / "whole") == 0
    save = checkpoint.save

    def power_cut(path, description, tensors):
        if description["step"] == 30:
            raise KeyboardInterrupt
        save(path, description, tensors)

    monkeypatch.setattr(checkpoint, "save", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--run-dir", tmp_path / "cut")
    monkeypatch.setattr(checkpoint, "save", save)
    assert len(losses(tmp_path / "cut")) == 30
    assert checkpoint.load(tmp_path / "cut")["step"] == 20
    assert run("--resume", tmp_path / "cut") == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_accumulating_gradients_changes_only_the_memory(images, tmp_path):
    for parts in (1, 4):
        exact = ["--steps", 8, "--lr", 1e-3, "--precision", "fp32"]  # so that differences of rounding stay small
        run("--dataset", images, *TINY, *exact, "--grad-accum-steps", parts, "--run-dir", tmp_path / str(parts))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_resume(images, tmp_path, number):
    command = [sys.executable, ROOT / "train.py", "--dataset", images, *TINY, "--steps", "100000", "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "log.jsonl").exists() or not (tmp_path / "run" / "log.jsonl").stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "resume with: python train.py --resume run" in out
    assert "Traceback" not in error
    assert checkpoint.load(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))


@pytest.mark.usefixtures("small_network")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    step = Trainer.step

    def broken(self, number, *batch):
        measured = step(self, number, *batch)
        return {**measured, "losses": measured["losses"] * float("nan")} if number == 16 else measured

    monkeypatch.setattr(Trainer, "step", broken)
    arguments = ["--dataset", images, *TINY, "--steps", 40, "--save-every", 10, "--run-dir", tmp_path / "run"]
    message = "loss or gradient not finite at step 17; the checkpoint of step 10 in .*run is good"
    with pytest.raises(WorkError, match=message):
        run(*arguments)
    state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 10
    assert all(torch.isfinite(p).all() for p in state["model"].values())


def test_a_run_is_never_overwritten(images, tiny_run, tmp_path):
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="continue it with --resume"):
        run("--dataset", images, *TINY, "--steps", 1, "--run-dir", tiny_run)
    assert before == {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}


def test_a_run_that_cannot_be_read_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_text("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        run("--resume", tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_text() == "damaged"


def test_weights_alone_cannot_be_resumed(tiny_run):
    with pytest.raises(UsageError, match=r"holds only weights.*: resume from the folder"):
        run("--resume", tiny_run / "weights.safetensors")


@pytest.mark.usefixtures("small_network")
def test_a_checkpoint_file_stands_for_its_run(images, tmp_path):
    run("--dataset", images, *TINY, "--steps", 2, "--run-dir", tmp_path / "run")
    assert run("--resume", tmp_path / "run" / "checkpoint.safetensors", "--steps", 3) == 0
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.usefixtures("small_network")
def test_a_signal_in_the_last_step_does_not_unfinish_the_run(images, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(self, number, *batch):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert run("--dataset", images, *TINY, "--steps", 4, "--run-dir", tmp_path / "run") == 0
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_two_runs_that_begin_together_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder("mnist"), range(32)))
    assert len(set(folders)) == 32


def test_an_offline_run_is_resumed_with_its_digits(tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("no network")

    monkeypatch.setattr(dataset, "from_torchvision", fail)
    tiny = "--image-size 28 --model DiT-N/7 --batch-size 8 --no-compile --device cpu --run-dir".split()
    with pytest.warns(UserWarning, match="no network"):
        run("--steps", 1, *tiny, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run")
    assert state["data"] == "the bundled 5,000 digits of MNIST"
    assert run("--resume", tmp_path / "run", "--steps", 2) == 0  # with no look for MNIST, and no warning


@pytest.mark.usefixtures("small_network")
def test_without_dropped_labels_samples_are_not_guided(images, tmp_path):
    run("--dataset", images, *TINY, "--steps", 1, "--label-dropout", 0, "--run-dir", tmp_path / "run")
    state = checkpoint.load(tmp_path / "run")
    assert state["guidance"] == 1.0 and state["guidance_interval"] is None
    with pytest.raises(UsageError, match="guidance needs dropped labels: leave out --guidance, or"):
        run("--dataset", images, *TINY, "--steps", 1, "--label-dropout", 0, "--guidance", 3)
    with pytest.raises(UsageError, match="had no dropped labels, which guidance needs: set --guidance 1"):
        distill.main([str(tmp_path / "run"), "--dataset", str(images), "--guidance", "3", "--device", "cpu"])
    words = ["--checkpoint", str(tmp_path / "run"), "--compare-guidance", "0", "1", "--device", "cpu"]
    with pytest.raises(UsageError, match="was trained without dropped labels"):
        inference.generate(inference.parse_args(words))


@pytest.mark.usefixtures("small_network")
def test_a_trainer_of_ones_own_resumes_its_own_runs_only(images, tmp_path, monkeypatch, capsys):
    class MyDiT(DiT):
        pass

    class MyTrainer(train.Trainer):
        network = MyDiT

    monkeypatch.setattr(sys, "argv", ["folder/mine.py"])
    new = ["--dataset", str(images), *TINY, "--steps", "2", "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "asked_to_stop", lambda run: run.step == 1)
        train.main(new, MyTrainer)
    assert "resume with: python mine.py --resume" in capsys.readouterr().out
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="was begun by mine.py: continue it with python mine.py"):
        train.main(resume)
    with pytest.raises(CheckpointError, match="it holds a MyDiT, not a OtherDiT"):
        train.main(resume, type("OtherTrainer", (MyTrainer,), dict(network=type("OtherDiT", (DiT,), {}))))
    assert train.main(resume, MyTrainer) == 0


@pytest.mark.usefixtures("small_network")
def test_runs_get_the_next_free_name(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run("--dataset", images, *TINY, "--steps", 1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"{images.name}-1", f"{images.name}-2"]


def test_a_resumed_run_keeps_its_settings(tiny_run):
    with pytest.raises(UsageError, match=r"--lr was 0.007 in this run and cannot change"):
        run("--resume", tiny_run, "--lr", 1)
    with pytest.raises(UsageError, match="at step 20 already: ask for more with --steps"):
        run("--resume", tiny_run)


def test_a_resumed_run_keeps_its_data(tiny_run, images, tmp_path):
    state = checkpoint.load(tiny_run)
    tensors = {name: state.pop(name) for name in ("model", "ema", "optimizers")}
    changed = {**state, "data": "something else", "fingerprint": "another"}
    checkpoint.save(tmp_path / "checkpoint.safetensors", changed, tensors)
    with pytest.raises(UsageError, match="began with something else, and here are 60 images .*, with other images"):
        run("--resume", tmp_path, "--steps", 30)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--batch-size", 9, "--grad-accum-steps", 2], "not a multiple"),
        (["--model", "DiT-N/7", "--image-size", 8], "use --image-size 7 or 14, or a --model of other patches"),
        (["--resume", "nowhere", "--device", "cpu"], "leave --run-dir out"),
        (["--timestep-mean", 1, "--timestep-distribution", "uniform"], "is for logit-normal timesteps: leave it out"),
    ],
)
def test_settings_that_do_not_go_together_name_the_fix(images, tmp_path, arguments, fix):
    with pytest.raises(UsageError, match=fix):
        run("--dataset", images, "--no-compile", *arguments, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_is_damaged_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in IDX_FILES:
        (raw / file).write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot get MNIST .*: put "):
        run("--dataset", "mnist")
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("small_network")
def test_every_objective_trains(images, tmp_path):
    for i, options in enumerate((
        ["--schedule", "linear", "--prediction", "eps", "--learn-sigma"],
        ["--schedule", "cosine", "--prediction", "x0", "--timestep-distribution", "logit-normal", "--min-snr", 5],
        ["--schedule", "flow", "--prediction", "v", "--precision", "bf16", "--gradient-checkpointing"],
    )):
        assert run("--dataset", images, *TINY, "--steps", 40, *options, "--run-dir", tmp_path / str(i)) == 0
        course = losses(tmp_path / str(i))
        assert sum(course[-5:]) < 0.9 * sum(course[:5])
    assert torch.backends.cuda.flash_sdp_enabled()  # again, after bf16


def test_guidance_of_ones_own_is_kept_with_the_weights(tiny_run, images, tmp_path):
    assert checkpoint.load(tiny_run)["guidance"] == 2.0
    own = ["--guidance", 1.5, 200, 900]
    run("--dataset", images, *TINY, "--steps", 2, *own, "--run-dir", tmp_path / "run")
    for name in ("checkpoint.safetensors", "weights.safetensors"):
        state = checkpoint.load(tmp_path / "run" / name)
        assert (state["guidance"], state["guidance_interval"]) == (1.5, [200, 900])
    with pytest.raises(UsageError, match="--guidance is -5: use 0"):
        run("--dataset", images, *TINY, "--guidance", -5)
    for bad in ([200, 900], [2, 9, 8], [2, 9, 1000], [2, 9.5, 10]):
        bad = ["--guidance", *bad]
        with pytest.raises(UsageError, match="W LOW HIGH with whole numbers, 0 <= LOW <= HIGH <= 999"):
            run("--dataset", images, *TINY, *bad)


def test_the_average_follows_fast_at_first_then_slowly():
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    expected = average.weight.item()
    for step in range(50):
        torch.nn.init.constant_(model.weight, float(step))
        update_ema(average, model, step, 0.8)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_training_learns_the_classes(images, tmp_path):
    """Dark, grey and light images: after some hundred steps the samples of each class have its brightness."""
    arguments = ["--dataset", images, *TINY, "--batch-size", 32, "--steps", 150, "--save-every", 1000]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    trained_run = checkpoint.load_model(tmp_path / "run")
    model, diffusion = trained_run.model, trained_run.diffusion
    out = trained(model, diffusion).sample(torch.tensor([0, 1, 2]).repeat_interleave(8), 24, steps=10)
    brightness = (out.view(3, -1).mean(1) + 1) * 127.5
    assert brightness.tolist() == pytest.approx([20, 100, 180], abs=20)


@pytest.mark.slow
def test_without_a_compiler_it_trains_eagerly(images, tmp_path):
    arguments = ["--dataset", images, *[a for a in TINY if a != "--no-compile"], "--steps", 2, "--run-dir", "run"]
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run_script("train.py", *arguments, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "warning: torch.compile does not work here" in result.stderr
    assert "eager" in result.stdout


# --------------------------------------------------------------------------------------------------------------- files


def test_a_run_leaves_all_its_files(tiny_run):
    names = {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        ".lock", "checkpoint.safetensors", "weights.safetensors", "settings.json", "log.jsonl", "loss.png",
        "samples/step_0000010.png", "samples/step_0000020.png",
    }
    assert len(losses(tiny_run)) == 20


@pytest.mark.usefixtures("small_network")
def test_tensorboard_is_optional(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("--dataset", images, *TINY, "--steps", 2, "--run-dir", tmp_path / "run") == 0
    assert not list((tmp_path / "run").glob("events*"))


@pytest.mark.usefixtures("small_network")
def test_a_folder_may_have_any_name(images, tmp_path):
    name = "a $b$ \u732b"
    assert run("--dataset", images, *TINY, "--steps", 2, "--run-dir", tmp_path / name) == 0
    assert run("--resume", tmp_path / name, "--steps", 3) == 0


@pytest.mark.usefixtures("small_network")
def test_one_process_at_a_time_trains_in_a_folder(images, tmp_path, monkeypatch):
    step = Trainer.step

    def second(self, number, *batch):
        monkeypatch.setattr(Trainer, "step", step)
        result = run_script("train.py", "--resume", tmp_path / "run", "--steps", 50, cwd=tmp_path)
        assert result.returncode == 2 and "another process is training in" in result.stderr, result.stderr
        assert result.stderr.startswith("train.py: error: ") and len(result.stderr.splitlines()) == 1
        return step(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", second)
    assert run("--dataset", images, *TINY, "--steps", 4, "--run-dir", tmp_path / "run") == 0
    assert len(losses(tmp_path / "run")) == 4


# ---------------------------------------------------------------------------------------------------- the data of a run


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("change", ["rename", "move", "edit"])
def test_a_run_is_not_resumed_on_other_classes_or_images(images, tmp_path, change):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    assert run("--dataset", folder, *TINY, "--steps", 2, "--run-dir", tmp_path / "run") == 0
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    if change == "rename":
        (folder / "dark").rename(folder / "zebra")
    elif change == "move":
        (folder / "dark" / "0.png").rename(folder / "light" / "moved.png")
        (folder / "light" / "0.png").rename(folder / "dark" / "moved.png")
    else:
        shutil.copy(folder / "dark" / "1.png", folder / "dark" / "0.png")
    with pytest.raises(UsageError, match="with other images, labels or classes: give it the data that it began with"):
        run("--resume", tmp_path / "run", "--steps", 3)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- minutes


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 0.03 s a step, and by more in the steps of the dict that is returned."""
    slow, now, step = {}, [0.0], Trainer.step

    def timed(self, number, *batch):
        now[0] += slow.get(number, 0.03)
        return step(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr("runlog.time.perf_counter", lambda: now[0])
    return slow


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("warmup", [2, 0])
def test_minutes_become_steps_whatever_one_slow_moment(images, tmp_path, clock, warmup):
    arguments = ["--dataset", images, *TINY, "--warmup", warmup, "--minutes", 0.2, "--save-every", 1000]
    clock.update({3: 2.0, 23: 5.0})  # compiling, and another program
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    assert len(losses(tmp_path / "run")) == 340  # 0.2 * 60 * 0.85 / 0.03
    settings = checkpoint.load(tmp_path / "run")["settings"]
    assert (settings["steps"], settings["minutes"]) == (340, None)
    with pytest.raises(UsageError, match="a run that is resumed takes --steps"):
        run("--resume", tmp_path / "run", "--minutes", 1)
    with pytest.raises(UsageError, match="--minutes replaces --steps: leave one out"):
        run(*arguments, "--steps", 5)


@pytest.mark.usefixtures("small_network")
def test_the_number_of_steps_is_saved_as_soon_as_it_is_known(images, tmp_path, clock, monkeypatch):
    """As after a kill -9 later: the run is resumed to the bit, however fast the machine is then."""
    arguments = ["--dataset", images, *TINY, "--minutes", 0.05, "--save-every", 1000]
    assert run(*arguments, "--run-dir", tmp_path / "whole") == 0
    step = Trainer.step

    def killed(self, number, *batch):
        if number == 70:
            raise KeyboardInterrupt
        return step(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--run-dir", tmp_path / "parts")
    monkeypatch.setattr(Trainer, "step", step)
    assert 0 < checkpoint.load(tmp_path / "parts")["step"] < 70
    clock.update(dict.fromkeys(range(1000), 1.0))
    assert run("--resume", tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.usefixtures("small_network")
def test_signal_handlers_are_as_before_after_training(images, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run("--dataset", images, *TINY, "--steps", 1, "--run-dir", tmp_path / "one")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.setattr(Trainer, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--dataset", images, *TINY, "--steps", 1, "--run-dir", tmp_path / "two")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("small_network")
def test_training_works_in_a_thread(images, tmp_path):
    arguments = ["--dataset", images, *TINY, "--steps", 1, "--run-dir", tmp_path / "run"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, *arguments).result() == 0


@pytest.mark.slow
def test_a_pipe_that_breaks_stops_no_training_and_ctrl_c_still_saves(images, tmp_path):
    """As in `python train.py 2>&1 | tee log` when Ctrl-C ends tee first."""
    command = [sys.executable, ROOT / "train.py", "--dataset", images, *TINY, "--steps", "100000", "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.stdout.close()
    size = log.stat().st_size
    while log.stat().st_size == size:  # it goes on
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert checkpoint.load(tmp_path / "run")["step"] == len(losses(tmp_path / "run")) > 0


# -------------------------------------------------------------------------------------------------- several processes


def test_two_processes_take_the_steps_of_one(images, tmp_path):
    arguments = ["--dataset", images, *TINY, "--save-every", 6, "--lr", 1e-3, "--precision", "fp32"]
    run(*arguments, "--steps", 6, "--run-dir", tmp_path / "one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # of which torchrun itself would speak
    two = [*arguments, "--steps", 6, "--run-dir", "two"]
    result = run_script("train.py", *two, cwd=tmp_path, python=TORCHRUN, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line for line in re.split(r"[\r\n]", result.stderr) if line.strip() and "%|" not in line]
    assert not lines, lines
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(list((tmp_path / "two").glob("events*"))) == 1

    for folder in ("one", "two"):  # one process resumes the checkpoint of two
        assert run("--resume", tmp_path / folder, "--steps", 10) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
def test_two_processes_compile_accumulate_and_stop_together(images, tmp_path):
    tiny = [word for word in TINY if word != "--no-compile"]
    arguments = ["--dataset", images, *tiny, "--grad-accum-steps", "2", "--steps", "100000", "--run-dir", "run"]
    command = [sys.executable, *TORCHRUN, ROOT / "train.py", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 240
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "compiled" in out and "warning" not in error
    assert "resume with: python train.py --resume run" in out
    assert checkpoint.load(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))


SIGNALLED_AT_THE_END = """
import os, signal, sys
import rundir, train
from cli import run_script

finish = rundir.RunDir.finish
rundir.RunDir.finish = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or finish(*args)
run_script(lambda: train.main(sys.argv[1:]))
"""


def test_a_signal_that_comes_at_the_very_end_does_not_keep_the_run_from_its_last_words(images, tmp_path):
    """torchrun sends each signal twice, and the second one may come when the run has stopped already."""
    arguments = ["--dataset", images, *TINY, "--steps", 2, "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = run_script("-c", SIGNALLED_AT_THE_END, *arguments, cwd=tmp_path, env=environment)
    assert result.returncode == 0 and "checkpoint.safetensors" in result.stdout
    assert (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.slow
def test_gradient_checkpointing_changes_only_the_memory(images, tmp_path):
    base = ["--dataset", images, *TINY, "--steps", 8, "--precision", "bf16"]
    compiled = [word for word in base if word != "--no-compile"]
    for name, words in (("plain", base), ("saving", [*base, "--gradient-checkpointing"]),
                        ("compiled", [*compiled, "--gradient-checkpointing"])):
        assert run(*words, "--run-dir", tmp_path / name) == 0
    assert losses(tmp_path / "saving") == losses(tmp_path / "plain")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


@pytest.mark.usefixtures("small_network")
def test_where_the_output_is_no_terminal_a_line_a_minute_is_enough(images, tmp_path, capsys):
    arguments = ["--dataset", images, *TINY, "--steps", 300, "--save-every", 100, "--run-dir", tmp_path / "run"]
    begin = time.monotonic()
    assert run(*arguments) == 0
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "step/s" in line]
    assert 0 < len(lines) <= 2 + (time.monotonic() - begin) / 60, lines


@pytest.mark.usefixtures("small_network")
def test_the_log_has_the_loss_by_timestep(images, tmp_path):
    """Each step's loss is the mean over its images, of which each is in one of five intervals of t."""
    run("--dataset", images, *TINY, "--batch-size", 20, "--steps", 3, "--timestep-distribution", "uniform",
        "--run-dir", tmp_path / "run")
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)  # evenly spread timesteps, so four of the 20 are in each interval
        assert sum(entry["loss_by_timestep"]) / 5 == pytest.approx(entry["loss"], rel=1e-4)


@pytest.mark.usefixtures("small_network")
def test_images_of_ones_own_are_held_out_and_their_loss_is_logged(images, tmp_path):
    run("--dataset", images, *TINY, "--steps", 4, "--save-every", 2, "--run-dir", tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [entry["step"] for entry in entries if {"training_images", "held_out_images"} <= entry.keys()]
    assert logged == [2, 4]
    assert checkpoint.load(tmp_path / "run")["data"].startswith("57 of 60 images")


def test_a_network_that_knows_its_images_by_heart_has_a_higher_loss_for_others(images, tmp_path, monkeypatch):
    arguments = ["--dataset", images, *TINY, "--batch-size", 57, "--lr", 1e-2, "--steps", 400, "--save-every", 400]
    run(*arguments, "--run-dir", tmp_path / "run")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["held_out_images"] > 1.02 * last["training_images"]


@pytest.mark.usefixtures("small_network")
def test_flipped_images_are_other_images_and_resume_to_the_bit(images, tmp_path, monkeypatch):
    arguments = ["--dataset", images, *TINY, "--steps", 6, "--flip"]
    run(*arguments, "--run-dir", tmp_path / "whole")
    run(*arguments[:-1], "--run-dir", tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr("rundir.RunDir.asked_to_stop", lambda self: self.step == 3)
        run(*arguments, "--run-dir", tmp_path / "parts")
    assert run("--resume", tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") != losses(tmp_path / "plain")


def test_a_step_that_does_not_fit_in_memory_is_refused_before_anything_is_built(images, tmp_path):
    """Linux would kill the process without a word."""
    large = ["--dataset", images, "--image-size", 1024, "--model", "DiT-S/2", "--device", "cpu", "--batch-size", 64]
    with pytest.raises(DataError, match=r"64 images of 262,144 tokens would take .* GiB .*: raise --grad-accum-steps"):
        run(*large, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
