"""Images as one uint8 tensor with their labels, and endless batches of them. This file does not know the network.

MNIST and its relatives come through torchvision. Any other data set is a folder:

    FOLDER/class-a/1.png, FOLDER/class-b/2.png ...     a folder for each class, in the order a, b ... or 1, 2 ... 10
    FOLDER/1.png, FOLDER/2.png ...                     no classes: for an unconditional model

Pixels are stored as 0 ... 255. The network sees them as -1 ... 1. (For latents in place of pixels, see latents.py.)
"""

import contextlib
import hashlib
import itertools
import math
import re
import socket
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

# The class of each data set in torchvision.datasets.
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DIGITS = tuple("0123456789")
MNIST_5000 = Path(__file__).parent / "assets" / "mnist-5000.npz"  # the first 500 training images of each digit
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_MD5 = (
    "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOLDER_IMAGE_SIZE = 32     # pixels of a folder's images, where no other size is asked for
MEMORY_LIMIT = 4 * 2**30   # bytes of pixels
RESIZE_AT_ONCE = 2**24     # bytes of pixels, which take several times as much while they are resized
DOWNLOAD_TIMEOUT = 20      # seconds without an answer


class DataError(Exception):
    """The data cannot be had. The message is one line that names the fix."""

    exit_status = 2


@dataclass
class Images:
    """A data set of N square images of S pixels a side."""

    pixels: Tensor            # uint8 (N, C, S, S); latents are float32
    labels: Tensor            # int64 (N,)
    classes: tuple[str, ...]  # the names of the classes, () for none
    source: str               # where the images come from, in words
    name: str = ""            # the name under which `load` found them, "" for a folder

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


def check_memory(source: str, n: int, channels: int, size: int) -> None:
    """Raises DataError where n images of `size` pixels do not fit in memory."""
    if n * channels * size**2 > MEMORY_LIMIT:
        largest = int((MEMORY_LIMIT / (n * channels)) ** 0.5)
        raise DataError(f"{source} of {size} pixels do not fit in memory: use --image-size {largest} or less")


def resized(images: Images, size: int | None) -> Images:
    """The images at another size in pixels. Raises DataError where they would not fit in memory."""
    n, channels, own_size, _ = images.pixels.shape
    if size is None or size == own_size:
        return images
    check_memory(images.source, n, channels, size)
    at_once = max(1, RESIZE_AT_ONCE // (channels * size**2))
    resize = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    parts = [resize(part.float()).round().clamp(0, 255).byte() for part in images.pixels.split(at_once)]
    images.pixels = torch.cat(parts)
    return images


# ------------------------------------------------------------------------------------------------------------ folders


def from_folder(root: Path, size: int) -> Images:
    """The images below a folder, see the top of this file: resized on the shorter side and cropped at the centre.

    They have one channel if all of them are grey, else three. Files and folders whose names begin with a dot are
    skipped. Raises DataError.
    """
    classes = class_folders(root)
    pattern = "**/*" if classes else "*"
    files = [(path, label) for label, name in enumerate(classes or [""]) for path in image_files(root / name, pattern)]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    for label, name in enumerate(classes or [""]):
        if label not in labels:
            raise DataError(f"{root / name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): put some in")
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of damaged EXIF tags
        pixels = read_files(files, f"{len(files):,} images of {root.resolve().name}", size)
    names = tuple(unicodedata.normalize("NFC", name) for name in classes)  # macOS writes é as e and an accent
    return Images(pixels, labels, names, f"{len(files):,} images of {root.resolve().name}")


def read_files(files: list[tuple[Path, int]], source: str, size: int) -> Tensor:
    """Image files as pixels, uint8 (N, C, size, size). Raises DataError."""
    mode = "L" if all(is_grey(path) for path, _ in files) else "RGB"
    check_memory(source, len(files), len(mode), size)

    read, paths = partial(read_image, mode=mode, size=size), [path for path, _ in files]
    # Threads are enough, since decoding releases Python's lock.
    return torch.stack(thread_map(read, paths, desc=f"reading {source}", unit="image", leave=False, disable=None))


def class_folders(root: Path) -> list[str]:
    """The names of the class folders, [] for a folder that holds images itself. Raises DataError for a mixture."""
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    names = sorted((entry.name for entry in entries if entry.is_dir()), key=natural)
    names = [name for name in names if not name.startswith("__")]  # macOS and Python leave such folders
    if names and any(entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        raise DataError(f"{root} holds both images and folders: keep a folder for each class, or only images")
    return names


def natural(name: str) -> list:
    """A key that sorts "2" before "10"."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def image_files(folder: Path, pattern: str) -> list[Path]:
    """The image files below a folder. Links to folders are not followed, since they may loop."""
    found = []
    for path in sorted(folder.glob(pattern)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            found.append(path)
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, to be read inside. Raises DataError, naming the file, where it is broken."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error}): delete or replace it") from error


def is_grey(path: Path) -> bool:
    with opened(path) as image:
        return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def read_image(path: Path, mode: str, size: int) -> Tensor:
    """An image file as it should be seen, uint8 (C, size, size): upright, 8 bits, on white where it is transparent,
    resized on the shorter side and cropped at the centre.

    mode: L for grey, RGB for colour. 16 bits are scaled to 8; 32 bits are refused, since nothing says which of
    their values is white. Raises DataError.
    """
    with opened(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits: save it with 8 or 16 bits")
        image.load()
        with contextlib.suppress(Exception):  # a damaged EXIF tag says nothing of the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if image.mode in ("1", "L") else "RGB").convert(mode)
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).view(size, size, len(mode)).permute(2, 0, 1)


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
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches (images float32 (b, C, S, S) in -1 ... 1, labels int64 (b,)), from step `start` on.

    batch_size counts the images of all processes together. Process number `rank` of `world` gets the rank-th part of
    each batch, so b = batch_size / world.
    """
    local = slice(batch_size // world * rank, batch_size // world * (rank + 1))
    pixels, labels = data.pixels.to(device), data.labels.to(device)
    cuda = pixels.device.type == "cuda"
    for index in index_batches(len(data.labels), batch_size, seed, start):
        index = index[local].to(device, non_blocking=cuda)  # without waiting for what the GPU still has to do
        yield to_float(pixels[index]), labels[index]
