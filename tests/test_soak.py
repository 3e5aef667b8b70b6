"""Claims about long work: memory and the time of a step stay flat.

    pytest tests/test_soak.py --soak 20        for 20 minutes, and 50,000 images; CI takes less of both
"""

import os
import signal
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

import train
from conftest import ROOT, TINY, run_script
from test_bad_files import WATCHED

pytestmark = pytest.mark.slow


def memory() -> float:
    """What this process holds, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_training_with_its_samples_stays_flat(images, tmp_path, monkeypatch, request):
    minutes, seen, step = request.config.getoption("soak"), [], train.Trainer.step
    end = time.monotonic() + 60 * minutes

    def watched(self, *arguments):
        begin = time.perf_counter()
        result = step(self, *arguments)
        seen.append((time.perf_counter() - begin, memory()))
        if time.monotonic() > end and len(seen) > 100:  # on a busy machine it takes longer
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(train.Trainer, "step", watched)
    arguments = ["--dataset", str(images), *TINY, "--steps", "1000000", "--save-every", "10", "--lr", "1e-4"]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    quarter = len(seen) // 4
    early, late = seen[quarter : 2 * quarter], seen[-quarter:]
    times = [statistics.median(seconds for seconds, _ in part) for part in (early, late)]
    most = [max(held for _, held in part) for part in (early, late)]
    pictures = len(list(tmp_path.glob("run/samples/*.png")))
    print(f"{len(seen):,} steps, {pictures} grids: a step takes {1000 * times[0]:.1f} ms in the second quarter and "
          f"{1000 * times[1]:.1f} ms in the last; {most[0]:.0f} and {most[1]:.0f} MiB")
    assert quarter > 20 and pictures > 1
    assert times[1] < 2 * times[0]  # other work on the machine may slow one of them
    assert most[1] < most[0] + 32


def test_many_images_take_their_own_memory_and_little_more(tmp_path, request):
    counts, used = (1000, 50_000 if request.config.getoption("soak") >= 1 else 5000), []
    for n in counts:
        words = [f"{n}.npz", "--count", n, "--sampler", "shortcut", "--steps", 1]
        result = run_script("-c", WATCHED, ROOT / "tools" / "sample_npz.py", *words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        *_, seconds, kib = result.stdout.split()
        used.append(int(kib) / 2**10)
        print(f"{n:,} images: {float(seconds):.0f} s of work, {used[-1]:.0f} MiB")
        with np.load(tmp_path / f"{n}.npz") as file:
            assert file["arr_0"].shape == (n, 28, 28, 1) and file["arr_0"][-1].max() > 0
    more = (counts[1] - counts[0]) * 28 * 28 / 2**20  # in 8 bits; they are held as float32, too
    assert used[1] < used[0] + 12 * more + 64
