"""Images as one uint8 tensor with their labels, and endless batches of them. This file does not know the network.

MNIST and its relatives come through torchvision. Any other data set is a folder of images, with a folder for each class
or without classes: see folders.py, which reads it.

Pixels are stored as 0 ... 255. The network sees them as -1 ... 1. (For latents in place of pixels, see latents.py.)
"""

import hashlib
import itertools
import math
import re
import socket
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from folders import DataError, image_files, read_files, survey

# The class of each data set in torchvision.datasets.
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DIGITS = tuple("0123456789")
MNIST_5000 = Path(__file__).parent / "assets" / "mnist-5000.npz"  # the first 500 training images of each digit
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_MD5 = (
    "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
)
FOLDER_IMAGE_SIZE = 32     # pixels of a folder's images, where no other size is asked for
MEMORY_LIMIT = 4 * 2**30   # bytes of pixels
RESIZE_AT_ONCE = 2**24     # bytes of pixels, which take several times as much while they are resized
DOWNLOAD_TIMEOUT = 20      # seconds without an answer


@dataclass
class Images:
    """A data set of N square images of S pixels a side."""

    pixels: Tensor            # uint8 (N, C, S, S); latents are float32
    labels: Tensor            # int64 (N,)
    classes: tuple[str, ...]  # the names of the classes, () for none
    source: str               # where the images come from, in words
    name: str = ""            # the name under which `load` found them, "" for a folder
    note: str = ""            # how their files were read, where that needs saying

    @property
    def summary(self) -> str:
        """In words: the source, the number of classes, of images in the smallest and the largest, the first names."""
        about, n = "no classes", len(self.classes)
        if n:
            counts = self.labels.bincount(minlength=n)
            sizes = " to ".join(f"{count:,}" for count in sorted({counts.min().item(), counts.max().item()}))
            names = ", ".join(self.classes[:5]) + (" ..." if n > 5 else "")
            about = f"{n:,} class{'es' if n > 1 else ''} of {sizes} image{'' if sizes == '1' else 's'}: {names}"
        return f"{self.source} ({about}{'; ' if self.note else ''}{self.note})"

    def fingerprint(self) -> str:
        """A hash of everything that training sees of the images: pixels, labels and the names of the classes."""
        digest = hashlib.sha256(repr((tuple(self.pixels.shape), self.classes)).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in 0 ... 255 -> float32 in -1 ... 1, the range of x0; latents stay as they are. Its inverse is
    sampling.to_uint8.
    """
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1


def load(
    name: str | None, data_dir: str = "data", image_size: int | None = None, train: bool = True, download: bool = True
) -> Images:
    """The data set `name`: one of DATASETS, mnist-5000, or the path of a folder of images. Raises DataError.

    Without a name it is MNIST. Where MNIST is neither on disk nor can be downloaded, the 5,000 of its training digits
    that come with this repository take its place, with a warning. image_size is in pixels; None keeps the data set's.
    """
    if name is None:
        try:
            return load("mnist", data_dir, image_size, train, download)
        except DataError as error:
            if not train:
                raise
            images = load("mnist-5000", data_dir, image_size)
            warnings.warn(f"{error}. Using {images.source} instead", stacklevel=2)
            return images
    if name in DATASETS or name == "mnist-5000":
        images = bundled_digits() if name == "mnist-5000" else from_torchvision(name, Path(data_dir), train, download)
        images.name = name
        return resized(images, image_size)
    if Path(name).is_dir():
        return from_folder(Path(name), image_size or FOLDER_IMAGE_SIZE)
    raise DataError(f"no data set or folder {name!r}: use {', '.join(DATASETS)}, mnist-5000, or the path of a folder")


def bundled_digits() -> Images:
    """The 5,000 MNIST training digits, 500 a class, in assets/. Raises DataError."""
    try:
        with np.load(MNIST_5000) as file:
            pixels, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["labels"])
    except OSError as error:
        raise DataError(f"cannot read {MNIST_5000}: get it from the repository, or use --data-dir") from error
    return Images(pixels[:, None], labels.long(), DIGITS, "the bundled 5,000 digits of MNIST")


def from_torchvision(name: str, root: Path, train: bool, download: bool) -> Images:
    """A data set of torchvision, checked, and downloaded if it is not in `root`. Raises DataError."""
    import torchvision.datasets  # takes seconds, and sampling needs no data set

    class_name, timeout = DATASETS[name], socket.getdefaulttimeout()
    raw = None if name == "cifar10" else root / class_name / "raw"  # torchvision checks the files of CIFAR-10 by itself
    place = f"put {', '.join(IDX_FILES)} into {raw}" if raw else f"put cifar-10-batches-py into {root}"
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        kind = getattr(torchvision.datasets, class_name)
        if raw and all((root / file).exists() for file in IDX_FILES):
            raw, kind = root, type(class_name, (kind,), {"raw_folder": str(root)})
        if raw and all((raw / file).exists() for file in IDX_FILES):  # what it downloads, torchvision checks by itself
            check_idx_files(raw, name)
        data = kind(root, train=train, download=download)
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


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz. Raises any exception where it is broken, or larger than MEMORY_LIMIT."""
    with zipfile.ZipFile(path) as archive:  # a few bytes of it can hold endless zeros
        if sum(entry.file_size for entry in archive.infolist()) > MEMORY_LIMIT:
            raise ValueError("it does not fit in memory")
    with np.load(path) as file:
        return dict(file)


def check_idx_files(folder: Path, name: str) -> None:
    """Raises ValueError, naming a file, unless each is as long as its header says and, for MNIST, has the known MD5."""
    for file, md5 in zip(IDX_FILES, MNIST_MD5, strict=True):
        content = (folder / file).read_bytes()
        dimensions = 1 if "labels" in file else 3
        shape = [int.from_bytes(content[at : at + 4]) for at in range(4, 4 + 4 * dimensions, 4)]
        complete = content[3:4] == bytes([dimensions]) and len(content) == 4 + 4 * dimensions + math.prod(shape)
        if not complete or (name == "mnist" and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5):
            raise ValueError(f"{folder / file} is corrupt or incomplete, delete it")


def free_memory(meminfo: str = "/proc/meminfo", limit: str = "/sys/fs/cgroup/memory.max") -> float:
    """Bytes of memory that a process can still get, infinity where the system does not tell (only Linux does).

    What the disk cache holds counts as free, since the kernel gives it up; os.sysconf does not know its size.
    """
    try:
        lines = dict(line.split(":") for line in Path(meminfo).read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, LookupError, ValueError):
        return math.inf
    with suppress(OSError, ValueError):  # where there is no limit for this container, the file says "max"
        free = min(free, int(Path(limit).read_text()))
    return free


def check_free(needed: float, what: str, fix: str) -> None:
    """Raises DataError where `what` takes more bytes of memory than are free, since Linux kills a process that writes
    to more than there is, without a word.
    """
    free = free_memory()
    if needed > free:
        raise DataError(f"{what} would take {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free: {fix}")


def check_memory(source: str, n: int, channels: int, size: int) -> None:
    """Raises DataError where n images of `size` pixels are more than MEMORY_LIMIT, or than what is free."""
    limit = min(MEMORY_LIMIT, free_memory())
    if n * channels * size**2 > limit:
        largest = int((limit / (n * channels)) ** 0.5)
        raise DataError(f"{source} of {size} pixels do not fit in memory: use --image-size {largest} or less")


def resized(images: Images, size: int | None) -> Images:
    """The images at another size in pixels. Raises DataError where they would not fit in memory."""
    n, channels, own_size, _ = images.pixels.shape
    if size is None or size == own_size:
        return images
    check_memory(images.source, n, channels, size)
    at_once = max(1, RESIZE_AT_ONCE // (channels * size**2))
    resize = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    pixels = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for old, new in zip(images.pixels.split(at_once), pixels.split(at_once), strict=True):
        new.copy_(resize(old.float()).round().clamp(0, 255))
    images.pixels = pixels
    return images


def from_folder(root: Path, size: int) -> Images:
    """The images of a folder, see folders.py: resized on the shorter side and cropped at the centre.

    They have one channel if all of them are grey, else three. Raises DataError.
    """
    paths, labels, names = image_files(root)
    source = f"{len(paths):,} images of {root.resolve().name}"
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of damaged EXIF tags
        grey_files, bits = survey(paths)
        mode = "L" if grey_files else "RGB"
        check_memory(source, len(paths), len(mode), size)
        pixels = read_files(paths, mode, size, bits)
    classes = tuple(unicodedata.normalize("NFC", name) for name in names)  # macOS writes é as e and an accent
    note = f"{bits} of the 16 bits of their files are used" if bits else ""
    return Images(pixels, torch.tensor(labels), classes, source, note=note)


def hold_out(images: Images, every: int = 20) -> tuple[Images, Images]:
    """(train, held_out): one image in `every` of each class is kept from training, so that overfitting can be seen.

    These are the images in the middle of each `every` of a class, in the order of their files. A class of every / 2
    images or fewer keeps them all, so held_out may be empty. No second copy is made of the training images: they move
    together in the memory of `images`, which must not be used any more.
    """
    held = torch.zeros(len(images.labels), dtype=torch.bool)
    for label in images.labels.unique():
        held[(images.labels == label).nonzero()[every // 2 :: every]] = True
    kept = (~held).nonzero().flatten()
    held_out = replace(images, pixels=images.pixels[held], labels=images.labels[held])
    train = replace(images, pixels=images.pixels[: len(kept)], labels=images.labels[kept])
    for place, index in zip(train.pixels.split(100), kept.split(100), strict=True):
        place.copy_(images.pixels[index])  # no image lies before its new place, so none is overwritten too early
    for part in (train, held_out):
        part.source = f"{len(part.labels):,} of {images.source}"
    return train, held_out


# ------------------------------------------------------------------------------------------------------------ batches


def index_batches(n: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Batches of indices below n, without end, from batch number `start` on.

    One fresh shuffle follows another, and the sequence is cut every batch_size. Batch k depends only on (n, batch_size,
    seed, k), so a run can be resumed at any step.
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
    device: torch.device | str = "cpu", flip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches (images float32 (b, C, S, S) in -1 ... 1, labels int64 (b,)), from step `start` on.

    batch_size counts the images of all processes together. Process number `rank` of `world` gets the rank-th part of
    each batch, so b = batch_size / world. flip: mirror each image left to right with a probability of 1/2, which
    depends only on the seed and the step.
    """
    local = slice(batch_size // world * rank, batch_size // world * (rank + 1))
    pixels, labels = data.pixels.to(device), data.labels.to(device)
    cuda = pixels.device.type == "cuda"
    for step, index in enumerate(index_batches(len(data.labels), batch_size, seed, start), start):
        index = index[local].to(device, non_blocking=cuda)  # without waiting for what the GPU still has to do
        x = to_float(pixels[index])
        if flip:
            mirrored = coins(batch_size, seed, step)[local].to(device, non_blocking=cuda)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        yield x, labels[index]


def coins(n: int, seed: int, step: int) -> Tensor:
    """n times True or False (n,), each with probability 1/2. The complement `~` sets their generators apart from those
    of index_batches.
    """
    generator = torch.Generator().manual_seed(~(seed * 1_000_003 + step) % 2**32)
    return torch.rand(n, generator=generator) < 0.5
