"""Data: order as a function of (seed, step), every way a data set arrives, and every way it can
fail.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from cudlab import readers
from cudlab.config import error_of
from cudlab.data import DATA, POINTS, Images, load_data

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def png(array: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def write_parquet(file: Path, arrays, labels=None, column="image", names=("zero", "one")):
    "A file as `datasets` writes it."
    from datasets import ClassLabel, Dataset, Features, Image, Value

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {column: [{"bytes": png(a), "path": None} for a in arrays]}
    kinds = {column: Image()}
    if labels is not None:
        rows["label"] = labels
        kinds["label"] = ClassLabel(names=list(names)) if names else Value("int64")
    Dataset.from_dict(rows, features=Features(kinds)).to_parquet(file)


def pictures(n, shape=(28, 28)):
    return list(np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8))


def toy(n=10, flip=False, side=2):
    images = torch.arange(n * side, dtype=torch.uint8).view(n, 1, 1, side)
    return Images("toy", "train", (1, 1, side), [], flip=flip, images=images)


@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.integers(0, 40),
    st.integers(0, 2**63 - 1),
    st.booleans(),
)
@budget(max_examples=60, deadline=None)
def test_batch_depends_on_seed_and_step_alone(n, batch, step, seed, flip):
    used, fresh = toy(n, flip), toy(n, flip)
    for earlier in range(max(0, step - 3), step):
        used.batch(seed, earlier, batch)
    assert torch.equal(used.batch(seed, step, batch)[0], fresh.batch(seed, step, batch)[0])


@given(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 20))
@budget(max_examples=60, deadline=None)
def test_slices_of_the_processes_are_the_global_batch(n, parts, step):
    source, total = toy(n, True), sum(parts)
    starts = [sum(parts[:k]) for k in range(len(parts))]
    slices = [source.batch(5, step, p, s, total)[0] for p, s in zip(parts, starts)]
    assert torch.equal(torch.cat(slices), source.batch(5, step, total)[0])


@pytest.mark.parametrize("name", POINTS)
def test_points_are_fresh_pure_and_unit_variance(name):
    a, b = load_data(name), load_data(name)
    assert torch.equal(a.batch(1, 9, 64)[0], b.batch(1, 9, 64)[0])
    parts = torch.cat([a.batch(1, 9, 16, start, 64)[0] for start in (0, 16, 32, 48)])
    torch.testing.assert_close(parts, b.batch(1, 9, 64)[0], rtol=0, atol=1e-5)
    assert not torch.equal(a.batch(1, 9, 64)[0], a.batch(1, 10, 64)[0])
    assert not torch.equal(a.all(64)[0], load_data(name, "test").all(64)[0])
    torch.testing.assert_close(a.all()[0][:64], a.all(64)[0], rtol=0, atol=1e-5)
    assert len(a.all()[0]) == len(a)
    x, y = a.batch(0, 0, 200_000)
    assert x.double().mean(0).abs().max() < 0.01 and (x.double().var(0) - 1).abs().max() < 0.01
    assert y.unique().tolist() == list(range(len(a.classes)))
    assert a.hash != load_data(name, "test").hash


def test_every_epoch_visits_every_image_once_and_each_in_another_order():
    source = toy(10)
    seen = torch.cat([source.batch(3, k, 4)[0] for k in range(10)])[:, 0, 0, 0].view(4, 10)
    assert all(len(set(epoch.tolist())) == 10 for epoch in seen)
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 4


def test_half_of_the_images_are_mirrored_and_all_is_not():
    source = toy(100, flip=True)
    x = source.batch(0, 0, 100)[0]
    mirrored = (x[:, 0, 0, 0] > x[:, 0, 0, 1]).float().mean()
    assert 0.3 < mirrored < 0.7
    assert (source.all()[0][:, 0, 0, 0] < source.all()[0][:, 0, 0, 1]).all()


def test_digits_are_all_scans_once():
    train, test = load_data("digits"), load_data("digits", "test")
    assert (len(train), len(test)) == (1500, 297)
    from sklearn.datasets import load_digits

    scans = sorted(s.tobytes() for s in np.round(load_digits().images * 255 / 16).astype(np.uint8))
    assert sorted(i.numpy().tobytes() for i in torch.cat([train.images, test.images])) == scans
    assert train.hash == load_data("digits").hash and len(train.hash) == 12
    x0, y = train.all(5)
    assert x0.shape == (5, 1, 8, 8) and x0.dtype == torch.float32 and y.dtype == torch.int64


def test_parquet_is_read_and_then_cached(data_folder, monkeypatch):
    images = pictures(12)
    write_parquet(data_folder / "mnist" / "train.parquet", images, [0, 1] * 6)
    first = load_data("mnist")
    assert np.array_equal(first.images.numpy()[:, 0], np.stack(images))
    assert first.classes == ["zero", "one"] and first.labels.tolist() == [0, 1] * 6
    assert first.all()[0].min() >= -1 and first.all()[0].max() <= 1
    monkeypatch.setattr(readers, "decode_table", lambda *a: pytest.fail("decoded twice"))
    assert load_data("mnist").hash == first.hash


def test_a_changed_parquet_is_another_cache_entry(data_folder):
    write_parquet(data_folder / "mnist" / "train.parquet", pictures(5), [0] * 5)
    before = load_data("mnist").hash
    write_parquet(data_folder / "mnist" / "train.parquet", pictures(7), [0] * 7)
    assert load_data("mnist").hash != before and len(load_data("mnist")) == 7


def test_a_damaged_cache_is_decoded_again(data_folder):
    write_parquet(data_folder / "mnist" / "train.parquet", pictures(5), [0] * 5)
    before = load_data("mnist").hash
    (saved,) = (data_folder.parent / "cache").glob("*.npz")
    saved.write_bytes(saved.read_bytes()[:100])
    assert load_data("mnist").hash == before
    assert not list((data_folder.parent / "cache").glob("*.part"))


def test_a_cache_that_cannot_be_written_costs_only_time(data_folder, monkeypatch):
    write_parquet(data_folder / "mnist" / "train.parquet", pictures(5), [0] * 5)
    blocked = data_folder.parent / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(blocked / "cache"))
    assert len(load_data("mnist")) == 5


def test_colour_img_column_and_no_labels(data_folder):
    write_parquet(data_folder / "cifar10" / "train.parquet", pictures(4, (32, 32, 3)), column="img")
    found = load_data("cifar10")
    assert (
        found.shape == (3, 32, 32) and found.flip and found.labels is None and found.classes == []
    )
    assert found.batch(0, 0, 2)[1] is None


def test_numbered_classes_where_the_table_names_none(data_folder):
    write_parquet(data_folder / "mnist" / "train.parquet", pictures(4), [0, 1, 2, 1], names=None)
    assert load_data("mnist").classes == ["0", "1", "2"]


def test_npz_comes_first(data_folder):
    write_parquet(data_folder / "mnist" / "train.parquet", pictures(5), [0] * 5)
    np.savez(
        data_folder / "mnist" / "train.npz",
        images=np.zeros((3, 1, 4, 4), np.uint8),
        labels=np.array([0, 2, 1]),
    )
    found = load_data("mnist")
    assert (len(found), found.shape, found.classes) == (3, (1, 4, 4), ["0", "1", "2"])


def test_unfit_npz(data_folder):
    (data_folder / "mnist").mkdir()
    pixels = np.zeros((3, 1, 4, 4), np.uint8)
    for arrays, says in (
        ({"pictures": np.zeros(3)}, "no array images"),
        ({"images": pixels + 1.5}, "float64"),
        ({"images": pixels.astype(int)}, "int64"),
        ({"images": pixels[:, 0, 0]}, "(3, 4)"),
        ({"images": pixels[:0]}, "(0, 1, 4, 4)"),
        ({"images": np.zeros((3, 4, 4, 4), np.uint8)}, "1 or 3 channels"),
        ({"images": pixels, "labels": np.arange(3), "classes": 3}, "classes has shape ()"),
        ({"images": pixels, "labels": np.arange(2)}, "labels"),
        ({"images": np.array([{}], dtype=object)}, "not readable"),
    ):
        np.savez(data_folder / "mnist" / "train.npz", **arrays)
        message = error_of(load_data, "mnist")
        assert says in message and message.startswith("data = 'mnist'") and "\n" not in message


def test_corrupt_parquet(data_folder):
    (data_folder / "mnist").mkdir()
    noise = np.random.default_rng(0).bytes(2000)
    for content in (b"", b"PAR1 this is not parquet PAR1", noise):
        (data_folder / "mnist" / "train.parquet").write_bytes(content)
        assert "not readable as parquet" in error_of(load_data, "mnist")


def test_parquet_with_broken_or_uneven_images(data_folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data_folder / "mnist").mkdir()
    file = data_folder / "mnist" / "train.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"no image", "path": ""}], "label": [0]}), file)
    message = error_of(load_data, "mnist")
    assert "row 0: not a whole picture in a format" in message and "0x" not in message
    write_parquet(file, [np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)], [0, 1])
    assert "row 1 is 5x4, the first one 4x4" in error_of(load_data, "mnist")
    pq.write_table(pa.table({"words": ["a"]}), file)
    assert "no column image or images or img" in error_of(load_data, "mnist")


def test_missing_data_says_the_three_ways(data_folder, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline mode")),
    )
    message = error_of(load_data, "mnist")
    assert "data = 'mnist' is not here" in message and "offline mode" in message
    for way in (str(data_folder / "mnist"), "pip install datasets", "digits", "folder:PATH"):
        assert way in message
    assert "not on the hub" in error_of(load_data, "cifar10_jpeg")


def test_a_hub_that_does_not_answer_fails_fast(data_folder, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub does not answer" in error_of(load_data, "mnist")


def test_hub_through_the_datasets_library(data_folder, monkeypatch, tmp_path):
    import datasets

    real, asked = datasets.load_dataset, []
    write_parquet(tmp_path / "hub" / "test.parquet", pictures(6), [0, 1] * 3)

    def fake(repo, split):
        asked.append((repo, split))
        return real(
            "parquet",
            data_files={split: str(tmp_path / "hub" / f"{split}.parquet")},
            split=split,
            cache_dir=str(tmp_path / "hf"),
        )

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", fake)
    found = load_data("fashion_mnist", "test")
    assert np.array_equal(found.images.numpy()[:, 0], np.stack(pictures(6))) and found.classes == [
        "zero",
        "one",
    ]
    assert load_data("fashion_mnist", "test").hash == found.hash
    assert asked == [("zalando-datasets/fashion_mnist", "test")]


@pytest.fixture
def album(tmp_path):
    "A folder with two classes of twelve pictures each, of different sizes."
    from PIL import Image

    for k in range(12):
        for kind in ("cat", "dog"):
            (tmp_path / "album" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20 + k, 30), 10 * k, np.uint8)).save(
                tmp_path / "album" / kind / f"{k:02}.png"
            )
    return tmp_path / "album"


def test_folder_of_images(data_folder, album):
    train, test = load_data(f"folder:{album}@16"), load_data(f"folder:{album}@16", "test")
    assert (len(train), len(test), train.shape, train.classes) == (
        22,
        2,
        (1, 16, 16),
        ["cat", "dog"],
    )
    assert train.images.flatten(1).float().std(1).max() == 0
    assert train.labels.bincount().tolist() == [11, 11]
    assert load_data(f"folder:{album}").shape == (1, 20, 20)


def test_one_coloured_picture_makes_the_folder_coloured(data_folder, album):
    from PIL import Image

    Image.new("RGB", (40, 40), (255, 0, 0)).save(album / "cat" / "red.jpg")
    assert load_data(f"folder:{album}@16").shape == (3, 16, 16)


def test_flat_folder_with_an_at_sign_has_no_classes(data_folder, tmp_path):
    from PIL import Image

    place = tmp_path / "me@home"
    place.mkdir()
    Image.new("L", (100, 90)).save(place / "one.png")
    found = load_data(f"folder:{place}")
    assert found.shape == (1, 64, 64) and found.classes == [] and found.labels is None
    assert load_data(f"folder:{place}@32").shape == (1, 32, 32)


def test_folder_errors(data_folder, album, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in" in error_of(load_data, f"folder:{tmp_path / 'empty'}")
    assert "there is no folder" in error_of(load_data, "folder:/no/such/place")
    assert "there is no folder" in error_of(load_data, "folder:")
    for size in ("x", "2", "9999", "-4", ""):
        assert "is not a whole number from 4 to 512" in error_of(
            load_data, f"folder:{album}@{size}"
        ), size
    (album / "cat" / "00.png").write_bytes(b"\x89PNG broken")
    for name in (f"folder:{album}@16", f"folder:{album}"):
        assert "00.png is not readable as an image" in error_of(load_data, name)
    (tmp_path / "empty" / "a.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    assert "fewer than ten" in error_of(load_data, f"folder:{tmp_path / 'empty'}", "test")


def test_unknown_names():
    assert "did you mean 'mnist'" in error_of(load_data, "mnits")
    assert "did you mean 'train'" in error_of(load_data, "digits", "trian")
    for bad in (None, 3, "", "../mnist"):
        assert "unknown data set" in error_of(load_data, bad)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10_jpeg"])
def test_the_real_sets(name):
    if not (REAL / name / "train.parquet").is_file():
        pytest.skip(f"no {REAL / name}")
    train, test, colour = load_data(name), load_data(name, "test"), name == "cifar10_jpeg"
    shape, count = ((3, 32, 32), 50_000) if colour else ((1, 28, 28), 60_000)
    assert (train.shape, len(train), len(test), len(train.classes)) == (shape, count, 10_000, 10)
    assert train.hash != test.hash
    assert ("JPEG" in train.note) == train.flip == colour


def test_every_registered_loader_is_a_function_of_split_and_device(data_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in DATA:
        try:
            assert load_data(name).name == name
        except ValueError as e:
            assert str(e).startswith(f"data = {name!r}")
