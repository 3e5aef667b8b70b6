"""Claims about files that are damaged, made by a stranger, or made to do harm: each ends in one line, soon, and changes
nothing."""

import copy
import io
import json
import pickle
import random
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import cli
import dataset
import distill
import evaluate
import inference
import train
from checkpoint import RUN_FILE, WEIGHTS_FILE, CheckpointError
from conftest import ROOT, TINY, assert_equal_states, divided, forge, run_script
from test_checkpoint import Malicious

SEED = 11
pytestmark = pytest.mark.usefixtures("tiny_network")
DEEP = []  # as deep as JSON is read
for _ in range(400):
    DEEP = [DEEP]
WRONG = [
    "four", "", -1, 0, 10**7, 10**12, 10**30, 10**4000, 1.5, float("nan"), float("inf"), None, True, [], [1], {},
    {"a": 1}, DEEP, [[]] * 10**5, "ha" * 10**6,
]
# What can be, of these.
FINE = {
    "data": ["four", ""], "step": [0, 10**7, True], "guidance": [1.5], "guidance_interval": [None, []],
    "null_class": [True],
}


@pytest.fixture(scope="module")
def good(tiny_network, images, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("good") / "run"
    arguments = ["--dataset", str(images), *TINY, "--steps", "4", "--run-dir", str(folder)]
    assert train.main(arguments) == 0
    return folder


def altered(state: dict, path: tuple, value: object) -> dict:
    """A copy of a checkpoint with another value at this path of keys."""
    state = copy.copy(state)
    state[path[0]] = altered(state.get(path[0], {}), path[1:], value) if path[1:] else value
    return state


def without(state: dict, *names: str) -> dict:
    return {name: value for name, value in state.items() if name not in names}


def forge_text(path: Path, description: str, tensors: dict | None = None) -> bytes:
    """Write a file whose description is any text, with tensors of any names and the checksum that belongs to it."""
    tensors = tensors or {"pos_embed": torch.zeros(1)}
    metadata = {"description": f"{checkpoint.checksum(description, tensors)} {description}"}
    save_file(tensors, path, metadata)
    return path.read_bytes()


def descriptions(state: dict) -> list[dict]:
    """Checkpoints that say something wrong, or lack something."""
    cases = []
    paths = [(name,) for name in ("format", *checkpoint.TYPES)]
    paths += [(part, name) for part in ("config", "diffusion") for name in state[part]]
    paths += [("diffusion", "device"), ("config", "surprise"), ("config", "")]
    for path in paths:
        fine = FINE.get(path[0], [])
        cases += [altered(state, path, value) for value in WRONG if not any(value is f or value == f for f in fine)]
    cases += [without(state, name) for name in ("format", *checkpoint.TYPES, "ema")]
    needed = (("config", "hidden_size"), ("config", "image_size"), ("diffusion", "timesteps"))
    cases += [{**state, part: without(state[part], name)} for part, name in needed]
    for part in ("config", "diffusion"):
        for name, value in state[part].items():
            others = [float(value), str(value)] if type(value) is int else [int(value)] if type(value) is bool else []
            cases += [altered(state, (part, name), other) for other in others]
    cases += [altered(state, ("guidance_interval",), value) for value in ([1], [3, 2], [0, 1000], [0.0, 1], [0, 1, 2])]
    cases += [altered(state, ("classes",), value) for value in (["a"] * 4, ["a", "b", 3], "abc", [["a"]] * 3)]
    return cases


def weights(state: dict) -> list[dict]:
    """Checkpoints whose weights are of other kinds, sizes, names or numbers."""
    name, cases = "blocks.0.mlp.fc1.weight", []
    good = state["ema"][name]
    for number in (float("nan"), float("inf"), -float("inf")):
        cases.append(altered(state, ("ema", name), good.clone().index_fill_(0, torch.tensor(3), number)))
    for tensor in (
        good[:5], good.int(), good.bool(), good.cfloat(), good[0], good.flatten(), good[None], good.double() + 1e300,
        torch.zeros(0, 10**9), torch.tensor(1.0), "four", [1], {}, {"a": good}, {"": good}, None, DEEP,
    ):
        cases.append(altered(state, ("ema", name), tensor))
    cases += [{**state, "ema": without(state["ema"], name)}, {**state, "ema": {}}]
    cases += [altered(state, ("ema", surprise), good) for surprise in ("surprise", "", "\x1b[2J", "a" * 10**5)]
    cases += [{**state, "ema": {n.upper(): tensor for n, tensor in state["ema"].items()}}]
    for part, name in (("config", "hidden_size"), ("diffusion", "timesteps"), ("diffusion", "min_snr")):
        cases += [altered(state, (part, name), tensor) for tensor in (torch.tensor(1000), torch.tensor(5.0), good)]
    return cases


def bytes_of(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def damaged(content: bytes, n: int) -> list[bytes]:
    """Files of which a part is missing, or some bytes are others."""
    rng, cases = random.Random(SEED), []
    for i in range(n):
        if i % 3 == 0:
            cases.append(content[: rng.randrange(len(content))])
        else:
            at, size = rng.randrange(len(content) - 64), rng.choice([1, 1, 8, 64])
            cases.append(content[:at] + bytes(b ^ rng.randrange(1, 256) for b in content[at : at + size])
                         + content[at + size :])
    return cases


def harmful(folder: Path, touched: Path, state: dict) -> set[str]:
    """Write files that would run a command, or fill the memory, or take forever. Returns their names."""
    files = {
        "code.pt": bytes_of({"format": checkpoint.FORMAT, "step": Malicious(touched)}),
        "code-teacher.pt": bytes_of({"format": checkpoint.FORMAT, "teacher": Malicious(touched)}),
        "pickle.pt": pickle.dumps(Malicious(touched)),
        "nested.pt": b"\x80\x02" + b"(" * 10**5 + b".",
        "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "long.safetensors": (10**8).to_bytes(8, "little") + b"{}",
        "full.safetensors": (10**7).to_bytes(8, "little") + b" " * 10**7,
        "deep.safetensors": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    text, tensor = json.dumps(divided(state)[0]), {"pos_embed": torch.zeros(1)}
    texts = {  # each with the checksum that belongs to it
        "depth": "[" * 10**6, "objects": '{"a":' * 10**5, "digits": f'{{"step": {"1" * 10**6}}}', "text": "four",
        "many": f"[{'{},' * 10**6}1]", "null": "null", "none": "", "twice": text[:-1] + f", {text[1:]}", "nul": "\0",
    }
    for name, content in texts.items():
        forge_text(folder / f"json-{name}.safetensors", content)
    names = {  # of tensors
        "path": "a/" * 10**5, "slashes": "/" * 10**5, "step": "step/a", "classes": "classes/0", "long": "a" * 10**6,
        "format": "format/a", "config": "config/depth/a",
    }
    for name, path in names.items():
        forge_text(folder / f"name-{name}.safetensors", text, tensor | {path: torch.zeros(1)})
    forge_text(folder / "name-all.safetensors", text, {f"ema/{i}": torch.zeros(0) for i in range(5000)})
    return {*files, *(f"json-{name}.safetensors" for name in texts), *(f"name-{name}.safetensors" for name in names),
            "name-all.safetensors"}


def ends(work, capsys) -> tuple[int | None, list[str], float]:
    """The exit status of a script, what it printed on stderr, and the seconds for which it used the processor."""
    begin = time.process_time()
    with pytest.raises(SystemExit) as caught:
        cli.run_script(work)
    return caught.value.code, capsys.readouterr().err.splitlines(), time.process_time() - begin


def refused(work, capsys) -> str:
    """The one line in which a script refuses its work."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, lines, seconds = ends(work, capsys)
    assert status in (1, 2), lines
    assert len(lines) == 1 and ": error: " in lines[0] and "Traceback" not in lines[0], lines
    assert len(lines[0]) < 1000 and ": " in lines[0].split(": error: ")[1]
    assert seconds < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    return lines[0]


def sample(path, output):
    arguments = ["--checkpoint", str(path), "--per-class", "1", "--steps", "1", "--output", str(output)]
    return lambda: print(inference.generate(inference.parse_args(arguments)))


@pytest.mark.slow
def test_no_wrong_description_or_weight_is_sampled_from(good, tmp_path, capsys):
    state, path = checkpoint.load(good), tmp_path / "case.safetensors"
    cases = descriptions(state) + weights(state)
    assert len(cases) >= 580
    for case in cases:
        content = forge(path, case)
        message = refused(sample(path, tmp_path / "out.png"), capsys)
        assert path.name in message or "do not fit" in message
        assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == content


def test_what_a_fork_may_write_is_sampled_from(good, tmp_path):
    """The cases above are refused for what is wrong in them, and not because forging spoils a file."""
    state = checkpoint.load(good)
    for n, case in enumerate((state, altered(state, ("config", "mlp_ratio"), 4), {**state, "surprise": DEEP})):
        forge(tmp_path / f"{n}.safetensors", case)
        sample(tmp_path / f"{n}.safetensors", tmp_path / f"{n}.png")()
        assert (tmp_path / f"{n}.png").read_bytes() == (tmp_path / "0.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [RUN_FILE, WEIGHTS_FILE])
def test_damage_is_found_or_changes_nothing(good, tmp_path, name):
    """Of 60 files each. A byte that no reader looks at may be another: then all that is read is the same."""
    content = (good / name).read_bytes()
    state, path, found = checkpoint.load(good / name), tmp_path / name, 0
    for case in damaged(content, 60):
        path.write_bytes(case)
        try:
            read = checkpoint.load(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            found += 1
        else:
            assert_equal_states(read, state)
        assert path.read_bytes() == case
    assert found >= 55


def test_every_flipped_weight_is_found(good, tmp_path):
    """One bit in the middle of the tensors, where only a checksum can see it."""
    for name in (RUN_FILE, WEIGHTS_FILE):
        content = (good / name).read_bytes()
        weight = checkpoint.load(good)["ema"]["blocks.1.mlp.fc2.weight"].numpy().tobytes()
        at = content.index(weight)
        for bit in range(20):
            flipped = bytearray(content)
            flipped[at + 3 * bit] ^= 1 << (bit % 8)
            (tmp_path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match="its checksum is wrong"):
                checkpoint.load(tmp_path / name)


def test_harmful_files_do_nothing(good, tmp_path, capsys):
    """Neither where ours are expected nor as official weights. What no .pt may do is only to run something."""
    touched = tmp_path / "touched"
    files = harmful(tmp_path, touched, checkpoint.load(good))
    for name in sorted(files):
        for model in ([], ["--model", "DiT-S/2"]):
            arguments = ["--checkpoint", str(tmp_path / name), *model, "--output", str(tmp_path / "out.png")]
            refused(lambda arguments=arguments: inference.generate(inference.parse_args(arguments)), capsys)
    assert not touched.exists()
    assert {path.name for path in tmp_path.iterdir()} == files


def test_no_wrong_npz_is_measured(tmp_path, capsys, monkeypatch):
    images, path = np.zeros((30, 28, 28, 1), np.uint8), tmp_path / "case.npz"
    np.savez(path, arr_0=images)
    contents = damaged(path.read_bytes(), 12)  # the bytes of a zip's tables, and others that are checked
    for arrays in (
        dict(arr_0=images.astype(float)), dict(arr_0=images[:5]), dict(arr_0=images[..., 0, :]), dict(arr=images), {},
        dict(arr_0=np.array(3)), dict(arr_0=np.array([None, {}])), dict(arr_0=images, labels=np.arange(30)),
        dict(arr_0=images, labels=np.array(["a"] * 30)), dict(arr_0=images, labels=np.zeros(29)),
        dict(arr_0=images, labels=np.full(30, np.nan)), dict(arr_0=images, labels=np.array([{}] * 30)),
    ):
        np.savez(path, **arrays)
        contents.append(path.read_bytes())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        monkeypatch.setattr(dataset, "MEMORY_LIMIT", 10**8)
        shape = (300_000, 28, 28, 1)
        np.lib.format.write_array_header_1_0(member, dict(descr="|u1", fortran_order=False, shape=shape))
        for _ in range(3 * 784):
            member.write(bytes(10**5))
    contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        arguments = ["--npz", str(path), "--count", "20", "--output", str(tmp_path / "out.json")]
        refused(lambda arguments=arguments: evaluate.evaluate(evaluate.parse_args(arguments)), capsys)
        assert [file.name for file in tmp_path.iterdir()] == ["case.npz"] and path.read_bytes() == content


SETTINGS = (
    "model", "lr", "batch_size", "steps", "minutes", "ema_decay", "optimizer", "schedule", "learn_sigma", "warmup",
    "seed", "precision", "device", "guidance", "grad_accum_steps", "compile", "data_dir", "save_every", "min_snr",
)


def runs(state: dict) -> list[dict]:
    """Checkpoints of runs with something wrong in their settings, networks or optimizers."""
    rng, (momentum, adam) = random.Random(SEED), state["optimizers"].values()
    wrong = [-3, 1e99, [[]], ["a"], {"a": 1}, DEEP, 10**400, float("nan")]
    paths = [("settings", name) for name in SETTINGS]
    cases = [altered(state, path, value) for path in [*paths, ("script",), ("fingerprint",)]
             for value in rng.sample(wrong, 4)]
    cases += [altered(state, ("settings", name), value) for name in SETTINGS if name != "data_dir"  # which may be any
              for value in ("--lr", "x\ny", torch.zeros(1))]
    never_none = ("lr", "batch_size", "ema_decay", "optimizer", "schedule", "learn_sigma", "warmup", "seed",
                  "grad_accum_steps", "compile", "data_dir", "save_every", "label_dropout", "timestep_mean")
    cases += [altered(state, ("settings", name), None) for name in never_none]
    cases += [altered(state, ("settings", "guidance"), value) for value in (2.0, {}, [2.0, "a"], [1, 2, 3, 4], [1e9])]
    cases += [altered(state, ("settings", "image_size"), value) for value in (4096.0, "8", -8)]
    cases += [altered(state, ("settings",), value) for value in (None, [], {}, "lr", DEEP)]
    cases += [altered(state, ("model",), value) for value in (None, {}, [], {"a": torch.zeros(1)}, DEEP)]
    for name, value in (("pos_embed", float("nan")), ("blocks.0.attn.qkv.bias", float("inf"))):
        cases.append(altered(state, ("model", name), torch.full_like(state["model"][name], value)))
    cases += [altered(state, ("model", "pos_embed"), value) for value in (torch.zeros(1, 4, 20), torch.zeros(1).int())]
    cases += [altered(state, ("config", "num_heads"), 4.0), altered(state, ("diffusion", "schedule"), "linear")]
    cases += [altered(state, ("step",), value) for value in (-5, "4", 2**40)]
    cases += [without(state, name) for name in ("script", "settings", "model", "ema", "fingerprint", "optimizers")]
    optimizers = [
        None, [], {}, [1, 2], {"0": adam, "1": momentum}, {"0": adam}, {"0": momentum}, {"1": adam}, {"a": adam},
        {"0": momentum, "1": {}}, {"0": momentum, "1": DEEP}, {"0": {"0": {}}, "1": adam}, {"0": momentum, "2": adam},
        {"0": momentum, "1": {**adam, "999": adam["0"]}}, {"0": momentum, "1": {**adam, "-1": adam["0"]}},
        {"0": momentum, "1": {n: without(kept, "exp_avg_sq") for n, kept in adam.items()}},
        {"0": momentum, "1": {n: without(kept, "step") for n, kept in adam.items()}},
        {"0": momentum, "1": {n: kept | {"surprise": kept["step"]} for n, kept in adam.items()}},
        {"0": momentum, "1": {"0": adam["0"]["exp_avg"]}},
    ]
    cases += [{**state, "optimizers": value} for value in optimizers]
    for part in ("exp_avg", "step"):
        good = adam["0"][part]
        for value in (torch.zeros(3), torch.full_like(good, float("nan")), 1, None, [], torch.tensor(-1.0).long(),
                      good.int(), good.cfloat(), good[None], torch.zeros(0)):
            cases.append({**state, "optimizers": {"0": momentum, "1": altered(adam, ("0", part), value)}})
    cases.append(altered(state, ("optimizers", "1", "0", "exp_avg"), torch.tensor(0.5)))
    cases.append(altered(state, ("optimizers", "1", "0", "step"), adam["0"]["exp_avg"]))
    return cases


@pytest.fixture
def quick(monkeypatch):
    """The images of a folder are read without threads, which take long to begin, and nothing is downloaded."""
    monkeypatch.setattr("dataset.from_torchvision", lambda *_: dataset.bundled_digits())
    monkeypatch.setattr("folders.thread_map", lambda work, items, **_: [work(item) for item in items])


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_no_wrong_run_is_resumed(good, tmp_path, capsys):
    cases, path = runs(checkpoint.load(good)), tmp_path / RUN_FILE
    assert len(cases) >= 200
    for case in cases:
        content = forge(path, case)
        refused(lambda: train.main(["--resume", str(tmp_path), "--steps", "5", "--device", "cpu"]), capsys)
        assert {file.name for file in tmp_path.iterdir()} <= {RUN_FILE, ".lock"} and path.read_bytes() == content


@pytest.mark.usefixtures("quick")
def test_a_run_without_an_end_is_not_resumed_without_one(good, tmp_path, capsys):
    state = checkpoint.load(good)
    forge(tmp_path / RUN_FILE, {**state, "settings": state["settings"] | dict(steps=None, minutes=None)})
    assert "--steps" in refused(lambda: train.main(["--resume", str(tmp_path), "--device", "cpu"]), capsys)
    assert train.main(["--resume", str(tmp_path), "--device", "cpu", "--steps", "5"]) == 0


@pytest.mark.usefixtures("quick")
def test_a_setting_that_no_flag_has_is_named_in_one_line_and_left_out(good, tmp_path, capsys):
    """As of a run that another version began. Whatever its name is, it commands no terminal."""
    state = checkpoint.load(good)
    settings = {**state["settings"], "\x1b[2Jsurprise\n": 1, "a" * 10**5: 2}
    forge(tmp_path / RUN_FILE, {**state, "settings": settings})
    status, lines, _ = ends(lambda: train.main(["--resume", str(tmp_path), "--steps", "5", "--device", "cpu"]), capsys)
    [warning] = [line for line in lines if "warning: " in line]
    assert status == 0 and "train.py has no flags for these settings" in warning and "surprise" in warning
    assert len(warning) < 1000 and "\x1b" not in "".join(lines)
    assert settings.keys() - checkpoint.load(tmp_path)["settings"].keys() == {"\x1b[2Jsurprise\n", "a" * 10**5}


WATCHED = """
import atexit, runpy, sys, time
from pathlib import Path

def report():
    status = Path("/proc/self/status").read_text().split()
    print(time.process_time(), status[status.index("VmHWM:") + 1])

atexit.register(report)
sys.path.insert(0, str(Path(sys.argv[1]).parent))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [dict(hidden_size=10**7), dict(depth=10**6), dict(depth=256, hidden_size=4 * 10**6),
               dict(timesteps=10**9), dict(image_size=10**9), dict(mlp_ratio=1e12), dict(in_channels=10**12)]
)
def test_a_description_that_asks_for_the_moon_ends_at_once(good, tmp_path, change):
    """In a process of its own, which tells the time and the memory that it used."""
    state = checkpoint.load(good / WEIGHTS_FILE)
    part = "diffusion" if "timesteps" in change else "config"
    forge(tmp_path / "moon.safetensors", {**state, part: {**state[part], **change}})
    result = run_script("-c", WATCHED, ROOT / "inference.py", "--checkpoint", "moon.safetensors", cwd=tmp_path)
    seconds, memory = result.stdout.split()
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert float(seconds) < 10 and int(memory) < 2**20  # KiB


def distilled_runs(state: dict) -> list[dict]:
    """Checkpoints of runs of distill.py with something wrong in the teacher, the fake or its optimizers."""
    teacher, adam = state["teacher"], state["fake_optimizers"]["1"]
    cases = [altered(state, ("teacher",), value) for value in (None, {}, {"ema": {}}, [1], DEEP, state)]
    parts = ("config", "diffusion", "classes", "ema", "network")
    cases += [altered(state, ("teacher", name), DEEP) for name in parts]
    cases += [{**state, "teacher": without(teacher, name)} for name in (*checkpoint.TYPES, "ema")]
    cases += [altered(state, ("teacher", "config", "depth"), value) for value in (10**6, 1, 2.0)]
    cases += [altered(state, ("teacher", "classes"), ["a", "b", "c"]), altered(state, ("teacher", "makes"), "latents")]
    cases += [altered(state, ("teacher", "diffusion", "prediction"), "eps")]
    cases += [altered(state, ("teacher", "ema", "pos_embed"), value) for value in (torch.zeros(3), torch.ones(1).int())]
    cases += [altered(state, ("fake",), value) for value in ({}, None, teacher, teacher["ema"], DEEP)]
    cases += [altered(state, ("fake", "pos_embed"), torch.full((1, 4, 16), float("nan")))]
    cases += [altered(state, ("fake_optimizers",), value) for value in (DEEP, {}, {"0": adam}, {"1": adam}, {"0": {}})]
    cases += [altered(state, ("fake_optimizers", "1", "0", "step"), torch.zeros(7))]
    cases += [altered(state, ("settings", "checkpoint"), value) for value in (3, DEEP, None)]
    return cases + [without(state, lost) for lost in ("teacher", "fake", "settings", "ema", "optimizers")]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_no_wrong_distilled_run_is_resumed(good, images, tmp_path, capsys):
    arguments = [str(good), "--dataset", str(images), "--batch-size", "20", "--no-compile", "--device", "cpu"]
    assert distill.main([*arguments, "--steps", "4", "--run-dir", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / RUN_FILE
    cases = distilled_runs(checkpoint.load(path))
    capsys.readouterr()
    for case in cases:
        content = forge(path, case)
        refused(lambda: distill.main(["--resume", str(tmp_path / "run"), "--steps", "6", "--device", "cpu"]), capsys)
        assert path.read_bytes() == content


def test_a_distilled_run_is_not_resumed_by_train_and_the_other_way_round(good, tmp_path, capsys):
    """Each names the script that began the run."""
    state = checkpoint.load(good)
    forge(tmp_path / RUN_FILE, {**state, "script": "distill.py"})
    line = refused(lambda: train.main(["--resume", str(tmp_path), "--steps", "5"]), capsys)
    assert f"was begun by distill.py: continue it with python distill.py --resume {tmp_path}" in line
    line = refused(lambda: distill.main(["--resume", str(good), "--steps", "5"]), capsys)
    assert f"was begun by train.py: continue it with python train.py --resume {good}" in line
