"""Claims about disks that are full and folders that may not be written: one line, and the last good files stay."""

import ctypes
import resource
import shutil
from contextlib import contextmanager

import pytest

import checkpoint
import cli
import evaluate
import inference
import sweep
import train
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


def fails(work, capsys, reason: str = "File too large") -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run_script(work)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1 and reason in last and "make room there, or name another place" in last


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_is_resumed_to_the_bit(images, tmp_path, capsys):
    arguments = ["--dataset", str(images), *TINY, "--steps", "40", "--save-every", "10", "--run-dir"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    with room_for(size // 2):
        fails(lambda: train.main([*arguments, str(tmp_path / "none")]), capsys)
    assert not any(path.suffix in (".pt", ".partial") for path in (tmp_path / "none").rglob("*"))

    save, saved = checkpoint.save, []
    for full_from in range(1, 4):  # the first file is that of step 0
        folder = tmp_path / str(full_from)

        def until_full(path, state, full_from=full_from, saved=saved):
            if len(saved) >= full_from:
                with room_for(size // 2 + 10_000 * full_from):
                    save(path, state)
            save(path, state)
            saved.append(state["step"])

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

    def then_full(path, state):
        begun(path, state)
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
    for words in (["--gif"], ["--trajectory"], ["--interpolate", "0", "1"], ["--npz", "many.npz"], []):
        args = inference.parse_args(["--checkpoint", "run", "--steps", "2", *words])
        with room_for(60):
            fails(lambda args=args: inference.generate(args), capsys)
        assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_half_of_an_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "SWEEPS", {"steps": ("--steps", [dict(steps=1), dict(steps=2)])})
    words = ["--checkpoint", str(checkpoint.BUNDLED_WEIGHTS), "--count", "20"]
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
            assert ("Permission denied" in last or "may not be written" in last) and "name another place" in last
            assert "Traceback" not in result.stderr
        assert contents(tmp_path) == before
    finally:
        tmp_path.chmod(0o755)
        (tmp_path / "run").chmod(0o755)


def test_a_torch_error_that_is_no_full_disk_keeps_its_name(tmp_path):
    with pytest.raises(RuntimeError, match="another"):
        checkpoint.write_whole(tmp_path / "file", lambda file: (_ for _ in ()).throw(RuntimeError("another")))
    assert not list(tmp_path.iterdir())
