"""The flags for weights, sampler and labels, which all commands share that sample."""

import argparse
import unicodedata
from pathlib import Path

import torch

from checkpoint import BUNDLED_WEIGHTS, DISTILLED_WEIGHTS, find_checkpoint, load_model
from cli import RANK, UsageError, number, pick_device, usage
from latents import Autoencoder
from sampling import TrainedModel, guidance_settings
from shortcut import ShortcutModel

DEFAULT_STEPS = {**TrainedModel.default_steps, **ShortcutModel.default_steps}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for weights and sampler, which other commands have, too. `open_model` reads them."""
    flag = parser.add_argument_group("weights").add_argument
    flag("--checkpoint", type=Path, help="a file, or the folder of a run (default: the newest run that has samples, "
         "else the bundled weights; with --sampler shortcut the distilled ones)")
    flag("--vae", help="for latents, the autoencoder that decodes them, a folder or name, see latents.py")
    flag("--model", help="for official DiT weights, the model that they are of, such as DiT-XL/2")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the same seed gives the same images (default: 0)")
    flag("--sampler", choices=list(DEFAULT_STEPS), help="(default: dpm++, or for distilled weights shortcut, which is "
         "only for these)")
    steps = ", ".join(f"{n} for {name}" for name, n in DEFAULT_STEPS.items())
    flag("--steps", type=int, help=f"sampling steps (default: {steps})")
    flag("--eta", type=number(float, 0, 1), default=0.0, help="for ddim: fresh noise, 0 for none, 1 as in ddpm")
    flag("--guidance", type=float, nargs="+", metavar="W", help="0 ignores the label, 1 is plain, above 1 exaggerates "
         "it; with LOW HIGH, only at these timesteps (default: what suits the weights)")
    flag("--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products; fp32 is TF32 on "
         "newer GPUs; bf16 is faster on GPUs and some CPUs, and changes the images a little (default: fp32)")
    flag("--batch-size", type=number(int, 1), default=250, help="images at a time, which does not change them")
    flag("--device", choices=["cpu", "cuda", "mps"], help="(default: the best there is)")


def open_model(args: argparse.Namespace) -> TrainedModel:
    """The weights and the settings that the flags of `add_model_flags` ask for. Raises UsageError, CheckpointError."""
    if not args.checkpoint:
        args.checkpoint = find_checkpoint(args.sampler)
        kind = {BUNDLED_WEIGHTS: "the bundled weights", DISTILLED_WEIGHTS: "the distilled weights"}
        if RANK == 0:
            print(f"weights: {args.checkpoint}, {kind.get(args.checkpoint, 'the newest run')}", flush=True)
    trained = load_model(args.checkpoint, pick_device(args.device), args.model)
    T, distilled = trained.diffusion.T, isinstance(trained, ShortcutModel)
    args.sampler = args.sampler or trained.settings["sampler"]
    if args.sampler not in trained.samplers:
        fix = "sample from it only with --sampler shortcut" if distilled else "use another --sampler"
        raise UsageError(f"{args.checkpoint} was {'' if distilled else 'not '}distilled: {fix}")
    if distilled and args.guidance:
        raise UsageError(f"{args.checkpoint} was distilled with its guidance, which is fixed: set none")
    if args.eta and args.sampler != "ddim":
        raise UsageError(f"--eta is {args.eta}: leave it out, or use it with --sampler ddim")
    steps = min(DEFAULT_STEPS[args.sampler], T) if args.steps is None else args.steps
    trained.settings |= dict(sampler=args.sampler, steps=steps, eta=args.eta, seed=args.seed, precision=args.precision)
    with usage():
        trained.timesteps(steps)
        if args.guidance:
            trained.settings |= guidance_settings(args.guidance, T)
    if args.guidance and args.guidance[0] != 1 and not trained.description["null_class"]:
        raise UsageError(f"{args.checkpoint} was trained without dropped labels, which guidance needs: leave it out")
    if args.vae:
        if trained.is_image:
            raise UsageError(f"{args.checkpoint} makes images, and --vae is for latents: leave it out")
        trained.autoencoder = Autoencoder(args.vae, trained.device)
        trained.autoencoder.decode(torch.zeros(1, *trained.shape))  # raises an error where it does not fit
    return trained


def parse_labels(words: list[str] | None, classes: list[str]) -> list[int]:
    """The numbers of the classes that words such as "3", "7-9" or "cat" name. Raises UsageError.

    Without words, they are the first ten classes, or ten times 0 for an unconditional model.
    """
    if words is None:
        return list(range(min(10, len(classes)))) or [0] * 10
    if not classes:
        raise UsageError("this model knows no labels: leave --labels out")
    # Where classes have numbers as names, a number is a name. Elsewhere it counts the classes from 0.
    numbered = {} if any(name.isdecimal() for name in classes) else {str(i): i for i in range(len(classes))}
    known = numbered | {name: i for i, name in enumerate(classes)}
    labels = []
    for word in words:
        word = unicodedata.normalize("NFC", word)
        first, dash, last = word.partition("-")
        if word in known:
            labels.append(known[word])
        elif dash and {first, last} <= known.keys() and known[first] <= known[last]:
            labels += range(known[first], known[last] + 1)
        else:
            numbers = f"numbers 0 to {len(classes) - 1}, " if numbered else ""
            names = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise UsageError(f"no class {word!r}: use {numbers}names or a rising range of them: {names}")
    return labels
