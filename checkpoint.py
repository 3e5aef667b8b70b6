"""Checkpoint files: written whole or not at all, and read without running anything that is in them.

    checkpoint.pt         everything that a run needs to go on, see run.py
    NAME.safetensors      the averaged weights alone, to publish, with their description as JSON in the metadata
    a state dict, .pt     weights of the official DiT, for which the user has to name the model

The first two describe themselves, see `describe`. Averaged weights, "ema" for short, are an exponential moving average
of the weights over the training steps (train.update_ema). They draw better samples than the last weights themselves.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize

from diffusion import Diffusion
from dit import MODELS, DiT, DiTConfig

FORMAT = "dit-from-scratch 1"


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


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file by write(file). A file that was there stays until the new one is complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save(path: Path, state: dict) -> None:
    """Write a checkpoint.pt."""
    write_whole(path, lambda file: torch.save(state, file))


def save_weights(path: Path, weights: dict, description: dict) -> None:
    """Write weights (names to tensors) and their description as safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = serialize(weights, metadata={"description": json.dumps(description)})
    write_whole(path, lambda file: file.write(content))


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
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = json.loads((file.metadata() or {}).get("description", "{}"))
                state["ema"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            # With weights_only, a pickle of more than tensors and plain types is refused, and nothing in it is run.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can provoke any exception in either library
        reason = " ".join(str(error).split()).split(". ")[0][:120] or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors; nothing in it was run ({reason}): "
            "use a checkpoint of train.py, a .safetensors file or a plain state dict"
        ) from error
    if model is not None:
        return {**describe_official(path, state, model), "ema": state}
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is {f'of format {found!r}' if found else 'the file of another program'}, not {FORMAT!r}: "
            "make a new one with train.py; for official DiT weights add --model DiT-XL/2"
        )
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
    try:
        model = DiT(DiTConfig(**state["config"]))
        model.load_state_dict(state["ema"])
        diffusion = Diffusion(**state["diffusion"], device=device)
        about = {name: state[name] for name in ("classes", "data", "step", "guidance")}
        description = describe(model.config, diffusion, **about, interval=state.get("interval"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the weights do not fit the network that the checkpoint describes: {reason}") from error
    return model.to(device).eval(), diffusion, description
