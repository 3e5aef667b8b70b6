"""Checkpoint files: written whole or not at all, and read without running anything that is in them.

    checkpoint.pt         everything that a run needs to be resumed, see run.py
    NAME.safetensors      only the averaged weights, to publish, with their description as JSON in the metadata
    a state dict, .pt     weights of the official DiT, for which the user has to name the model

The first two describe themselves, see `describe`. Averaged weights, "ema", are an exponential moving average of the
weights over the training steps (optim.update_ema). They give better samples than the last weights themselves.

A file may come from a stranger, or from a disk that fails. These mechanisms make it safe to read:

    torch.load(weights_only=True) and safetensors    hold tensors and plain types; no code is run
    checksums                                        find each bit that has changed since the file was written
    `check_pickle`, MAX_HEADER                       a short file does not become much in memory
    `check`                                          compares the description with the weights before a network is built
"""

import hashlib
import json
import os
import pickletools
import re
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

from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig
from variance import LearnedVariance

FORMAT = "dit-from-scratch 1"
MAX_STEPS = 2**31  # of a training, because there are so many numbers for its generators, see train.FIRST_INDEX
MAX_GUIDANCE = 100
MAX_TIMESTEPS = 100_000
MAX_DEPTH = 256             # blocks take a while to build, even without memory
MAX_IMAGE_SIZE = 4096
MAX_OPERATIONS = 500_000    # of a pickle, and its parts; a distilled DiT-XL in training takes 74,000
MAX_NESTING = 1000          # of its values; a list counts once more for each thousand of its items
CALLED = re.compile(r"torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|collections OrderedDict")
MAX_HEADER = 2**22          # bytes of a safetensors file before its weights; names and numbers take some 100 a tensor


class CheckpointError(Exception):
    """The file cannot be used. The message is one line that says why and names the fix."""


@contextmanager
def refusing(message: str, fix: str = "use a checkpoint as train.py wrote it") -> Iterator[None]:
    """Inside, whatever goes wrong with the content of a file is a CheckpointError: "MESSAGE (reason): FIX"."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # broken content can provoke any exception in PyTorch, safetensors and here
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{message} ({reason}): {fix}") from error


def describe(
    network: type[DiT], config: DiTConfig, diffusion: Diffusion, classes: tuple[str, ...], data: str, step: int,
    guidance: float, guidance_interval: list[int] | None = None,
) -> dict:
    """What a checkpoint says of itself, in plain types.

    network:  the class of the network
    classes:  the names of the classes
    data:     where the training images came from, in words
    step:     how many training steps were taken
    guidance: the default guidance scale of sampling, at the timesteps guidance_interval = [low, high] (None: at all)
    """
    return dict(
        format=FORMAT, network=network.__name__, config=asdict(config), diffusion=diffusion.config,
        classes=list(classes), data=data, step=step, guidance=float(guidance), guidance_interval=guidance_interval,
    )


# The types of a description's values. They are compared first, because a short file can hold lists that would take
# forever to compare or to print.
TYPES = dict(
    network=str, config=dict, diffusion=dict, classes=list, data=str, step=int, guidance=float,
    guidance_interval=(list, type(None)), ema=dict,
)


def check(state: dict, network: type[DiT] = DiT) -> None:
    """Raise some exception unless a description is one that `describe` could have made of weights `ema` like these.

    The sizes of the largest weights are compared before a network is built, which could need all memory. Its others are
    not much larger than these in sum, and are compared when it is there, by strict loading.
    """
    for name, kind in TYPES.items():
        if name not in state or not isinstance(state[name], kind):
            raise TypeError(f"its {name} is missing, or of another type")
    if state["network"] != network.__name__:
        raise ValueError(f"it holds a {state['network'][:40]}, not a {network.__name__}")
    if any(type(state["config"][field.name]) is not field.type for field in fields(DiTConfig)):
        raise TypeError("its config is of other types")
    if any(type(value) not in (int, str) for value in state["diffusion"].values()):
        raise TypeError("its diffusion is of other types")
    config, weights = DiTConfig(**state["config"]), state["ema"]
    if len(weights) < config.depth or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("its weights are not as many tensors as the network has")
    T, interval = state["diffusion"]["timesteps"], state["guidance_interval"] or [0, 0]
    ranges = [(0, state["step"], MAX_STEPS), (0, state["guidance"], MAX_GUIDANCE), (2, T, MAX_TIMESTEPS)]
    ranges += [(1, config.depth, MAX_DEPTH), (1, config.image_size, MAX_IMAGE_SIZE)]
    low, high = interval
    ranges += [(0, low, high), (low, high, T - 1)]
    if not all(least <= value <= most for least, value, most in ranges):
        raise ValueError("its step, guidance, guidance_interval, timesteps, depth or image_size is out of range")
    if type(low) is not int or type(high) is not int or len(state["data"]) > 1000:
        raise ValueError("its guidance_interval or data is not as described")
    if len(state["classes"]) != config.num_classes or not all(type(name) is str for name in state["classes"]):
        raise ValueError(f"its classes are not {config.num_classes} names")

    check_weights(config, weights)


def check_weights(config: DiTConfig, weights: dict[str, Tensor]) -> None:
    """Raise some exception unless weights are finite, and as large as the config says."""
    D, P, hidden = config.hidden_size, config.patch_size, int(config.hidden_size * config.mlp_ratio)
    largest = {
        "pos_embed": (1, (config.image_size // P) ** 2, D), "x_embedder.proj.weight": (D, config.in_channels, P, P),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, D),
    }
    for i in range(config.depth):
        largest |= {f"blocks.{i}.attn.qkv.weight": (3 * D, D), f"blocks.{i}.mlp.fc1.weight": (hidden, D)}
    for name, shape in largest.items():
        if name not in weights or weights[name].shape != shape:
            raise ValueError(f"{name} is not of the shape {shape} that its config says")
    memory = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
    if sum(value.nbytes for value in weights.values()) > sum(memory.values()):
        raise ValueError("its weights are larger than the file")  # many numbers that are the same place in memory
    for name, value in weights.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


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
    text = json.dumps(description)
    content = serialize(weights, metadata={"description": text, "checksum": checksum(text, weights)})
    write_whole(path, lambda file: file.write(content))


def checksum(description: str, weights: dict) -> str:
    """The SHA-256 of weights (names to tensors) and their description, in hexadecimal digits."""
    digest = hashlib.sha256(description.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict:
    """The description and weights of a safetensors file, or only its weights. Raises ValueError where it is damaged."""
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError("its header is too long")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "description" not in metadata:
        return weights
    if metadata.get("checksum") != checksum(metadata["description"], weights):
        raise ValueError("its checksum is wrong, so it is not what was written")
    return {**json.loads(metadata["description"]), "ema": weights}


def check_pickle(content: bytes) -> None:
    """Raise some exception unless a pickle is short and calls only what is CALLED for tensors.

    weights_only allows more, such as bytearray(10**10), which fills the memory, or forty pairs, each of which holds the
    one before twice, which take forever as a key. So this follows the unpickler's stack. In place of each value it has
    the number of its parts, where what is held twice counts twice, and how deep they are nested.
    """
    stack, memo = [], {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name == "GLOBAL" and not CALLED.fullmatch(argument):
            raise ValueError(f"it holds {argument[:100]!r}")
        if "PUT" in operation.name:
            memo[argument] = stack[-1]
        elif "GET" in operation.name:
            stack.append(memo[argument])
        elif operation.name == "MARK":
            stack.append(None)
        else:
            taken, values = len(operation.stack_before), []
            if pickletools.stackslice in operation.stack_before:  # all values after a mark
                taken -= 2
                while stack[-1] is not None:
                    values.append(stack.pop())
                stack.pop()
            values += [stack.pop() for _ in range(taken)]
            parts, depth = 1 + sum(n for n, _ in values), 1 + max((d for _, d in values), default=0)
            if max(count, parts) > MAX_OPERATIONS or depth > MAX_NESTING:
                raise ValueError("it has too many parts")
            stack += [(parts, depth)] * len(operation.stack_after)


def read_pickle(path: Path) -> dict:
    """What a .pt file holds: tensors and plain types. Raises any exception where it is broken, or holds more."""
    with zipfile.ZipFile(path) as archive:  # as all are that torch.save has written since 2020
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is larger unpacked than packed, and torch.save packs nothing")
        damaged = archive.testzip()  # compares each part with its checksum, which torch.load does not
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong, so it is not what was written")
        [pickle] = (name for name in archive.namelist() if name.lower().endswith("data.pkl"))
        check_pickle(archive.read(pickle))
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
    fix = "use a checkpoint of train.py, a .safetensors file or a plain state dict"
    with refusing(f"{path} is damaged, or holds more than tensors; nothing in it was run", fix):
        state = (read_safetensors if path.suffix == ".safetensors" else read_pickle)(path)
    if model is not None:
        return describe_official(path, state, model)
    if not isinstance(state, dict) or type(state.get("format")) is not str or state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} is not of format {FORMAT!r}: "
            "make a new one with train.py; for official DiT weights add --model DiT-XL/2"
        )
    return state


def describe_official(path: Path, state: dict, model: str) -> dict:
    """Official weights of a model of MODELS with their description. Image size and channels follow from their shapes.

    They may be inside of {"model": ..., "ema": ...}, as training saves them, and have prefixes from compiling or DDP.
    """
    if model not in MODELS:
        raise CheckpointError(f"unknown model {model!r}: use one of {', '.join(MODELS)}")
    patch_size = MODELS[model]["patch_size"]
    with refusing(f"{path} holds no weights of the official {model}", "leave --model out for files of train.py"):
        state = state.get("ema", state.get("model", state))
        state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}
        side = round(state["pos_embed"].shape[1] ** 0.5)
        in_channels = state["x_embedder.proj.weight"].shape[1]
        out_channels = state["final_layer.linear.bias"].shape[0] // patch_size**2
        num_classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        config = DiTConfig(
            **MODELS[model], image_size=side * patch_size, in_channels=in_channels, num_classes=num_classes,
            learn_sigma=out_channels == 2 * in_channels,
        )
    classes = tuple(str(label) for label in range(num_classes))
    about = describe(DiT, config, Diffusion("linear", "eps", 1000), classes, "official weights", 0, guidance=4.0)
    return {**about, "ema": state}


def build(
    state: dict, device: torch.device | str = "cpu", network: type[DiT] = DiT
) -> tuple[DiT, Diffusion, dict]:
    """A loaded checkpoint as (network with the averaged weights, diffusion, description). Raises CheckpointError."""
    with refusing("the weights do not fit the network that the checkpoint describes"):
        check(state, network)
        model = network(DiTConfig(**state["config"]))
        model.load_state_dict(state["ema"])
        process = LearnedVariance if model.config.learn_sigma else Diffusion
        diffusion = process(**state["diffusion"], device=device)
    description = {name: state[name] for name in ("format", *TYPES) if name != "ema"}
    return model.to(device).eval(), diffusion, description
