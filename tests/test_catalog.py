"""The list of runs: cheap, current, honest about damage, and closed to links."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from cudlab.catalog import _cache, best_score, config_diff, get_run_info, list_runs
from cudlab.checkpoint import (
    checkpoint_dir,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from cudlab.config import CorruptData, get_settings
from cudlab.disk import run_lock
from cudlab.run import Run

SMALL = "digits-dode-euler5"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs, and a function that puts a copy of a small shipped run into it."
    folder = tmp_path / "runs"
    folder.mkdir()
    source = get_settings().checkpoints_path / SMALL
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(folder))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(source, folder / name))

    copy.folder = folder
    return copy


def mine() -> dict:
    return {r.name: r for r in list_runs() if not r.shipped}


OPENED = []  # paths, while WATCH says so
WATCH = []


def watch(event: str, args: tuple) -> None:
    "An audit hook: which files are opened."
    if event == "open" and WATCH and isinstance(args[0], (str, bytes, os.PathLike)):
        OPENED.append(os.fsdecode(args[0]))


sys.addaudithook(watch)


def opened_by_a_listing(folder: Path) -> list:
    OPENED.clear()
    WATCH.append(True)
    try:
        list_runs()
    finally:
        WATCH.clear()
    return [Path(path).name for path in OPENED if path.startswith(str(folder))]


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_no_weights_are_opened_and_nothing_twice(lab, count):
    for i in range(count):
        lab(f"run-{i}")
    _cache.clear()
    files = opened_by_a_listing(lab.folder)
    small = {"config.json", "checkpoint.json", "SHA256SUMS", "scores.jsonl", "status.json"}
    assert {"config.json", "scores.jsonl"} <= set(files) <= small and len(files) >= 3 * count
    assert len(opened_by_a_listing(lab.folder)) == 0
    (lab.folder / "run-7" / "scores.jsonl").write_text("{}\n")
    again = opened_by_a_listing(lab.folder)
    assert set(again) == set(files) and len(again) == len(files) // count


def test_a_listing_from_memory_is_the_listing_of_a_fresh_process(lab):
    for name in "abcdef":
        lab(name)
    before = mine()
    a = before["a"]
    assert a.best["extractor"] == "digits-v2" and a.teacher == "digits-rf" and a.parameters == 5
    assert a.changed.endswith("+00:00") and a.status == "done"
    save_checkpoint(lab.folder / "a", 4, {}, {})
    shutil.rmtree(checkpoint_dir(lab.folder / "a", 5))
    (checkpoint_dir(lab.folder / "b", 5) / "ema.safetensors").unlink()
    os.truncate(checkpoint_dir(lab.folder / "c", 5) / "ema.safetensors", 10)
    score = Run.open("d").scores[0] | {"fd": 0.5, "seed": 77, "head": 2}
    Run.open("d").add_score(score)
    shutil.rmtree(lab.folder / "e")
    lab("g")
    now = mine()
    _cache.clear()
    assert mine() == now
    assert now["a"].step == 4 and now["a"].status == "new" and now["f"] == before["f"]
    assert set(now) == set("abcdfg") and now["d"].best["fd"] == 0.5
    assert "ema.safetensors" in now["b"].damaged and "ema.safetensors" in now["c"].damaged


DEEP = "[" * 100_000


ODD = ["not json", "[]", "{}", DEEP, '{"step": 5}', "\ud800", None]


@pytest.mark.parametrize("content", ODD, ids=range(7))
@pytest.mark.parametrize("file", ["config.json", "checkpoint.json", "SHA256SUMS"])
def test_a_damaged_run_is_listed_with_its_reason(lab, file, content):
    lab("good")
    folder = lab("broken")
    path = folder / file if file == "config.json" else newest_checkpoint(folder) / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode(errors="surrogatepass"))
    found = mine()
    assert found["broken"].damaged.startswith("run 'broken' is damaged: ")
    assert not found["good"].damaged
    assert get_run_info("broken").damaged == found["broken"].damaged


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"red \x1b[31m", b"two\nlines", "‮turned".encode()], ids=range(4)
)
def test_a_name_that_cannot_be_shown_is_escaped_and_stops_nothing(lab, name):
    lab("good")
    shutil.copytree(lab.folder / "good", lab.folder / os.fsdecode(name))
    found = mine()
    odd = next(r for r in found.values() if r.name != "good")
    assert odd.name.isprintable() and odd.damaged.isprintable() and not found["good"].damaged
    assert "cannot be shown" in odd.damaged


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "3",
        '{"fd": NaN, "step": 5}',
        '{"fd": -Infinity, "step": 5}',
        '{"fd": "low"}',
        '{"fd": true, "step": 5}',
        '{"fd": 0.1, "step": 5, "nfe": [1]}',
        '{"fd": 0.1, "step": 5, "seed": "a"}',
        '{"fd": 0.1, "step": 5, "seed": null}',
        '{"fd": 0.1, "step": 5, "n": 1e9}',
        '{"fd": 0.1, "step": 5, "solver": ["euler"]}',
        '{"fd": 1' + 400 * "0" + ', "step": 5}',
        '{"fd": 0.1,,',
        '{"fd": 0.1, "step": 5, "solver": "\\ud800"}',
        "\x00",
    ],
)
def test_odd_lines_of_scores_are_marked_and_do_no_harm(lab, line):
    file = lab("odd") / "scores.jsonl"
    was, scores = mine()["odd"].best, Run.open("odd").scores
    assert not mine()["odd"].odd
    file.write_text(line + "\n" + file.read_text() + line + "\n")
    found = mine()["odd"]
    assert found.best == was and not found.damaged and Run.open("odd").scores == scores
    assert found.odd == "2 odd lines in scores.jsonl"
    run = Run.open("odd")
    assert run.add_score({"fd": 3.0, "nfe": 9, "step": 5}) and run.scores[-1]["nfe"] == 9


def test_texts_of_scores_are_shown_without_control_characters(lab):
    file = lab("red") / "scores.jsonl"
    row = dict(fd=0.1, step=5, nfe=1, solver="\x1b[31meuler", extractor="digits-v2")
    file.write_text(json.dumps(row) + "\n")
    assert mine()["red"].best["solver"] == "\\x1b[31meuler"


@pytest.mark.parametrize("text", ["", "[]", '{"status": "\\u001b[31m"}', '{"status": [1]}'])
def test_an_odd_status_is_marked(lab, text):
    (lab("odd") / "status.json").write_text(text)
    found = mine()["odd"]
    assert found.odd == "status.json makes no sense" and not found.damaged


def entry(fd: float, extractor: str = "a", step: int = 1, **more) -> dict:
    return dict(fd=fd, nfe=1, solver="euler", extractor=extractor, step=step) | more


def test_the_best_score_is_of_one_feature_space_and_of_this_step():
    two = [entry(5, "a"), entry(0.1, "b")]
    assert best_score(two, 1, "a")["fd"] == 5 and best_score(two, 1, "c")["fd"] == 0.1
    assert best_score([entry(5, step=2)], 1, "a") is None and best_score([], 1, "a") is None


def test_a_lucky_seed_is_no_better_way_of_sampling():
    lucky = [entry(fd, solver="heun", seed=seed) for seed, fd in enumerate((4.0, 9.0, 11.0))]
    found = best_score([entry(7.0, nfe=8, solver="ab2"), *lucky], 1, "a")
    assert found == dict(fd=7.0, nfe=8, solver="ab2", extractor="a", seeds=1, head=1)
    assert best_score(lucky, 1, "a")["fd"] == 8.0 and best_score(lucky, 1, "a")["seeds"] == 3


def test_links_out_of_the_folder_of_runs_are_not_followed(lab, tmp_path):
    outside = Path(shutil.copytree(lab("inside"), tmp_path / "outside"))
    (lab.folder / "folder").symlink_to(outside)
    (lab.folder / "alias").symlink_to("inside")
    newest = newest_checkpoint(outside)
    weights = newest.relative_to(outside) / "ema.safetensors"
    for name, file, target in (
        ("weights", weights, newest / "ema.safetensors"),
        ("config", "config.json", outside / "config.json"),
        ("gone", "notes", "/nonexistent"),
        ("scores", "scores.jsonl", outside / "scores.jsonl"),
    ):
        link = lab(name) / file
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    found = mine()
    for name in ("folder", "weights", "config", "gone", "scores"):
        assert "leads out of" in found[name].damaged and str(tmp_path) not in found[name].damaged
        with pytest.raises(ValueError, match="leads out of"):
            Run.open(name)
    assert not found["alias"].damaged and Run.open("alias").verify() == 3
    assert Run.open(outside).verify() == 3


def test_a_checkpoint_that_is_a_link_is_none(lab, tmp_path):
    folder = lab("swapped")
    newest = newest_checkpoint(folder)
    shutil.move(newest, tmp_path / newest.name)
    newest.symlink_to(tmp_path / newest.name)
    assert mine()["swapped"].damaged and newest_checkpoint(folder) is None


def test_a_link_that_leads_nowhere_does_no_harm(lab):
    (lab("loop") / "x").symlink_to("x")
    (lab("two") / "two").symlink_to(".")
    assert not mine()["two"].damaged and not mine()["loop"].damaged


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../runs/good",
        "good/",
        "./good",
        "good\x00",
        "a" * 5000,
        "/etc",
        None,
        3,
        ["good"],
        "\ud800",
    ],
    ids=range(13),
)
def test_a_name_is_never_a_path(lab, name):
    lab("good")
    with pytest.raises(ValueError, match="unknown run"):
        get_run_info(name)


def test_a_near_miss_is_hinted(lab):
    lab("moons-cud")
    with pytest.raises(ValueError, match="did you mean 'moons-cud'"):
        get_run_info("moons-cdu")


@pytest.mark.parametrize("saves", [6, pytest.param(300, marks=pytest.mark.long)])
def test_a_run_that_is_being_saved_is_never_damaged(lab, saves):
    folder = lab("busy")
    data = (newest_checkpoint(folder) / "ema.safetensors").read_bytes()
    meta = {"network": Run(folder).network_hash()}
    save_checkpoint(folder, 0, {"ema.safetensors": data}, meta)
    shutil.rmtree(checkpoint_dir(folder, 5))
    stop, saved = threading.Event(), []

    def work():
        while not stop.is_set():
            for step in (3, 4, 5):
                save_checkpoint(folder, step, {"ema.safetensors": data}, meta)
                prune_checkpoints(folder, 1, 0)
                saved.append(step)
            save_checkpoint(folder, 0, {"ema.safetensors": data}, meta)
            os.rename(checkpoint_dir(folder, 5), folder / "checkpoints" / "old.tmp")
            shutil.rmtree(folder / "checkpoints" / "old.tmp")

    saver = threading.Thread(target=work)
    saver.start()
    try:
        while len(saved) < saves:
            assert saver.is_alive()
            assert not get_run_info("busy").damaged
            run = Run.open("busy")
            assert run.tensors("ema.safetensors")
    finally:
        stop.set()
        saver.join()


def test_a_run_that_is_being_made_is_new(lab):
    folder = lab("begun")
    shutil.rmtree(folder / "checkpoints")
    assert "no complete checkpoint" in mine()["begun"].damaged
    with run_lock(folder):
        assert mine()["begun"].status == "new" and not mine()["begun"].damaged


@pytest.mark.parametrize(
    "said, locked, status",
    [
        ('{"status": "running"}', True, "running"),
        ('{"status": "running"}', False, "dead"),
        ('{"status": "stopped"}', True, "stopped"),
        ('{"status": ["running"]}', True, "new"),
        ("", True, "new"),
    ],
)
def test_what_a_run_is_doing_follows_from_its_status_and_its_lock(lab, said, locked, status):
    folder = lab("job")
    save_checkpoint(folder, 4, {}, {})
    shutil.rmtree(checkpoint_dir(folder, 5))
    (folder / "status.json").write_text(said)
    if locked:
        with run_lock(folder):
            assert get_run_info("job").status == status
    else:
        assert get_run_info("job").status == status
    (folder / "status.json").unlink()
    assert get_run_info("job").status == "new"


@pytest.mark.parametrize("moment", [0, -5, 2**33, 2**37 + 5])
def test_a_clock_that_was_set_back_does_no_harm(lab, moment):
    folder = lab("clock")
    for path in folder.rglob("*"):
        os.utime(path, (moment, moment))
    assert get_run_info("clock").status == "done" and not get_run_info("clock").damaged


def test_differences_show_arguments_with_their_value_given_or_not():
    found = [Run.open(name) for name in ("digits-rf", "digits-cud", "digits-cud-aim8")]
    rows = {row.pop("key"): row for row in config_diff(found)}
    assert rows["method"] == {"digits-rf": "rf", "digits-cud": "cud", "digits-cud-aim8": "cud"}
    assert rows["args.aim"]["digits-rf"] is None and rows["args.aim"]["digits-cud-aim8"] == 8
    assert rows["args.aim"]["digits-cud"] == found[1].method.aim != 8
    assert "data" not in rows and config_diff(found[:1]) == [] == config_diff([])


def test_a_run_whose_checkpoint_was_replaced_meanwhile_is_not_called_damaged(lab):
    folder = lab("busy")
    run = Run.open("busy")
    files = {"ema.safetensors": (run.checkpoint / "ema.safetensors").read_bytes()}
    meta = {"network": run.network_hash()}
    shutil.rmtree(run.checkpoint)
    save_checkpoint(folder, 1, files, meta)
    run = Run.open("busy")
    save_checkpoint(folder, 2, files, meta)
    prune_checkpoints(folder, 1, 0)
    assert not checkpoint_dir(folder, 1).exists() and run.verify() == 3 and run.step == 2
    (checkpoint_dir(folder, 2) / "ema.safetensors").unlink()
    with pytest.raises(CorruptData, match="ema.safetensors is missing"):
        run.verify()
