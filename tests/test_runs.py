"""The list of runs: cheap, current, honest about damage, and closed to links; scores are added
once, whoever adds them.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cudlab.catalog import best_score, config_diff, get_run_info, list_runs
from cudlab.checkpoint import commit_files, stat_files
from cudlab.config import get_settings
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


def python(code: str, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True
    )


OPENED = """
import os, sys
from cudlab.catalog import list_runs
from cudlab.checkpoint import stat_files
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' and isinstance(args[0], (str, bytes, os.PathLike)) else None)
for _ in range(2):
    print(len(list_runs()), *sorted({os.path.basename(p) for p in opened if p.startswith(os.environ['CUDLAB_RUNS_PATH'])}))
    opened.clear()
"""


def test_no_weights_are_opened_and_nothing_twice(lab):
    for i in range(20):
        lab(f"run-{i}")
    out, _ = python(OPENED).communicate(timeout=100)
    first, second = (line.split() for line in out.splitlines())
    assert (
        int(first[0]) >= 20
        and set(first[1:]) <= {"config.json", "MANIFEST.json", "scores.jsonl", "status.json"}
        and "config.json" in first
    )
    assert second == first[:1]


def test_a_listing_from_memory_is_the_listing_of_a_fresh_process(lab):
    for name in "abcdef":
        lab(name)
    before = mine()
    assert (
        before["a"].best["extractor"] == "digits-v2"
        and before["a"].teacher == "digits-rf"
        and before["a"].parameters == 5
        and before["a"].changed.endswith("+00:00")
    )
    manifest = lab.folder / "a" / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 3}))
    (lab.folder / "b" / "ema.safetensors").unlink()
    with open(lab.folder / "c" / "net.safetensors", "r+b") as f:
        f.truncate(10)
    score = Run.open("d").scores[0] | {"fd": 0.5, "seed": 77, "head": 2}
    Run.open("d").add_score(score)
    shutil.rmtree(lab.folder / "e")
    lab("g")
    now = mine()
    out, _ = python(
        "from cudlab.catalog import list_runs\nfor r in list_runs():\n    if not r.shipped: "
        "print(repr(r.__dict__ | {'path': str(r.dir)}))"
    ).communicate(timeout=100)
    assert [repr(r.__dict__ | {"path": str(r.dir)}) for r in now.values()] == out.splitlines()
    assert (
        now["a"].step == 3
        and now["a"].status == "new"
        and now["f"] == before["f"]
        and set(now) == set("abcdfg")
    )
    assert (
        "ema.safetensors" in now["b"].damaged
        and "net.safetensors" in now["c"].damaged
        and now["d"].best["fd"] == 0.5
    )


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", "not json"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", DEEP),
        ("MANIFEST.json", "{}"),
        ("MANIFEST.json", '{"step": 5}'),
        ("MANIFEST.json", '{"step": "x", "files": {}}'),
        ("MANIFEST.json", '{"step": 5, "files": {"a": 3}}'),
        ("MANIFEST.json", '{"step": 5, "files": {"a": {"bytes": "x"}}}'),
        ("MANIFEST.json", None),
    ],
)
def test_a_damaged_run_is_listed_with_its_reason(lab, file, content):
    lab("good")
    broken = lab("broken") / file
    broken.unlink() if content is None else broken.write_text(content)
    found = mine()
    assert (
        found["broken"].damaged
        and not found["good"].damaged
        and get_run_info("broken").damaged == found["broken"].damaged
    )


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "3",
        '{"fd": NaN, "step": 5}',
        '{"fd": "low"}',
        '{"fd": 0.1, "step": 4}',
        '{"fd": 0.1',
        "\x00",
    ],
)
def test_odd_lines_of_scores_do_no_harm(lab, line):
    file = lab("odd") / "scores.jsonl"
    was = mine()["odd"].best
    file.write_text(line + "\n" + file.read_text() + line)
    assert mine()["odd"].best == was and not mine()["odd"].damaged
    assert (
        Run.open("odd").add_score({"fd": 3.0, "nfe": 9, "step": 5})
        and Run.open("odd").scores[-1]["nfe"] == 9
    )


def test_the_best_score_is_of_one_feature_space_and_of_this_step():
    row = lambda fd, extractor, step=1: dict(
        fd=fd, nfe=1, solver="euler", extractor=extractor, step=step
    )
    assert (
        best_score([row(5, "a"), row(0.1, "b")], 1, "a")["fd"] == 5
        and best_score([row(5, "a"), row(0.1, "b")], 1, "c")["fd"] == 0.1
    )
    assert best_score([row(5, "a", 2)], 1, "a") is None and best_score([], 1, "a") is None


def test_links_out_of_the_folder_of_runs_are_not_followed(lab, tmp_path):
    outside = Path(shutil.copytree(lab("inside"), tmp_path / "outside"))
    (lab.folder / "folder").symlink_to(outside)
    (lab.folder / "alias").symlink_to("inside")
    for name, file, target in (
        ("weights", "net.safetensors", outside / "net.safetensors"),
        ("config", "config.json", outside / "config.json"),
        ("gone", "notes", "/nonexistent"),
        ("commit", ".commit", outside),
    ):
        link = lab(name) / file
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    found = mine()
    for name in ("folder", "weights", "config", "gone", "commit"):
        assert "leads out of" in found[name].damaged and str(tmp_path) not in found[name].damaged
        with pytest.raises(ValueError, match="leads out of"):
            Run.open(name)
    assert (
        not found["alias"].damaged
        and Run.open("alias").verify() == Run.open("inside").verify() == Run.open(outside).verify()
    )


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
)
def test_a_name_is_never_a_path(lab, name):
    lab("good")
    with pytest.raises(ValueError, match="unknown run"):
        get_run_info(name)


def test_a_near_miss_is_hinted(lab):
    lab("moons-cud")
    with pytest.raises(ValueError, match="did you mean 'moons-cud'"):
        get_run_info("moons-cdu")


def test_a_name_comes_before_a_path_of_the_same_name(lab, tmp_path, monkeypatch):
    lab("twin")
    shutil.copytree(lab.folder / "twin", tmp_path / "there" / "twin")
    monkeypatch.chdir(tmp_path / "there")
    assert (
        Run.open("twin").dir == lab.folder / "twin"
        and Run.open("./twin").dir == tmp_path / "there" / "twin"
    )


def test_a_run_that_is_being_saved_is_never_listed_as_damaged(lab):
    folder = lab("busy")
    names = ("config.json", "metrics.jsonl", "net.safetensors", "ema.safetensors")
    files, stop, steps = {n: (folder / n).read_bytes() for n in names}, threading.Event(), []

    def save():
        while not stop.is_set():
            steps.append(len(steps) % 5)
            commit_files(
                folder,
                files | {f"extra-{len(steps) % 7}": b"x" * len(steps)},
                {"step": steps[-1]},
                {},
            )

    saver = threading.Thread(target=save)
    saver.start()
    try:
        seen = [mine()["busy"] for _ in range(150)]
    finally:
        stop.set()
        saver.join()
    assert len(steps) > 10 and not {r.damaged for r in seen if r.damaged}


def test_a_file_that_moves_between_two_looks_is_there(lab, monkeypatch):
    folder = lab("moving")
    (folder / ".commit").mkdir()
    os.rename(folder / "net.safetensors", folder / ".commit" / "net.safetensors")
    look_at = os.stat

    def then_moved(path, *args, **kw):
        found = look_at(path, *args, **kw)
        if str(path).endswith("/.commit/net.safetensors"):
            os.rename(path, folder / "net.safetensors")
        return found

    monkeypatch.setattr(
        "cudlab.catalog.stat_files",
        lambda place, of=stat_files: {k: v for k, v in of(place).items() if k != "net.safetensors"},
    )
    monkeypatch.setattr(os, "stat", then_moved)
    assert not mine()["moving"].damaged and not (folder / ".commit" / "net.safetensors").exists()


def test_an_interrupted_save_is_listed_as_committed(lab):
    folder = lab("cut")
    (folder / ".commit").mkdir()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / ".commit" / "MANIFEST.json").write_text(json.dumps(manifest | {"step": 2}))
    os.rename(folder / "net.safetensors", folder / ".commit" / "net.safetensors")
    assert mine()["cut"].step == 2 and not mine()["cut"].damaged


ADD = """
import sys
from cudlab.run import Run
run, who = Run.open(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(sum(run.add_score({"fd": float(who), "seconds": who, "nfe": n, "note": "x" * 5000}) for n in range(30)))
"""


def test_two_processes_add_each_score_once(lab):
    lab("shared")
    before = len(Run.open("shared").scores)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, "shared", str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for p in processes:
        assert p.stdout.readline() == "ready\n"
    for p in processes:
        p.stdin.write("\n")
        p.stdin.flush()
    added = [int(p.communicate(timeout=60)[0]) for p in processes]
    scores = Run.open("shared").scores[before:]
    assert sum(added) == 30 and sorted(s["nfe"] for s in scores) == list(range(30))
    assert [sum(s["fd"] == i for s in scores) for i in range(2)] == added
    assert not Run.open("shared").add_score(scores[0] | {"fd": 9.0, "recall": 0.5}) and Run.open(
        "shared"
    ).add_score(scores[0] | {"seed": 1})


def test_the_line_after_a_torn_one_is_whole(lab):
    file = lab("torn") / "scores.jsonl"
    lines = len(Run.open("torn").scores)
    with open(file, "a") as f:
        f.write('{"fd": 1.0, "nf')
    assert Run.open("torn").add_score({"fd": 2.0, "nfe": 3})
    assert len(Run.open("torn").scores) == lines + 1 and Run.open("torn").scores[-1] == {
        "fd": 2.0,
        "nfe": 3,
    }


def test_differences_show_arguments_with_their_value_given_or_not():
    found = [Run.open(name) for name in ("digits-rf", "digits-cud", "digits-cud-aim8")]
    rows = {row.pop("key"): row for row in config_diff(found)}
    assert rows["method"] == {"digits-rf": "rf", "digits-cud": "cud", "digits-cud-aim8": "cud"}
    assert (
        rows["args.aim"]["digits-rf"] is None
        and rows["args.aim"]["digits-cud-aim8"] == 8
        and rows["args.aim"]["digits-cud"] == found[1].method.aim != 8
    )
    assert "data" not in rows and config_diff(found[:1]) == []
