"""Checkpoint files: written whole or not at all, and read without running anything that is in them.

    checkpoint.pt         everything that a run needs to go on, see run.py
    NAME.safetensors      the averaged weights alone, to publish, with their description as JSON in the metadata
    a state dict, .pt     weights of the official DiT, for which the user has to name the model

The first two describe themselves, see `describe`. Averaged weights, "ema" for short, are an exponential moving average
of the weights over the training steps (train.update_ema). They draw better samples than the last weights themselves.

A file may come from a stranger, or from a disk that fails. So `load` believes nothing that it has not checked: that no
bit has changed since the file was written, that every value of the description is one that `describe` could have
written, and that the weights are finite and as large as the description says.
"""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from diffusion import PREDICTIONS, SCHEDULES, Diffusion
from dit import MODELS, DiT, DiTConfig
from shortcut import SHORTCUTS

FORMAT = "dit-from-scratch 1"
MOST_STEPS = 2**31  # of a training, because there are so many numbers for its generators, see train.FIRST_INDEX
MOST_GUIDANCE = 100
LARGEST = 100_000  # of the numbers that describe a network, and of timesteps


class CheckpointError(Exception):
    """The file cannot be used. The message is one line that says why and names the fix."""


def describe(
    config: DiTConfig, diffusion: Diffusion, classes: tuple[str, ...], data: str, step: int, guidance: float,
    interval: tuple[int, int] | None = None,
) -> dict:
    """What a checkpoint says of itself, in plain types.

    classes are names, data says in words where the images came from, step counts the training, and guidance is the
    weight to draw with, where the user gives none, at the timesteps interval = (low, high).
    """
    return dict(
        format=FORMAT, config=asdict(config), diffusion=diffusion.config, classes=list(classes), data=data, step=step,
        guidance=guidance, interval=None if interval is None else list(interval),
    )


def whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def words(value: object) -> bool:
    return type(value) is str and len(value) <= 1000


def numbers(value: object) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return plain and value.is_floating_point()


# A test of each value that a file gives, and what the value should be. Types are looked at before all else, because a
# short file can hold lists that would take forever to compare or to print.
SHOULD_BE = {
    "config": (
        lambda v: type(v) is dict and all(type(v.get(f.name, f.default)) is f.type for f in fields(DiTConfig))
        and all(number <= LARGEST for number in v.values() if type(number) is int),
        "the numbers of a network",
    ),
    "diffusion": (
        lambda v: type(v) is dict and v.keys() == {"schedule", "prediction", "timesteps"}
        and v["schedule"] in SCHEDULES and v["prediction"] in PREDICTIONS and whole(v["timesteps"], 2, LARGEST),
        "a schedule, a prediction and a number of timesteps",
    ),
    "classes": (lambda v: type(v) in (list, tuple) and all(map(words, v)), "names"),
    "data": (words, "words"),
    "step": (lambda v: whole(v, 0, MOST_STEPS), f"a whole number from 0 to {MOST_STEPS}"),
    "guidance": (
        lambda v: type(v) in (int, float) and 0 <= v <= MOST_GUIDANCE, f"a number from 0 to {MOST_GUIDANCE}"
    ),
    "interval": (
        lambda v: v is None or type(v) in (list, tuple) and len(v) == 2
        and whole(v[0], 0, LARGEST) and whole(v[1], v[0], LARGEST),
        "two timesteps, the lower one first",
    ),
    "ema": (
        lambda v: isinstance(v, dict) and all(words(name) and numbers(value) for name, value in v.items()),
        "weights with their names",
    ),
}


def check(state: dict) -> None:
    """Look at all that a file says of its weights, and at these, before anything is made of them.

    A file need not say everything; `build` will ask for what is missing. Raises CheckpointError.
    """
    if type(state) is not dict:
        raise CheckpointError("it is no description: use a checkpoint as train.py wrote it")
    for name, (test, expected) in SHOULD_BE.items():
        if name in state and not test(state[name]):
            raise CheckpointError(f"its {name} should be {expected}: use a checkpoint as train.py wrote it")
    if state.keys() >= {"config", "diffusion", "ema"}:
        try:
            check_fit(DiTConfig(**state["config"]), state)
        except (TypeError, ValueError, OverflowError) as error:
            message = f"the weights do not fit the network that it describes ({error})"
            raise CheckpointError(f"{message}: use a checkpoint as train.py wrote it") from error


def check_fit(config: DiTConfig, state: dict) -> None:
    """Raises ValueError unless the parts of a description fit to each other and to the weights, which are finite.

    The sizes of the largest weights are compared before a network is built, which could need all memory. Its others are
    not much larger than these in sum, and are compared when it is there.
    """
    weights, T = state["ema"], state["diffusion"]["timesteps"]
    D, P, hidden = config.hidden_size, config.patch_size, int(config.hidden_size * config.mlp_ratio)
    sizes = {
        "x_embedder.proj.weight": (D, config.in_channels, P, P),
        "pos_embed": (1, (config.image_size // P) ** 2, D),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, D),
    }
    for i in range(min(config.depth, len(weights))):
        sizes |= {f"blocks.{i}.adaLN_modulation.1.weight": (6 * D, D), f"blocks.{i}.mlp.fc1.weight": (hidden, D)}
    for name, size in sizes.items():
        if name not in weights or weights[name].shape != size:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise ValueError(f"{name} is {found}, not {size}")
    if config.depth > len(weights):
        raise ValueError(f"depth is {config.depth}, and there are {len(weights)} weights")
    if "classes" in state and len(state["classes"]) != config.num_classes:
        raise ValueError(f"it names {len(state['classes'])} classes and has {config.num_classes}")
    if max(state.get("interval") or (0,)) >= T or (config.shortcut and 2 * max(SHORTCUTS) > T):
        raise ValueError(f"{T} timesteps are too few")
    memory = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
    if sum(value.nbytes for value in weights.values()) > sum(memory.values()):
        raise ValueError("they are larger than the file")
    bad = [name for name, value in weights.items() if not value.float().isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]} holds numbers that are not finite")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a disk that is full or may not be written is an OSError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save tells of it by a RuntimeError, which it raises while it handles the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file by write(file). A file that was there stays until the new one is complete and on the disk.

    Raises OSError.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def save(path: Path, state: dict) -> None:
    """Write a checkpoint.pt."""
    write_whole(path, lambda file: torch.save(state, file))


def save_weights(path: Path, weights: dict, description: dict) -> None:
    """Write weights (names to tensors) and their description as safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    about = json.dumps(description)
    content = serialize(weights, metadata={"description": about, "checksum": checksum(about, weights)})
    write_whole(path, lambda file: file.write(content))


def checksum(description: str, weights: dict) -> str:
    """The SHA-256 of weights (names to tensors) and their description, in hexadecimal digits."""
    digest = hashlib.sha256(description.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict:
    """The description and weights of a safetensors file. Raises ValueError where their checksum is another."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = about.get("description", "{}")
    if "checksum" in about and about["checksum"] != checksum(description, weights):  # earlier versions wrote none
        raise ValueError("its checksum is wrong, so it is not what was written")
    return {**json.loads(description), "ema": weights}


def read_pickle(path: Path) -> dict:
    """What a .pt file holds: tensors and plain types. Raises any exception where it is broken, or holds more."""
    if zipfile.is_zipfile(path):  # as all are that torch.save has written since 2020
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is larger unpacked than packed, and torch.save packs nothing")
            damaged = archive.testzip()  # compares each part with its checksum, which torch.load does not
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong, so it is not what was written")
    with warnings.catch_warnings(action="ignore"):  # of files that are not ours
        # With weights_only, a pickle of more than tensors and plain types is refused, and nothing in it is run.
        return torch.load(path, map_location="cpu", weights_only=True)


def load(path: Path, model: str | None = None) -> dict:
    """Read a checkpoint onto the CPU: its description, the averaged weights as "ema", and whatever else it holds.

    path:  a file as above, or the folder of a run
    model: for official weights, one of MODELS, such as DiT-XL/2, because they do not name their own

    Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: give a .pt or .safetensors file, or the folder of a run")
    try:
        state = (read_safetensors if path.suffix == ".safetensors" else read_pickle)(path)
    except Exception as error:  # a broken file can provoke any exception in either library
        reason = " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors; nothing in it was run ({reason}): "
            "use a checkpoint of train.py, a .safetensors file or a plain state dict"
        ) from error
    if model is not None:
        state = {**describe_official(path, state, model), "ema": state}
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not str or found != FORMAT:
        kind = f"of format {found[:40]!r}" if type(found) is str else "the file of another program"
        raise CheckpointError(
            f"{path} is {kind}, not {FORMAT!r}: "
            "make a new one with train.py; for official DiT weights add --model DiT-XL/2"
        )
    try:
        check(state)
        if "teacher" in state:
            check(state["teacher"])
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return state


def describe_official(path: Path, state: dict, model: str) -> dict:
    """The description of official weights of a model of MODELS. Image size and channels follow from their shapes."""
    if model not in MODELS:
        raise CheckpointError(f"unknown model {model!r}: use one of {', '.join(MODELS)}")
    try:
        side = round(state["pos_embed"].shape[1] ** 0.5)
        in_channels = state["x_embedder.proj.weight"].shape[1]
        out_channels = state["final_layer.linear.bias"].shape[0] // MODELS[model]["patch_size"] ** 2
        num_classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        config = DiTConfig(
            **MODELS[model], image_size=side * MODELS[model]["patch_size"], in_channels=in_channels,
            num_classes=num_classes, learn_sigma=out_channels == 2 * in_channels,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} holds no weights of the official {model}: leave --model out for files of train.py, which name it"
        ) from error
    classes = tuple(str(label) for label in range(num_classes))
    return describe(config, Diffusion("linear", "eps", 1000), classes, "official weights", 0, guidance=4.0)


def build(state: dict, device: torch.device | str = "cpu") -> tuple[DiT, Diffusion, dict]:
    """A loaded checkpoint as (network with the averaged weights, diffusion, description). Raises CheckpointError."""
    check(state)
    try:
        model = DiT(DiTConfig(**state["config"]))
        model.load_state_dict(state["ema"])
        diffusion = Diffusion(**state["diffusion"], device=device)
        about = {name: state[name] for name in ("classes", "data", "step", "guidance")}
        description = describe(model.config, diffusion, **about, interval=state.get("interval"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        message = f"the weights do not fit the network that the checkpoint describes ({reason})"
        raise CheckpointError(f"{message}: use a checkpoint as train.py wrote it") from error
    return model.to(device).eval(), diffusion, description
