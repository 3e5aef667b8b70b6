"""Claims about runs that are killed, wherever they are: they are resumed to the very bits of a run that was not.

    pytest tests/test_kills.py --kills 50        as many kills; CI makes fewer
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

import checkpoint
from checkpoint import RUN_FILE, WEIGHTS_FILE
from conftest import ROOT, TINY, assert_equal_states, run_script

pytestmark = pytest.mark.slow
STEPS = ["--steps", "18", "--save-every", "6"]
MOMENTS = list(product(("save", "grid", "any time", "start"), (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))

# Imports everything once, and then runs each command line that it reads in a process of its own.
STARTER = """
import json, os, sys
import matplotlib.figure, torch.nn.parallel, torch.utils.tensorboard
import cli, dit, train

dit.MODELS["DiT-N/4"] = dict(hidden_size=48, depth=2, num_heads=2, patch_size=4)
while line := sys.stdin.readline():
    words, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        cli.run_script(lambda: train.main(words))
    print(pid, flush=True)
    sys.stdin.readline()  # until then the process keeps its number, even if it has ended
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start train.py with these words: returns its process number, and a function that waits for its exit status."""
    folder = tmp_path_factory.mktemp("starter")
    options = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, bufsize=1)
    options |= dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    starter = subprocess.Popen([sys.executable, "-c", STARTER], **options)

    def begin(*words: object):
        log = folder / "log"
        starter.stdin.write(json.dumps([[str(word) for word in words], str(log)]) + "\n")
        pid = int(starter.stdout.readline())

        def wait() -> int:
            starter.stdin.write("wait\n")
            status = int(starter.stdout.readline())
            assert "Traceback" not in log.read_text(), log.read_text()
            return status

        return pid, wait

    yield begin
    starter.stdin.close()
    starter.wait()


def wait_until(moment: str, folder: Path, pid: int, rng: random.Random) -> None:
    """Wait for a moment in which to kill this process, or for its end."""
    def gone() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"

    saves, begin, deadline = rng.randrange(3), time.monotonic(), time.monotonic() + rng.uniform(0.1, 1.5)
    while not gone():
        if moment == "start":
            if time.monotonic() > begin + rng.uniform(0, 0.6) or folder.exists():
                return
        elif moment == "save":
            if (folder / f"{RUN_FILE}.partial").exists() and len(list(folder.glob("samples/*.png"))) >= saves:
                return
        elif moment == "grid":
            log, pictures = folder / "log.jsonl", len(list(folder.glob("samples/*.png")))
            logged = log.read_bytes().count(b"\n") if log.exists() else 0
            between = logged == 6 * (pictures + 1) and not (folder / f"{RUN_FILE}.partial").exists()
            if between and pictures >= saves:
                return
        elif time.monotonic() > deadline:
            return
        time.sleep(0.0002)


def check_files(folder: Path) -> None:
    """Whatever has its final name is whole."""
    for path in folder.rglob("*"):
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            checkpoint.load(path)


def test_a_killed_run_is_resumed_to_the_bit(images, start, tmp_path, request):
    arguments = ["--dataset", images, *TINY, *STEPS, "--run-dir"]
    _, wait = start(*arguments, tmp_path / "whole")
    assert wait() == 0
    whole, survived = checkpoint.load(tmp_path / "whole"), {}
    for number in range(request.config.getoption("kills")):
        rng, folder = random.Random(number), tmp_path / str(number)
        moment, kill = MOMENTS[number % len(MOMENTS)]
        pid, wait = start(*arguments, folder)
        wait_until(moment, folder, pid, rng)
        os.kill(pid, kill)
        status = wait()
        assert status in (0, -kill, 128 + kill)
        check_files(folder)
        if (folder / RUN_FILE).exists():
            _, wait = start("--resume", folder)
            assert wait() in ((0, 2) if (folder / WEIGHTS_FILE).exists() else (0,))
        else:  # nothing was begun
            assert not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text()
            folder = tmp_path / f"{number}-again"
            _, wait = start(*arguments, folder)
            assert wait() == 0
        assert_equal_states(checkpoint.load(folder), whole)
        pictures = [f"samples/step_{n:07d}.png" for n in range(6, 19, 6)]
        for name in ("log.jsonl", "settings.json", WEIGHTS_FILE, *pictures):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (name, moment, kill)
        assert not list(folder.rglob("*.partial"))
        key = f"{moment}, {kill.name}, {'killed' if status else 'finished before'}"
        survived[key] = survived.get(key, 0) + 1
    print(survived)
    assert sum(n for key, n in survived.items() if key.endswith(", killed")) > request.config.getoption("kills") // 2


def test_of_two_processes_one_is_killed_and_the_other_stops_and_says_so(images, tmp_path):
    arguments = ["--dataset", images, *TINY, "--save-every", 4, "--lr-schedule", "constant", "--run-dir"]
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    whole = run_script("train.py", *arguments, "whole", "--steps", 30, cwd=tmp_path, python=torchrun)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *map(str, arguments), "killed", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    rank = {pid: b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    os.kill(next(pid for pid in children if rank[pid]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "process 0 of 2 stops, since another is gone" in error, error
    assert "rank      : 1" in error and "Signal 9 (SIGKILL)" in error
    assert "train.py\", line" not in error  # no traceback of ours
    check_files(tmp_path / "killed")
    resumed = run_script("train.py", "--resume", "killed", "--steps", 30, cwd=tmp_path, python=torchrun)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_states(checkpoint.load(tmp_path / "killed"), checkpoint.load(tmp_path / "whole"))
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(images, tmp_path, ignored):
    """As Ctrl-C is in a shell's background jobs. The other one stops the run and saves it, as always."""
    other = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}[ignored]
    for number, status, steps in ((ignored, 0, 40), (other, 128 + other, 10**6)):
        folder = tmp_path / number.name
        words = ["--dataset", images, *TINY, "--steps", steps, "--save-every", 10**6, "--run-dir", folder]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, preexec_fn=lambda: signal.signal(ignored, signal.SIG_IGN),
        )
        while not (folder / RUN_FILE).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        for _ in range(3 if number == ignored else 1):  # a second one that is not ignored ends the process at once
            process.send_signal(number)
            time.sleep(0.01)
        out, error = process.communicate(timeout=120)
        assert process.returncode == status and "Traceback" not in error
        assert (folder / WEIGHTS_FILE).exists() == (number == ignored)


LOST = """
import signal, time
from cli import run_script

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background does not have

class Resource:
    def __del__(self):
        signal.raise_signal({signal})

def work():
    resource = Resource()
    del resource
    time.sleep(30)

run_script(work)
"""


@pytest.mark.parametrize(("number", "status"), [("signal.SIGINT", 130), ("signal.SIGTERM", 143)])
def test_a_signal_that_comes_while_an_object_is_removed_is_not_lost(number, status):
    begin = time.monotonic()
    result = run_script("-c", LOST.replace("{signal}", number), cwd=ROOT)
    assert (result.returncode, result.stderr) == (status, "")
    assert time.monotonic() - begin < 25
