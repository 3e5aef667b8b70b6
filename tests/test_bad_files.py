"""Claims about files that are damaged, made by a stranger, or made to do harm: each ends in one line, soon, and changes
nothing."""

import copy
import io
import pickle
import random
import resource
import time
import zipfile

import numpy as np
import pytest
import torch

import checkpoint
import cli
import dataset
import distill
import dit
import evaluate
import inference
import train
from checkpoint import CheckpointError
from conftest import ROOT, TINY, run_script
from distill import ShortcutDiT
from dit import DiTConfig
from test_checkpoint import Malicious

SEED = 11
pytestmark = pytest.mark.usefixtures("tiny_network")
BILLION = ["ha"]  # a list of lists of lists that hold each other: some bytes in a file, 10^30 words when it is printed
for _ in range(30):
    BILLION = [BILLION] * 10
WRONG = [
    "four", "", -1, 0, 10**7, 10**12, 10**30, 1.5, float("nan"), float("inf"), None, True, [], [1], {}, {"a": 1},
    BILLION,
]
# What can be, of these.
FINE = {"data": ["four", ""], "step": [0, 10**7, True], "guidance": [1.5], "guidance_interval": [None, []]}


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
    state[path[0]] = altered(state[path[0]], path[1:], value) if path[1:] else value
    return state


def descriptions(state: dict) -> list[dict]:
    """Checkpoints that say something wrong, or lack something."""
    cases = []
    paths = [(name,) for name in ("network", "config", "diffusion", "classes", "data", "step", "guidance", "ema")]
    paths += [("guidance_interval",)]
    paths += [(part, name) for part in ("config", "diffusion") for name in state[part]]
    for path in paths:
        fine = FINE.get(path[0], [])
        cases += [altered(state, path, value) for value in WRONG if not any(value is f or value == f for f in fine)]
    cases += [{name: value for name, value in state.items() if name != path[0]} for path in paths]
    return cases


def weights(state: dict) -> list[dict]:
    """Checkpoints whose weights are of other kinds, sizes or numbers."""
    name, cases = "blocks.0.mlp.fc1.weight", []
    good = state["ema"][name]
    for number in (float("nan"), float("inf"), -float("inf")):
        cases.append(altered(state, ("ema", name), good.clone().index_fill_(0, torch.tensor(3), number)))
    for tensor in (good[:5], good.int(), good.to_sparse(), good.to("meta"), good.cfloat(), good[0], "four", BILLION):
        cases.append(altered(state, ("ema", name), tensor))
    cases.append({**state, "ema": {n: t for n, t in state["ema"].items() if n != name}})
    cases.append({**state, "ema": {**state["ema"], "surprise": good}})
    for size in (10**4, 10**5):  # one number, seen as many: the network would need 100 GB and more
        D = 4 * size
        config = {**state["config"], "hidden_size": D, "depth": 1}
        shapes = {n: t.shape for n, t in state["ema"].items() if "blocks.1" not in n}
        shapes = {n: [m * D // 16 if m % 16 == 0 else m for m in shape] for n, shape in shapes.items()}
        swollen = {n: torch.zeros(1).expand(shape) for n, shape in shapes.items()}
        cases.append({**state, "config": config, "ema": swollen})
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


def with_pickle(content: bytes) -> bytes:
    """A file as torch.save writes it, but with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bytes_of({}))) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


def harmful(touched) -> dict[str, bytes]:
    """Files that would run a command, or fill the memory."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(400):
                member.write(bytes(2**20))
    return {
        # {((..., ...), (..., ...)): 1}, which would be hashed for years, and {((((...),),),): 1}, by recursion
        "pairs.pt": with_pickle(b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."),
        "tuples.pt": with_pickle(b"\x80\x02})" + b"\x85" * 400_000 + b"K\x01s."),
        "code.pt": bytes_of({"format": checkpoint.FORMAT, "step": Malicious(touched)}),
        "code-teacher.pt": bytes_of({"format": checkpoint.FORMAT, "teacher": Malicious(touched)}),
        "pickle.pt": pickle.dumps(Malicious(touched)),
        "bomb.pt": bomb.getvalue(),
        "nested.pt": b"\x80\x02" + b"(" * 10**6 + b".",
        "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "long.safetensors": (10**8).to_bytes(8, "little") + b"{}",
        "deep.safetensors": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    }


def ends(work, capsys) -> tuple[int | None, list[str], float]:
    """The exit status of a script, what it printed on stderr, and its seconds."""
    begin = time.perf_counter()
    with pytest.raises(SystemExit) as caught:
        cli.run_script(work)
    return caught.value.code, capsys.readouterr().err.splitlines(), time.perf_counter() - begin


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
    state, count = checkpoint.load(good), 0
    for case in descriptions(state) + weights(state):
        torch.save(case, tmp_path / "case.pt")
        content = (tmp_path / "case.pt").read_bytes()
        message = refused(sample(tmp_path / "case.pt", tmp_path / "out.png"), capsys)
        assert "case.pt" in message or "do not fit" in message
        assert [path.name for path in tmp_path.iterdir()] == ["case.pt"]
        assert content == (tmp_path / "case.pt").read_bytes()
        count += 1
    assert count >= 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors"])
def test_damage_is_found_or_changes_nothing(good, tmp_path, name, capsys):
    """Of 60 files each. A byte that no reader looks at may be another: then the picture is the same."""
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
            assert {n: v for n, v in read.items() if n not in ("ema", "model", "optimizers")} == {
                n: v for n, v in state.items() if n not in ("ema", "model", "optimizers")
            }
            assert all(torch.equal(value, state["ema"][n]) for n, value in read["ema"].items())
        assert path.read_bytes() == case
    assert found >= 55


def test_every_flipped_weight_is_found(good, tmp_path):
    """One bit in the middle of the tensors, where only a checksum can see it."""
    for name in ("checkpoint.pt", "weights.safetensors"):
        content = (good / name).read_bytes()
        weight = checkpoint.load(good)["ema"]["blocks.1.mlp.fc2.weight"].numpy().tobytes()
        at = content.index(weight)
        for bit in range(20):
            flipped = bytearray(content)
            flipped[at + 3 * bit] ^= 1 << (bit % 8)
            (tmp_path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match="checksum of|its checksum is wrong"):
                checkpoint.load(tmp_path / name)


def test_harmful_files_do_nothing(tmp_path, capsys):
    touched, files = tmp_path / "touched", harmful(tmp_path / "touched")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for model in ([], ["--model", "DiT-S/2"]):
            arguments = ["--checkpoint", str(tmp_path / name), *model, "--output", str(tmp_path / "out.png")]
            refused(lambda arguments=arguments: inference.generate(inference.parse_args(arguments)), capsys)
    assert not touched.exists()
    assert {path.name for path in tmp_path.iterdir()} == set(files)


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


SETTINGS = [
    ("args", "model"), ("args", "lr"), ("args", "batch_size"), ("args", "steps"), ("args", "ema_decay"),
    ("args", "optimizer"), ("args", "schedule"), ("args", "learn_sigma"), ("args", "warmup"), ("args", "seed"),
    ("args", "precision"), ("args", "device"), ("args", "guidance"), ("args", "grad_accum_steps"), ("args", "surprise"),
    ("args", "compile"), ("args", "data_dir"), ("script",), ("fingerprint",),
]


@pytest.mark.slow
def test_no_wrong_run_is_resumed(good, tmp_path, capsys):
    state, rng = checkpoint.load(good), random.Random(SEED)
    momentum, adam = state["optimizers"]
    first = next(iter(adam["state"]))
    wrong = [-3, 1e99, [[]], ["a"], {"a": 1}, BILLION, 10**400, float("nan")]
    cases = [altered(state, path, value) for path in SETTINGS for value in rng.sample(wrong, 4)]
    text = [path for path in SETTINGS if path != ("args", "data_dir")]  # which may have any name
    cases += [altered(state, path, value) for path in text for value in ("--lr", "x\ny")]
    cases += [altered(state, ("args", "guidance"), value) for value in (2.0, {}, [2.0, "a"])]
    cases += [altered(state, ("args", "image_size"), value) for value in (4096.0, "8", -8)]
    cases += [altered(state, ("args",), value) for value in (None, [], {}, "lr", BILLION)]
    cases += [altered(state, ("model",), value) for value in (None, {}, [], {"a": torch.zeros(1)}, BILLION)]
    cases += [altered(state, ("optimizers",), value) for value in (None, [], {}, [1, 2], [adam, momentum], [adam],
              [{}, {}], [momentum, {**adam, "state": {}}], [momentum, {**adam, "state": BILLION}])]
    for part in ("exp_avg", "step"):
        for value in (torch.zeros(3), torch.full_like(adam["state"][first][part], float("nan")), 1, None):
            junk = altered(adam, ("state", first, part), value)
            cases.append({**state, "optimizers": [momentum, junk]})
    cases += [altered(state, ("config", "num_heads"), 4), altered(state, ("diffusion", "schedule"), "linear")]
    cases += [altered(state, ("step",), value) for value in (-5, "4", 2**40)]
    for case in cases:
        torch.save(case, tmp_path / "checkpoint.pt")
        content = (tmp_path / "checkpoint.pt").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("folders.thread_map", lambda work, items, **_: [work(item) for item in items])
            refused(lambda: train.main(["--resume", str(tmp_path), "--steps", "5", "--device", "cpu"]), capsys)
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint.pt", ".lock"}
        assert content == (tmp_path / "checkpoint.pt").read_bytes()
    assert len(cases) >= 130


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
    "change", [dict(hidden_size=10**7), dict(depth=10**6), dict(timesteps=10**9), dict(image_size=10**9)]
)
def test_a_description_that_asks_for_the_moon_ends_at_once(good, tmp_path, change):
    """In a process of its own, which tells the time and the memory that it used."""
    state = checkpoint.load(good)
    part = "diffusion" if "timesteps" in change else "config"
    torch.save({**state, part: {**state[part], **change}}, tmp_path / "moon.pt")
    result = run_script("-c", WATCHED, ROOT / "inference.py", "--checkpoint", "moon.pt", cwd=tmp_path)
    seconds, memory = result.stdout.split()
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert float(seconds) < 10 and int(memory) < 2**20  # KiB


def test_a_whole_network_is_not_much_larger_than_the_weights_that_are_compared_first():
    for name, shape in dit.MODELS.items():
        if name.startswith("DiT-XL") or name.startswith("DiT-L"):
            continue
        with torch.device("meta"):
            config = DiTConfig(**shape, image_size=56, learn_sigma=True)
            model = ShortcutDiT(config).state_dict()
        compared = [n for n in model if n.endswith(("attn.qkv.weight", "fc1.weight", "x_embedder.proj.weight"))]
        assert sum(t.numel() for t in model.values()) < 8 * sum(model[n].numel() for n in compared)


@pytest.mark.slow
def test_no_wrong_distilled_run_is_resumed(good, images, tmp_path, capsys):
    arguments = [str(good), "--dataset", str(images), "--batch-size", "20", "--no-compile", "--device", "cpu"]
    assert distill.main([*arguments, "--steps", "2", "--run-dir", str(tmp_path / "run")]) == 0
    state, path = checkpoint.load(tmp_path / "run"), tmp_path / "run" / "checkpoint.pt"
    teacher = state["teacher"]
    cases = [altered(state, ("teacher",), value) for value in (None, {}, {"ema": {}}, [1], BILLION, dict(state))]
    parts = ("config", "diffusion", "classes", "ema", "network")
    cases += [altered(state, ("teacher", name), BILLION) for name in parts]
    cases += [altered(state, ("teacher", "config", "depth"), 10**6), altered(state, ("fake",), {})]
    cases += [altered(state, ("fake",), teacher), altered(state, ("fake_optimizers",), BILLION)]
    cases += [altered(state, ("args", "checkpoint"), value) for value in (3, BILLION)]
    cases += [{name: value for name, value in state.items() if name != lost} for lost in ("teacher", "fake", "args")]
    capsys.readouterr()
    for case in cases:
        torch.save(case, path)
        content = path.read_bytes()
        refused(lambda: distill.main(["--resume", str(tmp_path / "run"), "--steps", "4", "--device", "cpu"]), capsys)
        assert path.read_bytes() == content
    refused(lambda: train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]), capsys)
