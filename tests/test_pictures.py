"""Pictures and labels are read as they are: every kind of pixel, every way a folder or table says
its splits and classes, and one line for what makes no sense.
"""

import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import REAL, pictures, png

from cudlab.cli import main
from cudlab.config import Config, CorruptData, error_of
from cudlab.create import create_run
from cudlab.data import load_data
from cudlab.jobs import TrainingStopped
from cudlab.labels import name_classes, number_labels, parse_labels
from cudlab.pictures import read_picture, scale_to_bytes
from cudlab.run import Run
from cudlab.training import train

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


def encode(image, kind: str = "PNG", **about) -> bytes:
    "A picture as a file."
    out = io.BytesIO()
    image.save(out, kind, **about)
    return out.getvalue()


def read(blob: bytes) -> np.ndarray:
    "The pixels of a picture file."
    return np.asarray(read_picture(io.BytesIO(blob))[0])


def tiff(values: np.ndarray, bits: int, photometric: int = 1, order: str = "<") -> bytes:
    "A TIFF of one channel, with the tags that Pillow does not write."
    height, width = values.shape
    raw = values.tobytes()
    form = {"f": 3, "i": 2}.get(values.dtype.kind, 1)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, None)]
    tags += [(277, 1), (278, height), (279, len(raw)), (339, form)]
    start = 8 + 2 + 12 * len(tags) + 4
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    for tag, value in tags:
        out += struct.pack(order + "HHII", tag, 4, 1, start if value is None else value)
    return out + struct.pack(order + "I", 0) + raw


def write_pictures(root: Path, *places: str, content: bytes = None) -> Path:
    "A folder with a small grey picture at each place, each of another grey."
    for k, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        blob = content or encode(Image.new("L", (8, 8), 10 * k))
        (root / place).write_bytes(blob)
    return root


def write_table(data_folder, file: str = "train", **columns):
    "A parquet file of the set mnist, with ten pictures unless columns say other ones."
    import pyarrow as pa
    from pyarrow import parquet

    metadata = columns.pop("metadata", None)
    if not any(name in columns for name in ("image", "picture", "images")):
        columns = {
            "image": [{"bytes": png(a), "path": None} for a in pictures(10, (8, 8))]
        } | columns
    (data_folder / "mnist").mkdir(exist_ok=True)
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    parquet.write_table(table, data_folder / "mnist" / f"{file}.parquet")


def refusal(data_folder, **columns) -> str:
    "The line that a table is refused with."
    write_table(data_folder, **columns)
    message = error_of(load_data, "mnist")
    assert message.startswith("data = 'mnist': ") and "\n" not in message
    return message.split("train.parquet: ")[1]


# Pixels


def test_a_16_bit_ramp_keeps_its_256_levels(data_folder, tmp_path):
    for place in "abcdefghij":
        write_pictures(tmp_path / "deep", f"{place}.png", content=encode(Image.fromarray(RAMP)))
    found = load_data(f"folder:{tmp_path / 'deep'}@16")
    assert found.images.double().mean() == 127.5 and len(found.images.unique()) == 256
    blob = {"bytes": encode(Image.fromarray(RAMP)), "path": None}
    write_table(data_folder, image=[blob] * 4, label=[0, 1, 0, 1])
    assert np.array_equal(load_data("mnist").images[0, 0], found.images[0, 0])


@pytest.mark.parametrize("order", "<>")
def test_deep_pixels_of_every_byte_order_are_scaled_by_their_range(order):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = RAMP.astype(f"{order}u2")
    assert np.array_equal(read(tiff(deep, 16, order=order)), ramp)
    assert np.array_equal(read(tiff(RAMP.astype(f"{order}i4"), 32, order=order)), ramp)
    floats = (RAMP / 65535).astype(f"{order}f4")
    assert np.array_equal(read(tiff(floats, 32, order=order)), ramp)
    assert np.array_equal(read(encode(Image.fromarray(RAMP), "PPM")), ramp)
    assert np.array_equal(read(encode(Image.fromarray(RAMP), "JPEG2000")), ramp)


def test_white_may_be_zero_and_twelve_bits_are_enough():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read(tiff(RAMP, 16, photometric=0)), 255 - ramp)
    assert np.array_equal(read(tiff(ramp, 8, photometric=0)), 255 - ramp)
    packed = np.frombuffer(bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00]), np.uint8).reshape(2, 3)
    twelve = tiff(packed, 12)
    width = twelve.index(struct.pack("<HHII", 256, 4, 1, 3))
    twelve = twelve[: width + 8] + struct.pack("<I", 2) + twelve[width + 12 :]
    assert read(twelve).tolist() == [[255, 0], [128, 0]]


def test_numbers_without_a_range_are_refused_by_name():
    for values, says in (
        (np.full((2, 2), 200.0, np.float32), "mode F: pixels are float32 from 200 to 200"),
        (np.full((2, 2), np.nan, np.float32), "mode F"),
        (np.full((2, 2), -1, np.int32), "mode I with values from -1 to -1"),
        (np.full((2, 2), 70_000, np.int32), "mode I with values from 70000"),
        (np.full((2, 2), 200, np.int32), "mode I with values from 200 to 200 may mean anything"),
    ):
        assert says in error_of(read_picture, io.BytesIO(tiff(values, 32)))


def test_what_is_under_transparent_pixels_is_never_seen(data_folder, tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[:4] = 255, 0, 0, 255
    blob = encode(Image.fromarray(pixels))
    assert read(blob)[0, 0].tolist() == [255, 0, 0] and read(blob)[9, 9].tolist() == [255] * 3
    write_pictures(tmp_path / "clear", *(f"{k}.png" for k in range(10)), content=blob)
    found = load_data(f"folder:{tmp_path / 'clear'}@16")
    assert found.images.double().mean((0, 2, 3)).tolist() == [255, 191.25, 191.25]
    pixels[..., 3] = 128
    assert abs(int(read(encode(Image.fromarray(pixels)))[9, 9][0]) - 127) <= 1
    grey = Image.fromarray(np.stack([np.full((4, 4), 90), np.eye(4) * 255], -1).astype(np.uint8))
    assert np.array_equal(read(encode(grey)), np.where(np.eye(4), 90, 255))


def test_one_transparent_value_is_white():
    grey = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    assert read(encode(grey, transparency=1)).tolist() == [[0, 255], [2, 3]]
    assert read(encode(Image.fromarray(RAMP), transparency=0))[0, :2].tolist() == [255, 1]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert read(encode(palette)).tolist() == [[[200, 0, 0], [0, 0, 200]]]
    assert read(encode(palette, transparency=0)).tolist() == [[[255] * 3, [0, 0, 200]]]
    assert read(encode(palette, "GIF", transparency=1)).tolist() == [[[200, 0, 0], [255] * 3]]


def test_bits_ink_and_lab_become_what_a_viewer_shows():
    assert (
        read(encode(Image.fromarray(np.eye(4, dtype=bool)))).tolist() == (np.eye(4) * 255).tolist()
    )
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert read(encode(ink, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert np.abs(read(encode(ink, "JPEG", quality=95))[0, 0].astype(int) - [255, 0, 0]).max() < 9
    from PIL import ImageCms

    kinds = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    red = Image.new("RGB", (4, 4), (200, 30, 60))
    tones = ImageCms.profileToProfile(red, *kinds, outputMode="LAB")
    assert np.abs(read(encode(tones, "TIFF"))[0, 0].astype(int) - [200, 30, 60]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_stand_upright_from_every_source(kind, turn, data_folder, tmp_path):
    "EXIF: the first row is that side of the picture, the first column that one."
    stored = [UPRIGHT, UPRIGHT[:, ::-1], UPRIGHT[::-1, ::-1], UPRIGHT[::-1]]
    stored += [UPRIGHT.T, np.rot90(UPRIGHT), UPRIGHT[::-1, ::-1].T, np.rot90(UPRIGHT, -1)]
    tags = Image.Exif()
    tags[274] = turn
    lossless = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(stored[turn - 1]))
    blob = encode(image.convert("RGB"), kind, exif=tags, **lossless)
    assert np.array_equal(read(blob)[..., 0], UPRIGHT)
    _, found = read_picture(io.BytesIO(blob))
    assert (found.height, found.width) == UPRIGHT.shape
    write_table(data_folder, image=[blob])
    assert np.array_equal(load_data("mnist").images[0, 0], UPRIGHT)


def test_the_first_frame_and_page_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((9, 9, 9), (200, 9, 9))]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        blob = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(read(blob).astype(int) - 9).max() <= 1, kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_a_picture_that_is_cut_off_is_one_line_with_its_place(kind, data_folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    blob = encode(Image.fromarray(noise), kind)
    for share in (0, 0.3, 0.9):
        short = blob[: int(share * len(blob))]
        assert refusal(data_folder, image=[blob, short]).startswith("row 1: ")
    write_pictures(tmp_path / "cut", "a.png", "b.png")
    (tmp_path / "cut" / "b.png").write_bytes(short)
    message = error_of(load_data, f"folder:{tmp_path / 'cut'}")
    assert "b.png is not readable as an image: " in message and "\n" not in message


@given(st.integers(0, 65535), st.integers(0, 65535))
@settings(max_examples=60, deadline=None)
def test_scaling_keeps_the_order_and_the_ends(low, high):
    low, high = sorted((low, high))
    a, b = scale_to_bytes(np.array([low, high], np.uint16))
    assert a <= b and scale_to_bytes(np.array([0, 65535], np.uint16)).tolist() == [0, 255]
    assert abs(int(b) - high * 255 / 65535) <= 0.5
    same = scale_to_bytes(np.array([low, high]) / 65535)
    assert np.abs(same.astype(int) - [a, b]).max() <= 1


# Grey or colour


def test_one_coloured_picture_of_any_split_colours_all(data_folder, tmp_path):
    grey, red = png(np.zeros((8, 8), np.uint8)), encode(Image.new("RGB", (8, 8), (255, 0, 0)))
    write_table(data_folder, image=[grey, red])
    found = load_data("mnist")
    assert found.shape == (3, 8, 8) and found.images[1, :, 0, 0].tolist() == [255, 0, 0]
    write_table(data_folder, image=[grey, grey])
    assert load_data("mnist").shape == (1, 8, 8)
    write_table(data_folder, "test", image=[grey, red])
    assert load_data("mnist").shape == (3, 8, 8)
    place = write_pictures(tmp_path / "album", *(f"{k}.png" for k in range(10)))
    assert load_data(f"folder:{place}").shape == (1, 8, 8)
    (place / "9.png").write_bytes(red)  # the test split
    assert load_data(f"folder:{place}").shape == load_data(f"folder:{place}", "test").shape
    assert load_data(f"folder:{place}").shape == (3, 8, 8)


# Folders


def test_hidden_files_are_no_pictures_and_hidden_folders_no_classes(data_folder, tmp_path):
    place = write_pictures(tmp_path / "mac", *(f"{k}.png" for k in range(10)))
    for k in range(10):
        (place / f"._{k}.png").write_bytes(b"\0\5\x16\7")
    write_pictures(place, "__MACOSX/x.png", ".thumbs/y.png")
    (place / "Thumbs.db").write_bytes(b"")
    (place / "notes.txt").write_text("hello")
    found = load_data(f"folder:{place}@8")
    assert len(found) == 9 and found.classes == []
    assert found.source.left_out == {"hidden": 13, "not pictures": 1}
    names = [f"{kind}/{k}.png" for kind in ("a", "b", ".ipynb_checkpoints") for k in range(6)]
    found = load_data(f"folder:{write_pictures(tmp_path / 'book', *names)}")
    assert (len(found), found.classes) == (11, ["a", "b"])


def test_train_and_test_folders_are_splits(data_folder, tmp_path):
    names = [f"{split}/{kind}/{k}.png" for split in ("train", "test") for kind in ("cat", "dog")
             for k in range(3)]  # fmt: skip
    place = write_pictures(tmp_path / "pets", *names)
    for split in ("train", "test"):
        found = load_data(f"folder:{place}@8", split)
        assert (len(found), found.classes, found.labels.tolist()) == (
            6,
            ["cat", "dog"],
            [0] * 3 + [1] * 3,
        )
    assert "splits train/ and test/" in str(found.source)


def test_a_class_that_is_missing_in_a_split_shifts_no_other(data_folder, tmp_path):
    place = write_pictures(tmp_path / "pets", "train/cat/1.png", "train/dog/2.png",
                           "Test/dog/3.png", "Test/emu/4.png")  # fmt: skip
    train, test = (load_data(f"folder:{place}", split) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog", "emu"]
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [1, 2]
    names = [f"{kind}/{k}.png" for kind in "ab" for k in range(6)]  # the tenth is of class b
    assert load_data(f"folder:{write_pictures(tmp_path / 'ab', *names)}", "test").labels == 1


def test_validation_is_the_test_split_where_there_is_no_other(data_folder, tmp_path):
    place = write_pictures(tmp_path / "a", "train/x/1.png", "valid/x/2.png", "valid/y/3.png")
    assert len(load_data(f"folder:{place}", "test")) == 2
    write_pictures(place, "test/x/4.png", "extra/x/5.png", "6.png")
    found = load_data(f"folder:{place}", "test")
    assert len(found) == 1
    assert found.source.left_out == {"in valid/": 2, "in extra/": 1, "in no split": 1}


def test_which_folders_are_splits_and_which_are_classes(data_folder, tmp_path):
    place = write_pictures(tmp_path / "a", "train/1.png", "bus/2.png")
    assert load_data(f"folder:{place}").classes == ["bus", "train"]
    place = write_pictures(tmp_path / "b", *(f"train/x/{k}.png" for k in range(10)))
    assert load_data(f"folder:{place}").classes == ["x"]
    assert len(load_data(f"folder:{place}", "test")) == 1
    place = write_pictures(tmp_path / "deep", "pets/train/x/1.png", "pets/test/x/2.png")
    assert load_data(f"folder:{place}").classes == ["x"]
    assert len(load_data(f"folder:{place}", "test")) == 1
    place = write_pictures(tmp_path / "c", "test/1.png", "val/2.png")
    assert "no train beside it" in error_of(load_data, f"folder:{place}")
    place = write_pictures(tmp_path / "d", "train/1.png", "training/2.png", "test/3.png")
    assert "both mean the split train" in error_of(load_data, f"folder:{place}")
    place = write_pictures(tmp_path / "e", "1.png", "cat/2.png")
    found = load_data(f"folder:{place}")
    assert found.labels is None and "no classes, with pictures beside" in str(found.source)


def test_links_are_followed_and_circles_are_not(data_folder, tmp_path):
    place = write_pictures(tmp_path / "real", *(f"{k}.png" for k in range(3)))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(place)
    (tmp_path / "linked" / "dog").symlink_to(place)
    (place / "again").symlink_to(tmp_path / "linked")
    (place / "gone.png").symlink_to(tmp_path / "nothing.png")
    found = load_data(f"folder:{tmp_path / 'linked'}")
    assert (len(found), found.classes) == (6, ["cat", "dog"])
    assert found.source.left_out["links in a circle"] == 2


def test_names_of_any_bytes_are_read_and_named(data_folder, tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9", "實驗".encode(), b"a\x1b[31m")]
    place = write_pictures(tmp_path / "odd", *(f"{name}/{name}.png" for name in names))
    found = load_data(f"folder:{place}")
    assert found.classes == ["a\\x1b[31m", "caf\\udce9", "實驗"]
    "".join(found.classes).encode()
    (place / names[0] / f"{names[0]}.png").write_bytes(b"")
    error_of(load_data, f"folder:{place}").split("not readable")[0].encode()


def test_both_splits_have_the_same_side(data_folder, tmp_path):
    place = tmp_path / "grow"
    for k in range(10):
        write_pictures(place, f"{k}.png", content=encode(Image.new("L", (20 + k, 30))))
    assert load_data(f"folder:{place}").shape == load_data(f"folder:{place}", "test").shape
    write_pictures(place, "0.png", content=encode(Image.new("L", (1, 1))))
    assert "0.png is 1x1 pixels, too small" in error_of(load_data, f"folder:{place}")
    assert load_data(f"folder:{place}@8").shape == (1, 8, 8)


def test_an_archive_is_named_as_one(data_folder, tmp_path):
    (tmp_path / "pets.zip").write_bytes(b"PK")
    assert "unpack it first" in error_of(load_data, f"folder:{tmp_path / 'pets.zip'}@8")


def test_a_run_goes_on_with_the_classes_it_was_started_with(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    names = [f"{split}/{kind}/1.png" for split in ("train", "test") for kind in ("cat", "dog")]
    place = write_pictures(tmp_path / "pets", *names)
    config = dict(method="rf", data=f"folder:{place}", classes=True, steps=2, batch=2, warmup=1)
    run = create_run(Config(**config, net="digits"), "pets")
    with pytest.raises(TrainingStopped):
        list(train(run, until=1))
    write_pictures(place, "test/ant/1.png")
    with pytest.raises(CorruptData, match="has other classes than run 'pets'"):
        list(train(Run(run.dir)))
    shutil.rmtree(place / "test" / "ant")
    events = [str(event) for event in train(Run(run.dir))]
    assert events[1].startswith("data: 2 pictures; 8x8 pixels; mode L; classes from sub-folders")


# Tables and arrays


def test_labels_that_are_no_classes_are_refused_with_their_row(data_folder):
    names = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}
    for labels, about, says in (
        ([0, 1, 2, -1] * 2 + [0, 1], None, "row 3 has label -1"),
        ([0, 1, 2, 3] * 2 + [0, 1], names, "row 3 has label 3, and there are 3 classes"),
        ([0, 1, 2, 9] * 2 + [0, 1], names, "row 3 has label 9"),
        ([[0, 1]] * 10, None, "row 0 has label [0, 1]; needed is one number"),
        ([0] * 4 + [None] + [0] * 5, None, "row 4 has no label"),
        ([0.0] * 4 + [0.5] + [0.0] * 5, None, "row 4 has label 0.5, which is no whole number"),
        ([0.0] * 4 + [float("nan")] * 6, None, "row 4 has label nan"),
        (["cat"] * 4 + [""] * 6, None, "row 4 has label ''"),
        (["a"] * 4 + ["cow"] * 6, names, "row 4 has label cow"),
        (["x" * 5000] * 10, None, "1 to 200 characters"),
        ([2**40] * 10, None, "at most 100,000 classes"),
    ):
        assert says in refusal(data_folder, label=labels, metadata=about)


def test_labels_are_numbers_in_any_type_or_texts(data_folder):
    import pyarrow as pa

    numbers = [0, 1] * 5
    for kind in (pa.uint64(), pa.int8(), pa.float32(), pa.bool_()):
        write_table(data_folder, label=pa.array(numbers).cast(kind))
        found = load_data("mnist")
        assert (found.classes, found.labels.tolist()) == (["0", "1"], numbers), kind
    write_table(data_folder, label=pa.array(["dog", "cat"] * 5).dictionary_encode())
    found = load_data("mnist")
    assert (found.classes, found.labels.tolist()) == (["cat", "dog"], [1, 0] * 5)
    assert found.source.labels == "column label"


def test_classes_of_a_table_come_from_both_splits(data_folder):
    write_table(data_folder, "train", label=["dog", "emu"] * 5)
    write_table(data_folder, "test", label=["ape", "dog"] * 5)
    train, test = load_data("mnist"), load_data("mnist", "test")
    assert train.classes == test.classes == ["ape", "dog", "emu"]
    assert train.labels.tolist() == [1, 2] * 5 and test.labels.tolist() == [0, 1] * 5
    write_table(data_folder, "train", label=[0, 1] * 5)
    write_table(data_folder, "test", label=[0, -1] * 5)  # says so when it is asked for itself
    assert load_data("mnist").classes == ["0", "1"]
    assert "label -1" in error_of(load_data, "mnist", "test")


def test_columns_are_found_by_name_in_a_fixed_order(data_folder):
    blobs = [png(a) for a in pictures(4, (8, 8))]
    write_table(data_folder, picture=blobs, coarse_label=[0] * 4, fine_label=[3, 2, 1, 0])
    found = load_data("mnist")
    assert found.labels.tolist() == [3, 2, 1, 0] and found.source.labels == "column fine_label"
    write_table(data_folder, image=blobs, labels=[1] * 4, fine_label=[3, 2, 1, 0])
    assert load_data("mnist").source.labels == "column labels"


def test_a_row_without_a_picture_is_named(data_folder):
    import pyarrow as pa

    blob = png(np.zeros((8, 8), np.uint8))
    assert "row 1 has none" in refusal(data_folder, image=[blob, None])
    assert "row 0 has only a path" in refusal(data_folder, image=[{"bytes": None, "path": "a.png"}])
    flat = pa.array([[0] * 64] * 3, pa.list_(pa.int8()))
    assert "row 0 has a list, and needed is a picture file" in refusal(data_folder, image=flat)


def test_arrays_of_every_layout_and_number(data_folder):
    (data_folder / "mnist").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 6), dtype=np.uint8)
    for images, shape in (
        (pixels, (3, 8, 6)),
        (pixels.transpose(0, 2, 3, 1), (3, 8, 6)),
        (pixels[:, 0], (1, 8, 6)),
        (pixels[:, :1].transpose(0, 2, 3, 1), (1, 8, 6)),
        (pixels.astype(np.uint16) * 257, (3, 8, 6)),
        (pixels / 255, (3, 8, 6)),
        (pixels > 255, (3, 8, 6)),
    ):
        np.savez(
            data_folder / "mnist" / "train.npz", images=images, labels=np.array(["b", "a"] * 2)
        )
        found = load_data("mnist")
        assert found.shape == shape and found.classes == ["a", "b"]
        expected = pixels[:, : shape[0]] * (images.dtype != bool)
        assert np.array_equal(found.images, expected), images.dtype
    np.savez(data_folder / "mnist" / "train.npz", images=pixels, labels=np.array([{}] * 4))
    assert "not readable as npz" in error_of(load_data, "mnist")
    np.savez(
        data_folder / "mnist" / "train.npz",
        images=pixels,
        labels=[0, 1, 2, 3],
        classes=["a", "b", "c"],
    )
    assert "row 3 has label 3, and there are 3 classes" in error_of(load_data, "mnist")


ANY_LABEL = st.one_of(
    st.integers(-3, 12), st.floats(-2, 9), st.none(), st.booleans(), st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=2), st.just(2**70), st.just(float("nan")),
)  # fmt: skip


@given(st.lists(ANY_LABEL, min_size=1, max_size=6) | st.lists(st.integers(0, 5), min_size=1))
@settings(max_examples=100, deadline=None)
def test_every_label_is_a_class_or_one_line(values):
    try:
        labels = parse_labels(values)
        classes = name_classes([labels])
        numbers = number_labels(labels, classes)
    except ValueError as e:
        assert str(e) and "\n" not in str(e).replace(repr("\n"), "")
        return
    assert numbers.shape == (len(values),) and numbers.dtype == np.int64
    assert ((numbers >= 0) & (numbers < len(classes))).all()
    for value, number in zip(values, numbers.tolist()):
        assert classes[number] == (value if isinstance(value, str) else str(int(value)))


# What was understood


@pytest.mark.parametrize(
    "name, hashes",
    [
        ("digits", ("9b311731c38d", "3ca2e61ff40f")),
        ("mnist", ("741c988805d0", "6d87418db22c")),
        ("fashion_mnist", ("2e487a6c8912", "c867c93ff953")),
        ("cifar10_jpeg", ("16d2ec364c8f", "ad3dd49ece76")),
    ],
)
def test_what_shipped_runs_know_by_hash_is_the_same_content(name, hashes):
    "Slow where nothing is cached yet: 70,000 pictures are decoded."
    if name != "digits" and not (REAL / name / "train.parquet").is_file():
        pytest.skip(f"no {REAL / name}")
    assert tuple(load_data(name, split).hash for split in ("train", "test")) == hashes


def test_the_command_says_what_was_understood(data_folder, tmp_path, capsys):
    names = [f"{split}/{kind}/{k}.png" for split in ("train", "test") for kind in ("cat", "dog")
             for k in range(3)]  # fmt: skip
    place = write_pictures(tmp_path / "pets", *names, "train/cat/._1.png")
    sheet = tmp_path / "sheet.png"
    assert main(["data", f"{place}@8", "--out", str(sheet)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["splits"] == "train 6; test 6" and said["classes"] == "2: cat (3), dog (3)"
    assert said["source"].startswith("6 pictures; 8x8 pixels; mode L; classes from sub-folders")
    assert "left out: 1 hidden" in said["source"]
    values = np.arange(0, 60, 10)
    assert f"mean {values.mean():.2f}, standard deviation {values.std():.2f} " in said["values"]
    assert said["hash"] == load_data(f"folder:{place}@8").hash and said["sheet"] == str(sheet)
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 4 * 96
    assert not list(tmp_path.glob(".*.part"))


def test_the_command_knows_sets_points_and_bad_input(data_folder, tmp_path, capsys):
    for name in ("digits", "moons"):
        assert main(["data", name, "--split", "test"]) == 0
        path = capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)[1]
        assert Image.open(path).width > 300
    write_table(data_folder, label=[0, -1] * 5)
    for argv, code in (
        (["mnist"], 5),
        (["mnits"], 2),
        ([str(tmp_path / "nowhere")], 5),
        ([str(data_folder)], 5),
        (["digits", "--split", "val"], 2),
        (["digits", "--out", str(tmp_path)], 2),
        (["digits", "--out", "no/such/place.png"], 2),
        ([], 2),
    ):
        assert main(["data", *argv]) == code, argv
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1
