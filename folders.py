"""The image files of a folder, and their pixels. This file does not know what they are for.

    FOLDER/class-a/1.png, FOLDER/class-b/2.png ...     a folder for each class, in the order a, b ... or 1, 2 ... 10
    FOLDER/1.png, FOLDER/2.png ...                     no classes

The folder of a class may hold further folders. Left out are files and folders whose names begin with a dot, folders
whose names begin with two underscores (macOS and Python leave such), links to folders inside a class (they may loop),
and what our own commands write: runs and `outputs`.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
RUN_FILES = {"log.jsonl", "checkpoint.safetensors", "checkpoint.pt"}  # a folder with one of these is a run
OUTPUT_FILE = re.compile(
    r"(denoising|evaluation|grid|guidance|interpolation|latents|samples|sweep-\w+|trajectory)-\d+\.(gif|json|npz|png)"
)


class DataError(Exception):
    """The data cannot be had. The message is one line that names the fix."""

    exit_status = 2  # of a command that this exception ends


# -------------------------------------------------------------------------------------------------------------- files


def image_files(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """The image files of a folder, the label of each, and the names of the classes, [] where there are none.

    Raises DataError where images are missing, where images and folders are mixed, and where the class folders are not
    in `root` itself but in a folder there, as in DATA/train/CLASS.
    """
    folders, images = listing(root)
    if folders and images:
        raise DataError(f"{root} holds both images and folders: keep a folder for each class, or only images")
    classes = sorted(folders, key=natural)
    groups = [sorted(images_below(root / name)) for name in classes] or [sorted(images)]
    check_level(root, [path for group in groups for path in group])
    for name, group in zip(classes or [""], groups, strict=True):
        if not group:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            fix = "put some in, or remove the folder" if name else "put some in"
            raise DataError(f"{root / name} holds no images ({suffixes}): {fix}")
    labels = [label for label, group in enumerate(groups) for _ in group]
    return [path for group in groups for path in group], labels, classes


def check_level(root: Path, paths: list[Path]) -> None:
    """Raises DataError where none of these images is in `root` or a folder of it, but all are further down."""
    if paths and not any(root in (path.parent, path.parent.parent) for path in paths):
        counts = Counter(path.parent.parent for path in paths)
        likely = max(counts, key=lambda folder: (folder.name.lower().startswith("train"), counts[folder]))
        raise DataError(f"the folders in {root} hold no images themselves, only folders: use {likely} if its folders "
                        f"are the classes, or move the images of each class up into its folder in {root}")


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and its folders. Raises DataError."""
    folders, images = listing(folder)
    for name in folders:
        if not (folder / name).is_symlink():
            images += images_below(folder / name)
    return images


def listing(folder: Path) -> tuple[list[str], list[Path]]:
    """The names of the folders in a folder, and its images, without what is left out. Raises DataError."""
    folders, files = entries(folder)
    images = [folder / name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return [name for name in folders if not is_ours(folder / name)], images


def is_ours(folder: Path) -> bool:
    """Whether our commands made a folder: it is a run, or it holds runs and nothing else, or it is named `runs` and
    holds some run, or it is named `outputs` and holds a file with a name as they give it. Raises DataError.
    """
    folders, files = entries(folder)
    if folder.name == "outputs":
        return any(map(OUTPUT_FILE.fullmatch, files))
    runs = [is_ours(folder / name) for name in folders if not (folder / name).is_symlink()]
    holds_runs = any(runs) and (folder.name == "runs" or all(runs) and not files)
    return holds_runs or not RUN_FILES.isdisjoint(files)


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder. Raises DataError."""
    try:
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not entry.name.startswith(".")]
            folders = [entry.name for entry in visible if entry.is_dir() and not entry.name.startswith("__")]
            return folders, [entry.name for entry in visible if entry.is_file()]
    except OSError as error:
        raise DataError(explain(Path(error.filename or folder), error)) from error


def natural(name: str) -> list:
    """A key that sorts "2" before "10"."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def explain(path: Path, error: Exception) -> str:
    """Why a file or folder cannot be read, and what to do, in one line."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is not there: check its name, and whether another program has removed it"
    if isinstance(error, PermissionError):
        return f"{path} may not be read: give yourself the permission to read it, or move it elsewhere"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder: name an image file"
    if isinstance(error, OSError) and error.errno:  # Pillow's own have no number
        return f"cannot read {path} ({error.strerror}): copy it to another disk, or move it elsewhere"
    return f"cannot read the image {path} ({error}): delete or replace it"


# ------------------------------------------------------------------------------------------------------------- pixels


def survey(paths: list[Path]) -> tuple[bool, int | None]:
    """(whether all these images have a grey format, the bits that are used of those with 16 bits, None without such).

    Cameras and scanners write 10, 12 or 14 bits into files of 16. The largest value of all images decides. Raises
    DataError.
    """
    options = dict(desc=f"looking at {len(paths):,} images", unit="image", leave=False, disable=None)
    modes, largest = zip(*thread_map(look_at, paths, **options), strict=True)
    has_16_bits = any(mode.startswith("I;16") for mode in modes)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if max(largest) < 2**bits)
    return all(mode in ("1", "L", "LA") or mode.startswith("I;16") for mode in modes), bits if has_16_bits else None


def look_at(path: Path) -> tuple[str, int]:
    """Pillow's mode of an image file, and its largest value where that has 16 bits, else 0. Raises DataError."""
    with opened(path) as image:
        return image.mode, int(np.asarray(image).max()) if image.mode.startswith("I;16") else 0


def read_files(paths: list[Path], mode: str, size: int, bits: int | None = None) -> Tensor:
    """Image files as pixels, uint8 (N, C, size, size), with C = 1 if all are grey, whatever their format, else C = 3.

    mode: "L" to read them as grey, "RGB" as colour; bits: see read_image. Raises DataError.
    """
    pixels = torch.empty(len(paths), len(mode), size, size, dtype=torch.uint8)

    def fill(i: int) -> bool:
        pixels[i] = image = read_image(paths[i], mode, size, bits)
        return bool((image == image[:1]).all())  # whether it is grey

    options = dict(desc=f"reading {len(paths):,} images", unit="image", leave=False, disable=None)
    # Threads are enough, since decoding releases Python's lock.
    is_grey = thread_map(fill, range(len(paths)), **options)
    return pixels[:, :1].clone() if mode == "RGB" and all(is_grey) else pixels


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, to be read inside. Raises DataError, naming the file, where that fails."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(explain(path, error)) from error


def read_image(path: Path, mode: str, size: int, bits: int | None = None) -> Tensor:
    """An image file as it should be seen, uint8 (C, size, size): upright, 8 bits, on white where it is transparent,
    resized on the shorter side and cropped at the centre.

    mode: L for grey, RGB for colour. bits: how many a file of 16 bits uses, so that its white is 2^bits - 1; None
    for all 16. Files of 32 bits are refused, since nothing says which of their values is white. Raises DataError.
    """
    with opened(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits: save it with 8 or 16 bits")
        image.load()
        with contextlib.suppress(Exception):  # a damaged EXIF tag says nothing of the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            values = np.asarray(image) * (255 / (2 ** (bits or 16) - 1))
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if image.mode in ("1", "L") else "RGB").convert(mode)
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).view(size, size, len(mode)).permute(2, 0, 1)
