"""Claims about disks that are full and folders that may not be written: one line, and the last good files stay."""

import ctypes
import errno
import os
import resource
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import checkpoint
import cli
import evaluate
import inference
import sample_npz
import sweep
import train
from checkpoint import BUNDLED_WEIGHTS, RUN_FILE
from cli import UsageError
from conftest import TINY, assert_equal_states, run_script

pytestmark = [pytest.mark.usefixtures("tiny_network"), pytest.mark.slow]


@contextmanager
def room_for(size: int):
    """Inside, no file can grow beyond this many bytes. The error is "File too large", where a full disk has another."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails(work, capsys, reason: str = "File too large", fix: str = "name another place", status: int = 1) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run_script(work)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == status and f"({reason}): {fix}" in last, last


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("room", [0, 500, 2000, 100_000])
def test_a_disk_that_is_full_at_the_first_save_leaves_no_folder(images, tmp_path, capsys, room, monkeypatch):
    """And the same command works afterwards, as does one that leaves the name to the run."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", str(images), *TINY, "--steps", "1"]
    for place, folder in ((["--run-dir", "some/run"], Path("some/run")), ([], Path(f"runs/{images.name}-1"))):
        with room_for(room):
            fails(lambda place=place: train.main([*arguments, *place]), capsys)
        assert not folder.exists()
        assert train.main([*arguments, *place]) == 0
        assert checkpoint.load(folder)["step"] == 1


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_is_resumed_to_the_bit(images, tmp_path, capsys):
    arguments = ["--dataset", str(images), *TINY, "--steps", "40", "--save-every", "10", "--run-dir"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    size = (tmp_path / "whole" / RUN_FILE).stat().st_size
    save, saved = checkpoint.save, []
    for full_from in range(1, 4):  # the first file is that of step 0
        folder = tmp_path / str(full_from)

        def until_full(path, description, tensors, full_from=full_from, saved=saved):
            if len(saved) >= full_from:
                with room_for(size // 2 + 10_000 * full_from):
                    save(path, description, tensors)
            save(path, description, tensors)
            saved.append(description["step"])

        saved.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", until_full)
            fails(lambda folder=folder: train.main([*arguments, str(folder)]), capsys)
        assert checkpoint.load(folder)["step"] == saved[-1] == 10 * (full_from - 1)
        assert not list(folder.rglob("*.partial"))
        assert train.main(["--resume", str(folder)]) == 0
        assert_equal_states(checkpoint.load(folder), checkpoint.load(tmp_path / "whole"))
        assert (folder / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


@pytest.mark.parametrize("room", [0, 500, 3000])
def test_a_full_disk_at_the_log_or_a_picture_loses_no_checkpoint(images, tmp_path, capsys, room):
    arguments = ["--dataset", str(images), *TINY, "--steps", "40", "--save-every", "20"]
    arguments += ["--run-dir", str(tmp_path / "run")]
    begun = checkpoint.save

    def then_full(path, description, tensors):
        begun(path, description, tensors)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    with pytest.MonkeyPatch.context() as patch, room_for(resource.RLIM_INFINITY):
        patch.setattr(checkpoint, "save", then_full)
        fails(lambda: train.main(arguments), capsys)
    assert checkpoint.load(tmp_path / "run")["step"] == 0
    assert not list(tmp_path.rglob("*.partial"))
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 40


def test_a_full_disk_leaves_no_half_of_a_picture_or_array(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dataset", str(images), *TINY, "--steps", "1", "--run-dir", "run"]) == 0
    before = contents(tmp_path)
    words = ["--checkpoint", "run", "--steps", "2"]
    kinds = [["--gif"], ["--trajectory"], ["--interpolate", "0", "1"], ["--from", "run/samples/step_0000001.png"], []]
    every = [partial(inference.generate, inference.parse_args([*words, *kind])) for kind in kinds]
    for work in (*every, lambda: sample_npz.main(["many.npz", *words])):
        with room_for(60):
            fails(work, capsys)
        assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_half_of_an_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "SWEEPS", {"steps": ("--steps", [dict(steps=1), dict(steps=2)])})
    words = ["--checkpoint", str(BUNDLED_WEIGHTS), "--count", "20"]
    for work in (
        lambda: evaluate.evaluate(evaluate.parse_args([*words, "--steps", "1"])),
        lambda: sweep.sweep(sweep.parse_args(["steps", *words])),
    ):
        with room_for(200):
            fails(work, capsys)
        assert not contents(tmp_path)


def only_as_permitted() -> None:
    """Take from a process of root what lets it write where permissions forbid it."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_folder_that_may_not_be_written(tiny_run, images, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    work = {
        "train.py": (["--dataset", images, *TINY, "--steps", 1, "--run-dir", "new"], 1),
        "inference.py": (["--checkpoint", "run", "--steps", 1, "--output", "new.png"], 2),
        "evaluate.py": (["--count", 20, "--steps", 1, "--output", "new.json"], 2),
    }
    before = contents(tmp_path)
    (tmp_path / "run").chmod(0o555)
    tmp_path.chmod(0o555)
    try:
        for script, (words, status) in [*work.items(), ("train.py", (["--resume", "run", "--steps", 21], 1))]:
            result = run_script(script, *words, cwd=tmp_path, preexec_fn=only_as_permitted)
            last = result.stderr.splitlines()[-1]
            assert result.returncode == status and last.startswith(f"{script}: error: ")
            assert "(Permission denied): change its permissions, or name another place" in last, last
            assert "Traceback" not in result.stderr
        assert contents(tmp_path) == before
    finally:
        tmp_path.chmod(0o755)
        (tmp_path / "run").chmod(0o755)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).chmod(0)
    for script, words in (("inference.py", ["--checkpoint", "run"]), ("train.py", ["--resume", "run", "--steps", 21])):
        result = run_script(script, *words, cwd=tmp_path, preexec_fn=only_as_permitted)
        assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
        assert f"{RUN_FILE} (Permission denied): change its permissions" in result.stderr


def test_a_name_that_is_too_long_names_its_own_fix(tiny_run, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reason, name = ("File name too long", "give a shorter name"), "a" * 300
    words = ["--checkpoint", str(tiny_run), "--steps", "1", "--output"]
    for output in (f"{name}.png", f"{name}/b.png"):
        args = inference.parse_args([*words, output])
        fails(lambda args=args: inference.generate(args), capsys, *reason, status=2)
    fails(lambda: train.main(["--dataset", str(images), *TINY, "--run-dir", name]), capsys, *reason)
    assert not contents(tmp_path)


def test_a_disk_without_room_names_its_own_fix(tiny_run, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    reason = "No space left on device", "make room there, or name another place"
    words = ["--checkpoint", str(tiny_run), "--steps", "1", "--device", "cpu"]
    fails(lambda: inference.generate(inference.parse_args(words)), capsys, *reason)
    fails(lambda: sample_npz.main([*words, "--count", "3"]), capsys, *reason)
    fails(lambda: train.main(["--dataset", str(images), *TINY, "--steps", "1", "--run-dir", "run"]), capsys, *reason)
    assert not contents(tmp_path) and not Path("run").exists()
    space = namedtuple("Usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)
    monkeypatch.setattr(sample_npz, "sample_part", lambda *_: pytest.fail("began to sample"))
    fails(lambda: sample_npz.main([*words, "--count", "3"]), capsys, *reason)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("error", "status"),
    [(FloatingPointError("no"), 1), (UsageError("no: do"), 2), (KeyboardInterrupt(), 130), (SystemExit(143), 143)],
)
def test_a_file_that_was_claimed_is_removed_when_the_work_fails(tmp_path, monkeypatch, error, status):
    """And only that: neither one that was there before nor one that something was written to."""
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("outputs/grid-1.png").touch()

    def work():
        assert cli.output_path(None, "grid.png") == Path("outputs/grid-2.png")
        cli.output_path(Path("written.png"), "grid.png").write_text("something")
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run_script(work)
    assert caught.value.code == status
    assert contents(tmp_path) == {Path("outputs/grid-1.png"): b"", Path("written.png"): b"something"}
    with pytest.raises(UsageError, match=r"grid-1.png is there already: give another name, or remove it first"):
        cli.output_path(Path("outputs/grid-1.png"), "grid.png")
    assert Path("outputs/grid-1.png").exists()


def test_a_claimed_file_is_removed_even_after_a_fault(tmp_path, monkeypatch):
    def work():
        cli.output_path(tmp_path / "grid.png", "grid.png")
        raise KeyError("a fault in the code")

    with pytest.raises(KeyError):
        cli.run_script(work)
    assert not contents(tmp_path)


def test_scripts_that_begin_together_write_files_of_different_names(tiny_run, tmp_path):
    scripts = {
        "inference.py": ["--checkpoint", tiny_run, "--steps", 1],
        "evaluate.py": ["--checkpoint", BUNDLED_WEIGHTS, "--steps", 1, "--count", 20],
    }
    for script, words in scripts.items():
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _, s=script, w=words: run_script(s, *w, cwd=tmp_path), range(4)))
        assert [result.returncode for result in results] == [0] * 4, results[0].stderr
        names = {result.stdout.split()[-1] for result in results}
        stem, suffix = ("grid", ".png") if script == "inference.py" else ("evaluation", ".json")
        assert names == {f"outputs/{stem}-{n}{suffix}" for n in range(1, 5)}
        found = [(tmp_path / name).read_bytes() for name in names]
        assert all(found) and (suffix == ".json" or len(set(found)) == 1)  # of one seed
    assert len(contents(tmp_path)) == 8


def test_a_torch_error_that_is_no_full_disk_keeps_its_name(tmp_path):
    with pytest.raises(RuntimeError, match="another"):
        checkpoint.write_whole(tmp_path / "file", lambda file: (_ for _ in ()).throw(RuntimeError("another")))
    assert not list(tmp_path.iterdir())
