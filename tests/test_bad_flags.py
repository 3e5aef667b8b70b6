"""Claims about command lines, whatever stands on them: each does its work, or ends in one line and changes nothing."""

import contextlib
import dataclasses
import io
import re
import resource
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import benchmark
import checkpoint
import cli
import dataset
import distill
import evaluate
import inference
import model_flags
import sweep
import train
import train_classifier
from conftest import run_script
from diffusion import Diffusion
from dit import DiT, DiTConfig
from sampling import TrainedModel

NUMBERS = [
    "0", "1", "2", "3", "8", "20", "100", "1000", "1001", "-1", "0.5", "2.5", "1e308", "1e400", "nan", "inf", "-inf",
    "9" * 30, "9" * 5000, "-" + "9" * 30, "1_000", "٣", "0x10", " 5", "1e-400", str(2**31), str(2**32), str(2**63),
]
WORDS = [
    "", " ", "x" * 5000, "a\nb", "\x1b[31m", "\u202e", "0-9", "5-3", "0-99999999999", "left", "right", "../..", ".",
    "~", "/dev/null", "/proc/self/mem", "nowhere.png", "nowhere/else.npz", "new.json", "--", "-", "--steps", "%s", "{}",
    "DiT-S/2", "DiT-N/7", "mnist-5000", "mnist",
    "cuda", "cpu", "mps", "bf16", "steps", "bits", "ddim", "shortcut", "flow",
    "linear", "eps", "v", "adamw", "constant", "guidance", "memorization", "held-out",
]
WORD = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers().map(str), st.floats().map(str),
    st.floats(0, 20).map(str), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
).filter(lambda word: not re.match("--?h", word))  # of help


class Reached(BaseException):
    """The command line was understood, and the work would begin."""


def reached(*_, **__):
    raise Reached


def flags(parse) -> list[str]:
    """All flags of a script, but --help."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(cli.Parser, "parse_args", lambda self, *_: seen.extend(self._option_string_actions) or reached())
        with pytest.raises(Reached):
            parse()
    return sorted(flag for flag in seen if flag not in ("-h", "--help"))


def command_lines(parse) -> st.SearchStrategy[list[str]]:
    """One to three flags of a script, most with one word, as most flags take."""
    words = st.one_of(st.tuples(WORD), st.tuples(WORD), st.lists(WORD, max_size=3))
    part = st.tuples(st.sampled_from(flags(parse)), words).map(lambda p: [p[0], *p[1]])
    return st.lists(part, min_size=1, max_size=3).map(lambda parts: [word for part in parts for word in part])


@pytest.fixture(scope="module", autouse=True)
def _no_work(tmp_path_factory):
    """An empty folder to start from, small weights in place of the bundled ones, and no work."""
    folder, weights = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("weights") / "weights.safetensors"
    config = DiTConfig(hidden_size=8, depth=1, num_heads=1)
    about = checkpoint.describe(DiT, config, Diffusion("flow", "x0"), dataset.DIGITS, "no images of MNIST", 0, 1.5)
    checkpoint.save(weights, about, DiT(config).state_dict())
    images = dataset.Images(torch.zeros(20, 1, 28, 28).byte(), torch.arange(20) % 10, dataset.DIGITS, "20 images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("BUNDLED_WEIGHTS", "DISTILLED_WEIGHTS"):
            patch.setattr(checkpoint, name, weights)
            patch.setattr(model_flags, name, weights)
        patch.setattr(distill, "BUNDLED_WEIGHTS", weights)
        patch.setattr(dataset, "from_torchvision", lambda *_: dataclasses.replace(images))  # which may be resized
        patch.setattr(dataset, "bundled_digits", lambda: dataclasses.replace(images))
        patch.setattr(dataset, "MEMORY_LIMIT", 50 * 2**20)
        for module, name in ((train.Trainer, "__init__"), (TrainedModel, "sample_batch"), (evaluate, "measure"),
                             (sweep, "measure"), (benchmark, "matmul_peak"), (train_classifier, "fit")):
            patch.setattr(module, name, reached)
        yield folder


def check(work, words: list[str]) -> None:
    """The work begins, or the script ends in one line with status 1 or 2; soon, and without writing a file."""
    before, errors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            cli.run_script(work)
    except Reached:
        pass
    except SystemExit as end:
        lines = errors.getvalue().splitlines()
        assert end.code in (1, 2), (words, lines)
        assert len(lines) == 1 and ": error: " in lines[0] and lines[0].isprintable(), lines
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert not [path for path in Path().rglob("*") if path.is_file()]


def property_of(parse, examples: int):
    """A test of a script with this many command lines, always the same ones."""
    def decorate(test):
        options = settings(max_examples=examples, deadline=timedelta(seconds=10), derandomize=True, database=None,
                           suppress_health_check=list(HealthCheck))
        return options(given(words=command_lines(parse))(test))

    return decorate


SCRIPTS = {
    "train": (lambda: train.build_parser().parse_args(), train.main),
    "distill": (lambda: distill.build_parser().parse_args(), distill.main),
    "inference": (inference.parse_args, lambda words: inference.generate(inference.parse_args(words))),
    "evaluate": (evaluate.parse_args, lambda words: evaluate.evaluate(evaluate.parse_args(words))),
    "sweep": (sweep.parse_args, lambda words: sweep.sweep(sweep.parse_args(["steps", *words]))),
    "benchmark": (benchmark.main, benchmark.main),
    "train_classifier": (train_classifier.main, train_classifier.main),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_command_line_does_its_work_or_ends_in_one_line(name):
    parse, main = SCRIPTS[name]
    property_of(parse, 40)(lambda words: check(lambda: main(words), words))()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_thousand_command_lines_do_their_work_or_end_in_one_line(name):
    parse, main = SCRIPTS[name]
    property_of(parse, 1000)(lambda words: check(lambda: main(words), words))()


OUT_OF_RANGE = {
    "--steps": ["0", "-1", "1.5", "x", "", "9" * 30], "--batch-size": ["0", "-1", "x", "1e3"],
    "--seed": ["-1", str(2**32), "x"],
    "--eta": ["-0.1", "1.1", "nan", "inf"], "--guidance": ["nan", "inf", "1e9", "x"],
    "--per-class": ["0", "10001", "x"], "--count": ["0", "99999999999"], "--labels": ["10", "x", "5-3"],
    "--sampler": ["euler", ""], "--precision": ["fp8"], "--device": ["abacus", "cuda:1"], "--checkpoint": ["nowhere"],
    "--lr": ["-1", "nan", "inf", "1e9"],
    "--minutes": ["0", "inf", "nan"], "--ema-decay": ["-0.1", "1.1", "nan"],
    "--warmup": ["-1", "nan"],
    "--min-snr": ["0", "inf", "nan"], "--label-dropout": ["-1", "2", "nan"],
    "--image-size": ["0", "-8", "1000000007"], "--grad-accum-steps": ["0"], "--save-every": ["0"],
    "--model": ["DiT-Q/2"],
}


@pytest.mark.parametrize("name", ["train", "distill", "inference", "evaluate"])
def test_what_is_out_of_range_is_exit_status_2(name, capsys):
    parse, main = SCRIPTS[name]
    known = flags(parse)
    for flag in sorted(OUT_OF_RANGE.keys() & set(known)):
        for value in OUT_OF_RANGE[flag]:
            if (name, flag) in (("evaluate", "--labels"), ("inference", "--model"), ("evaluate", "--model")):
                continue
            words = [f"{flag}={value}", *(["--npz", "new.npz"] if flag == "--count" and name == "inference" else [])]
            with pytest.raises(SystemExit) as caught:
                cli.run_script(lambda words=words: main(words))
            lines = capsys.readouterr().err.splitlines()
            assert caught.value.code == 2 and len(lines) == 1 and ": " in lines[0].split(": error: ")[1], (words, lines)


@pytest.mark.parametrize("script", ["train.py", "distill.py", "inference.py", "evaluate.py", "tools/benchmark.py"])
def test_a_flag_that_does_not_exist_is_one_line(script, tmp_path):
    if script != "train.py":  # of one a process is started
        parse, main = SCRIPTS[Path(script).stem]
        with pytest.raises(cli.UsageError, match=r"unrecognized arguments: --nonsense \(see --help\)"):
            main(["--nonsense"])
        return
    result = run_script(script, "--nonsense", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "train.py: error: unrecognized arguments: --nonsense (see --help)\n"
