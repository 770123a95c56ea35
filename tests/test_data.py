"""Evaluation files: what is read, and what is refused before any work."""

import numpy as np
import pytest
from PIL import Image

from dfq.data import batches, check
from dfq.types import DataSpec, InputError
from tests.tiny import DATA, save_images


def _refused(path, data=DATA):
    with pytest.raises(InputError) as caught:
        check(path, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _folder(path, size=(8, 8), classes=("ant", "bee", "cow", "dog"), mode="L"):
    path.mkdir()
    (path / "README.txt").write_text("beside the folders, as people do")
    for value, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(2):
            color = 10 * value + index
            Image.new(mode, size, color if mode == "L" else (color, 0, 255)).save(
                path / name / f"{index}.png"
            )
    return path


def test_npz_batches_keep_order_and_bytes(tmp_path):
    path = save_images(tmp_path / "e.npz", 10)
    assert check(path, DATA) == 10
    parts = list(batches(path, DATA, 4))
    assert [len(part.labels) for part in parts] == [4, 4, 2]
    stored = np.load(path)
    np.testing.assert_array_equal(np.concatenate([p.pixels for p in parts]), stored["x"])
    np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), stored["y"])


def test_labels_of_any_integer_type_are_read(tmp_path):
    path = save_images(tmp_path / "e.npz", 10, y=np.arange(10, dtype=np.uint8) % 4)
    assert next(batches(path, DATA, 10)).labels.dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((40, 8, 8, 3), np.uint8)}, ["[40, 8, 8, 3]", "[N, 8, 8, 1]"]),
        ({"x": np.zeros((40, 1, 8, 8), np.uint8)}, ["[40, 1, 8, 8]", "[N, H, W, C]"]),
        ({"x": np.zeros((40, 8, 8), np.uint8)}, ["[40, 8, 8]"]),
        ({"x": np.zeros((40, 8, 8, 1), np.float32)}, ["float32", "uint8"]),
        ({"x": np.zeros((0, 8, 8, 1), np.uint8)}, ["no images"]),
        ({"y": np.zeros(39, np.int64)}, ["int64 [39]", "int64 [40]"]),
        ({"y": np.zeros((40, 4), np.int64)}, ["[40, 4]"]),
        ({"y": np.zeros(40)}, ["float64"]),
        ({"y": np.arange(40)}, ["from 0 to 39", "0..3"]),
        ({"y": np.full(40, -1)}, ["from -1 to -1"]),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, changes, words):
    sentence = _refused(save_images(tmp_path / "e.npz", **changes))
    for word in words:
        assert word in sentence


def test_an_npz_without_labels_is_refused(tmp_path):
    np.savez(tmp_path / "e.npz", x=np.zeros((2, 8, 8, 1), np.uint8))
    assert "y (int64 [N])" in _refused(tmp_path / "e.npz")


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
    labels = np.array([object(), object()], dtype=object)
    np.savez(tmp_path / "e.npz", x=np.zeros((2, 8, 8, 1), np.uint8), y=labels)
    assert "corrupt" in _refused(tmp_path / "e.npz")


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_corrupt_npz_is_refused(tmp_path, damage):
    path = save_images(tmp_path / "e.npz", 4000)
    content = bytearray(path.read_bytes())
    content[100_000] ^= 255  # a pixel far from the header: only the checksum can tell
    path.write_bytes({"cut": content[:500], "flip": content, "text": b"hello"}[damage])
    assert "corrupt" in _refused(path)


def test_a_missing_file_and_a_wrong_kind_are_refused(tmp_path):
    assert "no evaluation file" in _refused(tmp_path / "none.npz")
    (tmp_path / "labels.csv").write_text("1,2")
    assert ".npz file or a folder" in _refused(tmp_path / "labels.csv")


def test_folders_give_labels_in_the_order_of_their_names(tmp_path):
    path = _folder(tmp_path / "e")
    assert check(path, DATA) == 8
    (batch,) = batches(path, DATA, 100)
    np.testing.assert_array_equal(batch.labels, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(batch.pixels[:, 3, 3, 0], [0, 1, 10, 11, 20, 21, 30, 31])


def test_images_of_another_size_are_resized_and_cropped_in_the_middle(tmp_path):
    path = _folder(tmp_path / "e", size=(64, 32), mode="RGB")
    stripe = Image.new("RGB", (64, 32))
    stripe.paste((255, 255, 255), (16, 0, 48, 32))  # the middle half is white
    stripe.save(path / "ant" / "0.png")
    pixels = next(batches(path, DataSpec((3, 8, 8), 4), 1)).pixels
    assert pixels.shape == (1, 8, 8, 3)
    assert pixels.min() == 255  # 8 of 8 / 0.875 * 2 columns around the middle: all white


def test_a_folder_with_another_number_of_classes_is_refused(tmp_path):
    path = _folder(tmp_path / "e", classes=("ant", "bee"))
    assert "2 class folders and must hold 4" in _refused(path)


def test_a_folder_without_images_is_refused(tmp_path):
    for name in "abcd":
        (tmp_path / "e" / name).mkdir(parents=True)
    assert "no images" in _refused(tmp_path / "e")


def test_a_broken_image_is_named(tmp_path):
    path = _folder(tmp_path / "e")
    (path / "bee" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bee/0\.png cannot be read"):
        list(batches(path, DATA, 100))


def test_folders_need_pillow(tmp_path, monkeypatch):
    path = _folder(tmp_path / "e")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert "pip install pillow" in _refused(path)
