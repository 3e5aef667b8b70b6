"""Claims about what the scripts say without being asked: nothing but their progress."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, TINY, run_script

COMPILE = """
import torch
from cli import run_script
from dit import DiTBlock
from speed import compile_blocks

block = DiTBlock(16, 2, 4.0)
dry_run = lambda: block(torch.ones(2, 4, 16), torch.ones(2, 16)).sum().backward()
run_script(lambda: 0 if compile_blocks([block], dry_run) else 1)
"""


def said(result) -> list[str]:
    """The lines on stderr that show no progress."""
    assert result.returncode == 0, result.stderr
    lines = re.split(r"[\r\n]|\x1b\[A", result.stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\||\d+(step|image|batch) ?\[", line)]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), [
    ("inference.py", ["--steps", 1]),
    ("tools/sample_npz.py", ["--sampler", "shortcut", "--steps", 1, "--count", 20]),
    ("evaluate.py", ["--count", 20, "--steps", 1]),
    ("train.py", ["--dataset", "mnist-5000", *TINY, "--steps", 2, "--save-every", 1]),
    ("tools/benchmark.py", ["--help"]),
    ("tools/train_classifier.py", ["--help"]),
    ("tools/sweep.py", ["--help"]),
    ("distill.py", ["--help"]),
])
def test_a_script_says_nothing_but_its_progress(tmp_path, script, arguments):
    result = run_script(script, *arguments, cwd=tmp_path, python=("-W", "default"))
    assert said(result) == []
    assert result.stdout and "warning" not in result.stdout.lower()


@pytest.mark.slow
def test_compiling_where_there_is_a_cuda_compiler_and_no_gpu_says_nothing(tmp_path):
    environment = {**os.environ, "CUDA_HOME": "/usr/local", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    assert said(run_script("-c", COMPILE, cwd=ROOT, env=environment)) == []


@pytest.mark.parametrize("script", ["train.py", "distill.py", "inference.py", "evaluate.py"])
def test_ctrl_c_while_packages_are_imported_ends_without_a_traceback(tmp_path, script):
    """PyTorch takes seconds. A file in its place waits until the signal comes."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "numpy.py").write_text("import torch\n")
    shutil.copy(ROOT / script, tmp_path)  # beside these files, which it imports first
    command = [sys.executable, str(tmp_path / script)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and error == b""
