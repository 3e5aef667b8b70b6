"""Encode a folder of images as latents, on which train.py trains as the official DiT does: see latents.py.

    python tools/encode.py FOLDER --vae stabilityai/sd-vae-ft-ema --output latents.npz

Each batch is written as it is done. A run that was stopped continues with the same command.
"""

import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
from cli import Parser, UsageError, number, output_path, pick_device, run_script  # noqa: E402
from dataset import to_float  # noqa: E402
from folders import image_files, read_image, survey  # noqa: E402
from latents import Autoencoder  # noqa: E402
from sampling import image_noise  # noqa: E402


def parse_args(argv: list[str] | None = None):
    """The command line. Raises UsageError."""
    parser = Parser("encode.py", "Encode images as latents.")
    parser.add_argument("folder", type=Path, help="of images, or of a folder for each class")
    parser.add_argument("--vae", required=True, help="the autoencoder, a folder or name that diffusers loads")
    parser.add_argument("--output", type=Path, help="a new .npz (default: a new name in outputs/)")
    parser.add_argument("--image-size", type=number(int, 8, 4096), default=256, help="in pixels (default: 256)")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, help="images in a part (default: 64)")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the latents (default: 0)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="(default: the best there is)")
    return parser.parse_args(argv)


def read_images(paths: list[Path], size: int, bits: int | None) -> torch.Tensor:
    """Images (n, 3, size, size) in [-1, 1]. bits: see read_image. Raises DataError."""
    return to_float(torch.stack([read_image(path, "RGB", size, bits) for path in paths]))


def write_npz(path: Path, parts: list[Path], shape: tuple[int, ...], labels: np.ndarray, classes: list[str]) -> None:
    """Join the parts, (n, C, S, S) float32 each, in an .npz, one after the other, so that few are in memory."""
    def write(file) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = dict(descr="<f4", fortran_order=False, shape=(len(labels), *shape))
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.load(part).astype("<f4").tobytes())
            for name, array in (("labels", labels), ("classes", np.array(classes, dtype=str))):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    checkpoint.write_whole(path, write)


def encode(args) -> Path:
    """Encode what the command line asks for. Returns the path of the file. Raises UsageError, DataError."""
    if not args.folder.is_dir():
        raise UsageError(f"no folder {args.folder}: give a folder of images")
    files, labels, classes = image_files(args.folder)
    _, bits = survey(files)
    path = output_path(args.output, "latents.npz")
    autoencoder = Autoencoder(args.vae, pick_device(args.device))
    size = args.image_size // autoencoder.factor
    if args.image_size % autoencoder.factor:
        raise UsageError(f"--image-size {args.image_size} is not a multiple of {autoencoder.factor}: "
                         f"use {max(size, 1) * autoencoder.factor}")
    shape = (autoencoder.channels, size, size)
    folder = path.with_name(path.name + ".parts")
    names = hashlib.sha256(json.dumps([str(file) for file in files]).encode()).hexdigest()
    about = json.dumps([names, args.vae, args.image_size, args.batch_size, args.seed]).encode()
    if folder.exists() and (folder / "about.json").read_bytes() != about:
        raise UsageError(f"{folder} is of another command: remove it, or name another --output")
    folder.mkdir(exist_ok=True)
    checkpoint.write_whole(folder / "about.json", lambda file: file.write(about))
    parts = []
    for first in tqdm(range(0, len(files), args.batch_size), unit="part", desc="encoding"):
        indices = range(first, min(first + args.batch_size, len(files)))
        parts.append(folder / f"{first:09d}.npy")
        if not parts[-1].exists():
            images = read_images([files[i] for i in indices], args.image_size, bits)
            latents = autoencoder.encode(images, image_noise(args.seed, indices, shape, "cpu")()).numpy()
            checkpoint.write_whole(parts[-1], lambda file, latents=latents: np.save(file, latents))
    write_npz(path, parts, shape, np.array(labels), classes)
    shutil.rmtree(folder)
    return path


def main() -> None:
    print(encode(parse_args()))


if __name__ == "__main__":
    run_script(main)
