"""Checkpoint files: written whole or not at all, and read without running anything that is in them.

    RUN/checkpoint.safetensors    everything that is needed to resume a run, see rundir.py
    NAME.safetensors              only the averaged weights, to publish
    a state dict, .pt             weights of the official DiT, for which the user has to name the model

Our files are safetensors: tensors, and a description as JSON in the header, see `describe`. Averaged weights, "ema",
are an exponential moving average of the weights over the training steps (optim.update_ema). They give better samples
than the last weights themselves.

A file may come from a stranger, or from a disk that fails. These mechanisms make it safe to read:

    safetensors                  holds tensors and text, and takes no more memory than the file; no code is run
    a checksum                   finds each bit that has changed since the file was written
    `check`, `check_weights`     compare the description with the weights before a network is built
    torch.load(weights_only)     reads official weights; it runs no code either, but a harmful .pt may fill the memory
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig
from sampling import MAX_GUIDANCE, TrainedModel
from shortcut import ShortcutDiT, ShortcutModel
from speed import out_of_memory
from variance import LearnedVariance

FORMAT = "dit-from-scratch 2"
NETWORKS = {"DiT": (DiT, TrainedModel), "ShortcutDiT": (ShortcutDiT, ShortcutModel)}  # a class of your own goes here
ASSETS = Path(__file__).parent / "assets"
BUNDLED_WEIGHTS = ASSETS / "dit-mnist.safetensors"
DISTILLED_WEIGHTS = ASSETS / "dit-mnist-fast.safetensors"
RUNS = Path("runs")
RUN_FILE, WEIGHTS_FILE = "checkpoint.safetensors", "weights.safetensors"  # of a run's folder
MAX_STEPS = 2**31     # of a training, because there are so many numbers for its generators, see train.FIRST_INDEX
MAX_TIMESTEPS = 100_000
MAX_DEPTH = 256       # blocks take a while to build, even without memory
MAX_NUMBERS = 2**24   # of positions and weights that a description implies, unless the file itself is larger
MAX_HEADER = 2**22    # bytes of a file before its weights; names and numbers take some 100 a tensor


class CheckpointError(Exception):
    """The file cannot be used. The message is one line that says why and names the fix."""

    exit_status = 2


@contextmanager
def refusing(message: str, fix: str = "use a checkpoint as train.py wrote it") -> Iterator[None]:
    """Inside, whatever is wrong with the content of a file is a CheckpointError: "MESSAGE (reason): FIX"."""
    try:
        yield
    except (PermissionError, torch.AcceleratorError):  # not of the content
        raise
    except Exception as error:  # broken content can provoke any exception in PyTorch, safetensors and here
        if hasattr(error, "exit_status") or out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{message} ({reason}): {fix}") from error


# -------------------------------------------------------------------------------------------------------------- writing


def describe(
    network: type[DiT], config: DiTConfig, diffusion: Diffusion, classes: tuple[str, ...], data: str, step: int,
    guidance: float, guidance_interval: list[int] | None = None, null_class: bool = True, makes: str = "images",
) -> dict:
    """What a checkpoint says of itself, in plain types.

    network:  the class of the network, one of NETWORKS
    classes:  the names of the classes
    data:     where the training images came from, in words
    step:     how many training steps were taken
    guidance: the default guidance scale of sampling, at the timesteps guidance_interval = [low, high] (None: at all)
    null_class: whether the null class was trained, by dropping labels, as guidance needs
    makes:    images, or latents that a separate decoder turns into images
    """
    return dict(
        format=FORMAT, network=network.__name__, config=asdict(config), diffusion=diffusion.config, makes=makes,
        classes=list(classes), data=data, step=step, guidance=float(guidance), guidance_interval=guidance_interval,
        null_class=null_class,
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a disk that is full or may not be written is an OSError that names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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


def save(path: Path, description: dict, tensors: dict) -> None:
    """Write tensors, by name, and what describes them, in plain types.

    The tensors may be nested, as in dict(ema=state_dict, optimizers={"0": ...}): then their names are paths, such as
    ema/blocks.0.attn.qkv.weight. `load` nests them again.
    """
    tensors, text = dict(flatten(tensors)), json.dumps(description)
    # In one entry, since the order of several is not always the same, and so the bytes of the file would not be.
    content = serialize(tensors, metadata={"description": f"{checksum(text, tensors)} {text}"})
    write_whole(path, lambda file: file.write(content))


def flatten(tree: dict, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, with their paths as names, as copies on the CPU."""
    for name, value in tree.items():
        if isinstance(value, Tensor):  # copies, because safetensors takes no two that share memory
            yield path + name, value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        else:
            yield from flatten(value, f"{path}{name}/")


def checksum(description: str, tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of tensors and their description, in hexadecimal digits."""
    digest = hashlib.sha256(description.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


def load(path: Path, model: str | None = None) -> dict:
    """Read a checkpoint onto the CPU: its description, the averaged weights as "ema", and whatever else it holds.

    path:  a file as above, or the folder of a run
    model: for official weights, one of MODELS, such as DiT-XL/2, because they do not name their own; for other files it
           is not needed, and must be what they hold

    Raises CheckpointError.
    """
    path, state = Path(path), None
    if model is not None and model not in MODELS:
        raise CheckpointError(f"unknown model {model!r}: use one of {', '.join(MODELS)}")
    if path.is_dir():
        path = next((path / name for name in (RUN_FILE, WEIGHTS_FILE) if (path / name).exists()), path / RUN_FILE)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: give a .safetensors file, or the folder of a run")
    if path.suffix == ".safetensors":
        with refusing(f"{path} is damaged, or no checkpoint", "use a checkpoint of train.py"):
            state = read_safetensors(path)
            if state.get("format") == FORMAT:
                if model and not MODELS[model].items() <= state["config"].items():
                    raise CheckpointError(f"{path} holds no {model}, but another network: leave --model out")
                return state
    if model is not None:
        return describe_official(path, model, state)
    what = f"of format {FORMAT!r}" if state else "a .safetensors file"
    raise CheckpointError(
        f"{path} is not {what}: make a new one with train.py; for official DiT weights add --model DiT-XL/2"
    )


def read_safetensors(path: Path) -> dict:
    """The description of a file with its tensors, nested by their paths; those without a path are "ema".

    Raises ValueError where it is damaged.
    """
    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError("its header is too long")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    saved, _, description = metadata.get("description", " {}").partition(" ")
    if "description" in metadata and saved != checksum(description, tensors):
        raise ValueError("its checksum is wrong, so it is not what was written")
    state = {**json.loads(description), "ema": {}}
    for name, tensor in tensors.items():
        *groups, last = name.split("/") if "/" in name else ("ema", name)
        place = state
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = tensor
    return state


def describe_official(path: Path, model: str, state: dict | None = None) -> dict:
    """Official weights of a model of MODELS with their description. Image size and channels follow from their shapes.

    They may be inside of {"model": ..., "ema": ...}, as training saves them, and have prefixes from compiling or DDP.
    state: what the file holds, if it has been read
    """
    patch_size = MODELS[model]["patch_size"]
    fix = "use a plain state dict, and leave --model out for files of train.py"
    with refusing(f"{path} holds no weights of the official {model}; nothing in it was run", fix):
        if state is None:
            with warnings.catch_warnings(action="ignore"):  # of files that are not ours
                state = torch.load(path, map_location="cpu", weights_only=True)
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
    classes, makes = tuple(str(label) for label in range(num_classes)), "images" if in_channels in (1, 3) else "latents"
    about = describe(
        DiT, config, Diffusion("linear", "eps", 1000), classes, "official weights", 0, guidance=4.0, makes=makes
    )
    return {**about, "ema": state}


# ------------------------------------------------------------------------------------------------------------- building


# The types of a description's values.
TYPES = dict(
    network=str, config=dict, diffusion=dict, makes=str, classes=list, data=str, step=int, guidance=float,
    guidance_interval=(list, type(None)), null_class=bool,
)


def check(state: dict) -> None:
    """Raise some exception unless this is a description that `describe` could have made."""
    for name, kind in TYPES.items():
        if name not in state or not isinstance(state[name], kind):
            raise TypeError(f"its {name} is missing, or of another type")
    config, T, interval = state["config"], state["diffusion"]["timesteps"], state["guidance_interval"] or [0, 0]
    plain = (int, float, bool, str, list, dict, type(None))
    if any(type(value) not in plain for value in (*config.values(), *state["diffusion"].values())):
        raise TypeError("its config or diffusion is of other types")
    for field in fields(DiTConfig):
        if field.type in (int, bool) and type(config.get(field.name, field.default)) is not field.type:
            raise TypeError(f"its {field.name} is not of the type {field.type.__name__}")
    unknown = config.keys() - {field.name for field in fields(DiTConfig)}
    if unknown:
        raise ValueError(f"dit.DiTConfig has no field {', '.join(sorted(unknown))}, and its network was built with it")
    low, high = interval
    ranges = [
        (0, state["step"], MAX_STEPS), (0, state["guidance"], MAX_GUIDANCE), (2, T, MAX_TIMESTEPS), (0, low, high),
        (low, high, T - 1), (1, config.get("depth", 1), MAX_DEPTH), (0, len(state["data"]), 1000),
    ]
    if not all(least <= value <= most for least, value, most in ranges):
        raise ValueError("its step, guidance, guidance_interval, timesteps, depth or data is out of range")
    if {type(low), type(high), type(T)} != {int} or state["makes"] not in ("images", "latents"):
        raise ValueError("its guidance_interval, timesteps or makes is not as described")
    number = DiTConfig(**config).num_classes
    if len(state["classes"]) != number or not all(type(name) is str for name in state["classes"]):
        raise ValueError(f"its classes are not {number} names")


class OnlyShapes(TorchFunctionMode):
    """Inside, with the device `meta`, weights have shapes and no memory. For random and counted numbers on `meta`,
    PyTorch would import its compiler, which takes seconds: the former are left out, and the latter counted on the CPU.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (init.normal_, init.uniform_, Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs | (dict(device="cpu") if func is torch.arange else {}))


def check_weights(network: type[DiT], config: DiTConfig, weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless these are the weights of such a network: by name, shape and kind, all of them finite.

    The network is built on the device `meta`, where tensors have shapes and no memory.
    """
    count = sum(value.numel() for value in weights.values())
    if (config.image_size // config.patch_size) ** 2 * config.hidden_size > max(MAX_NUMBERS, count):
        raise ValueError("its tokens are larger than its weights")
    try:
        with torch.device("meta"), OnlyShapes():
            expected = network(config).state_dict()
    except Exception:
        if config.depth * config.hidden_size**2 * max(1, config.mlp_ratio) > max(MAX_NUMBERS, count):
            raise
        expected = network(config).state_dict()  # of a fork, which computes what cannot be computed on `meta`
    for name in sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{name} is {'missing' if name in expected else 'not a part of the network'}")
    for name, tensor in expected.items():
        value = weights[name]
        if not isinstance(value, Tensor) or value.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} is not of the type {tensor.dtype}")
        if value.shape != tensor.shape:
            raise ValueError(f"{name} is of shape {tuple(value.shape)}, and the network needs {tuple(tensor.shape)}")
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def build(state: dict, device: torch.device | str = "cpu", network: type[DiT] | None = None) -> TrainedModel:
    """A loaded checkpoint as a network with its averaged weights, to sample from. Raises CheckpointError.

    network: its class, if it is none of NETWORKS
    """
    with refusing("the weights do not fit the network that the checkpoint describes"):
        check(state)
        name = state["network"]
        if name not in NETWORKS if network is None else name != network.__name__:
            raise ValueError(f"it holds a {name[:40]}, not a {network.__name__ if network else ' or '.join(NETWORKS)}")
        network, kind = NETWORKS.get(name, (network, TrainedModel)) if network is None else (network, TrainedModel)
        config = DiTConfig(**state["config"])
        check_weights(network, config, state["ema"])
        model = network(config)  # not what is left of it on `meta`, since a network may hold more than its weights
        model.load_state_dict(state["ema"])
        process = LearnedVariance if config.learn_sigma else Diffusion
        diffusion = process(**state["diffusion"], device=device)
    description = dict(format=FORMAT, **{name: state[name] for name in TYPES})
    return kind(model.to(device).eval(), diffusion, description)


def start_from(state: dict, network: type[DiT], shape: tuple[int, ...], classes: tuple[str, ...]) -> dict:
    """What a new run takes from a loaded checkpoint to learn other images: its network, diffusion process and averaged
    weights, in the form of the state of a run before its first step.

    network: its class
    shape:   (C, S, S) of the images. S may be another number than in the checkpoint, and C 3 in place of 1, or 1 of 3.
    classes: their names, () for none

    A class whose name the checkpoint has keeps its row of the label table, and any other begins as the null class. The
    positions, and all other buffers, are those of the new size. For channels see `change_channels`.

    Raises CheckpointError.
    """
    name, (C, S, _) = state.get("network"), shape
    if name == "ShortcutDiT":
        raise CheckpointError("these weights are distilled: begin with the checkpoint that they were distilled from")
    with refusing("a run cannot begin with this checkpoint"):
        check(state)
        if name != network.__name__:
            raise ValueError(f"it holds a {name[:40]}, not a {network.__name__}")
        old, weights = DiTConfig(**state["config"]), dict(state["ema"])
        check_weights(network, old, weights)
        P = old.patch_size
        if S % P:
            sizes = " or ".join(dict.fromkeys(str(n * P) for n in (max(S // P, 1), S // P + 1)))
            raise CheckpointError(f"its network cuts images into patches of {P} pixels: use --image-size {sizes}")
        if old.in_channels != C and not {old.in_channels, C} <= {1, 3}:
            raise CheckpointError(f"its network knows {old.in_channels} channels, and here are {C}: begin without it")
        config = replace(old, image_size=S, in_channels=C, num_classes=len(classes))
        if list(classes) != state["classes"]:
            known = {name: row for row, name in enumerate(state["classes"])}
            rows = [known.get(name, old.num_classes) for name in (*classes, None)]
            weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][rows]
        if old.in_channels != C:
            change_channels(weights, old, C)
        model = network(config)
        learned = {name for name, _ in model.named_parameters()}
        weights |= {name: buffer for name, buffer in model.state_dict().items() if name not in learned}
    return dict(config=asdict(config), diffusion=state["diffusion"], step=0, model=weights, ema=weights)


def change_channels(weights: dict[str, Tensor], config: DiTConfig, C: int) -> None:
    """Make the weights of a network of this config, for images of 1 or 3 channels, those of one for C, 3 or 1.

    Three channels in place of one are embedded as their mean, and each is predicted as the one was. One channel in
    place of three is embedded as if all three were equal to it, and predicted as their mean. So a grey image gives the
    same output as before.
    """
    P, before = config.patch_size, config.in_channels
    embed = weights["x_embedder.proj.weight"].mean(1, keepdim=True)                         # (D, 1, P, P)
    weights["x_embedder.proj.weight"] = embed.expand(-1, C, -1, -1) * (before / C)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        pixels = weights[name].unflatten(0, (P * P, -1, before))                            # (P*P, 1 or 2, C, ...)
        weights[name] = pixels.mean(2, keepdim=True).repeat_interleave(C, 2).flatten(0, 2)  # C_out = C, or 2C


def load_model(path: Path, device: torch.device | str = "cpu", model: str | None = None) -> TrainedModel:
    """The model of a checkpoint, to sample from. model: the name of official weights. Raises CheckpointError."""
    return build(load(path, model), device)


def find_checkpoint(sampler: str | None = None) -> Path:
    """The newest run that has samples, else the bundled weights; for the shortcut sampler, the distilled ones.

    Raises CheckpointError where there are none.
    """
    if sampler == "shortcut":
        return DISTILLED_WEIGHTS
    runs = sorted(RUNS.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime)
    runs = [path for path in runs if [*path.parent.glob("samples/*")] or not path.with_name("samples").exists()]
    path = runs[-1] if runs else BUNDLED_WEIGHTS
    if not path.is_file():
        raise CheckpointError("no weights yet: train some with python train.py, or give a file with --checkpoint")
    return path
