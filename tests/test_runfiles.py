"""A run is read as plain files: forged ones are refused in a sentence, odd ones beside them do no
harm, scores are added once, and a name is never a path.
"""

import io
import json
import math
import multiprocessing
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import copy_of
from small_lab import vouch, write_sums

from cudlab.catalog import get_run_info, list_runs
from cudlab.checkpoint import (
    newest_checkpoint,
    save_checkpoint,
)
from cudlab.config import CorruptData, get_settings
from cudlab.jobs import get_exit_code
from cudlab.run import Run
from cudlab.runfiles import read_log, run_stamp

SOLVER = "digits-dode-euler5"
UNPICKLED = []
sys.addaudithook(
    lambda event, args: UNPICKLED.append(args) if event == "pickle.find_class" else None
)


def small(lab: Path, name: str) -> Path:
    return copy_of(get_settings().checkpoints_path / SOLVER, lab, name)


# Forged files


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def safe(header, payload: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + payload


def tensor(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("archive/data.pkl", "w", force_zip64=True) as f:
            for _ in range(128):
                f.write(bytes(2**20))
    return file.getvalue()


def torch_pickle(trap: str) -> bytes:
    file = io.BytesIO()
    torch.save({"net.weight": Evil(trap)}, file)
    return file.getvalue()


def changed(**tensors):
    "The good weights with some tensors replaced."
    return lambda good, trap: safetensors.torch.save(good | tensors)


def first(change):
    "The good weights with the first tensor changed."
    return lambda good, trap: safetensors.torch.save(
        good | {key: change(v).contiguous() for key, v in list(good.items())[:1]}
    )


DEEP = b"[" * 10**6
FOUR = b"\0" * 4
WEIGHTS = {
    "pickle": lambda good, trap: pickle.dumps(Evil(trap)),
    "torch pickle": lambda good, trap: torch_pickle(trap),
    "zip bomb": lambda good, trap: bomb(),
    "nothing": lambda good, trap: b"",
    "seven bytes": lambda good, trap: b"\0" * 7,
    "html": lambda good, trap: b"<!DOCTYPE html><html><body>404</body></html>" * 20,
    "truncated": lambda good, trap: safetensors.torch.save(good)[:-1000],
    "appended": lambda good, trap: safetensors.torch.save(good) + b"x",
    "header of 99 MB": lambda good, trap: safe(b"{" + b" " * 99_000_000 + b"}"),
    "header of 9 MB": lambda good, trap: safe(b"{" + b" " * 9_000_000 + b"}"),
    "header of 2**63": lambda good, trap: (2**63).to_bytes(8, "little") + b"{}",
    "deep header": lambda good, trap: safe(DEEP),
    "header of text": lambda good, trap: safe(b"hello"),
    "header of a list": lambda good, trap: safe([]),
    "huge shape": lambda good, trap: safe({"net.w": tensor([2**40], [0, 4])}, FOUR),
    "overflowing shape": lambda good, trap: safe({"net.w": tensor([2**32, 2**32], [0, 0])}),
    "negative offsets": lambda good, trap: safe({"net.w": tensor([1], [-4, 0])}, FOUR),
    "overlap": lambda good, trap: safe(
        {key: tensor([1], [0, 4]) for key in ("net.a", "net.b")}, FOUR
    ),
    "strange dtype": lambda good, trap: safe({"net.w": tensor([1], [0, 4], "PY")}, FOUR),
    "no tensors": lambda good, trap: safetensors.torch.save({}),
    "a tensor less": lambda good, trap: safetensors.torch.save(dict(list(good.items())[1:])),
    "a tensor more": changed(**{"net.more": torch.zeros(1)}),
    "another shape": first(lambda v: v[..., :1]),
    "an axis more": first(lambda v: v[None]),
    "nan": first(lambda v: v * math.nan),
    "inf": first(lambda v: v + math.inf),
    "float64": first(lambda v: v.double()),
    "whole numbers": first(lambda v: v.int()),
    "complex": first(lambda v: v.to(torch.complex64)),
}
SHAPES = {
    "shape of 10^18": [1, 10**9, 10**9],
    "shape of 2^60": [2**30, 2**30],
    "no shape": [],
    "negative shape": [-2],
    "shape of words": ["two"],
    "shape in a word": "22",
    "infinite shape": [math.inf],
    "a thousand axes": [2] * 1000,
    "shape of another net": [3, 512, 512],
}
KEYS = (
    ("method", "evil"),
    ("method", ["rf"]),
    ("steps", 10**400),
    ("steps", math.inf),
    ("lr", math.nan),
    ("batch", 10**12),
    ("net", "../net"),
    ("args", {"heads": 10**9}),
    ("path", "x"),
    ("more", 1),
)
CONFIGS = {
    "nothing": b"",
    "html": b"<html>",
    "a list": b"[]",
    "deep": DEEP,
    "deep in a key": b'{"config": ' + DEEP,
    "digits": b'{"config": ' + b"9" * 10**6 + b"}",
    "utf-16": json.dumps({}).encode("utf-16"),
    "zeros": bytes(1000),
    "20 MB": b'{"config": "' + b"x" * 20_000_000 + b'"}',
    "invalid utf-8": b'{"config": "\xff\xfe"}',
    "half a letter": b'{"config": "\\ud800"}',
    **{key: {"shape": shape} for key, shape in SHAPES.items()},
    "a million classes": {"classes": list(range(10**6))},
    "classes as a number": {"classes": 10},
    "parameters as text": {"parameters": "many"},
    "10^30 parameters": {"parameters": 10**30},
    "created in numbers": {"created": 5},
    "teacher as a list": {"teacher": [1]},
    "teacher without a name": {"teacher": {}},
    "no teacher": {"teacher": None},
    "teacher's step in words": {"teacher": {"name": "a", "network": "b", "step": "two"}},
    "data as a text": {"data": "moons"},
    "data without a hash": {"data": {"note": ""}},
    "config as text": {"config": "rf"},
    "config as a list": {"config": [["steps", 5]]},
    "no config": {"config": None},
    **{
        f"{k} = {str(v)[:12]}": {"config": {"method": "rf", "data": "moons", k: v}} for k, v in KEYS
    },
}
METAS = {
    "nothing": b"",
    "deep": DEEP,
    "html": b"<html>",
    "text": b'"x"',
    "step in words": {"step": "six"},
    "step of another checkpoint": {"step": 1},
    "step -1": {"step": -1},
    "step true": {"step": True},
    "step infinite": {"step": math.inf},
    "no lengths": {"bytes": None},
    "lengths as a list": {"bytes": ["net.safetensors"]},
    "lengths of other files": {"bytes": {"../../etc/passwd": 10}},
    "network in numbers": {"network": 5},
    "cost as a list": {"training_cost": [1]},
    "cost of nan": {"training_cost": {"cpu": math.nan}},
}
SUMS = {
    "nothing": b"",
    "zeros": bytes(1000),
    "a path": b"0" * 64 + b"  ../../../passwd\n",
    "an absolute path": b"0" * 64 + b"  /dev/zero\n",
    "no end of the line": b"0" * 64 + b"  net.safetensors",
}
PLACES = ("a folder", "a pipe", "a device", "a sparse terabyte")
LATER = ("shape of another net", "net = ../net")  # the list, that makes no network, cannot know


def forge(run_dir: Path, trap: Path, part: str, case: str) -> None:
    "Change one part of a run so that its hashes still fit."
    folder = newest_checkpoint(run_dir)
    ema = folder / "ema.safetensors"
    if part == "weights":
        weights = safetensors.torch.load(ema.read_bytes())
        ema.write_bytes(WEIGHTS[case](weights, str(trap)))
        vouch(run_dir)
    elif part == "config":
        data = CONFIGS[case]
        if isinstance(data, dict):
            data = json.dumps(json.loads((run_dir / "config.json").read_bytes()) | data).encode()
        (run_dir / "config.json").write_bytes(data)
        (folder / "config.json").write_bytes(data)
        vouch(run_dir)
    elif part == "meta":
        data = METAS[case]
        if isinstance(data, dict):
            old = json.loads((folder / "checkpoint.json").read_bytes())
            data = json.dumps(old | data).encode()
        (folder / "checkpoint.json").write_bytes(data)
        write_sums(folder)
    elif part == "sums":
        old = (folder / "SHA256SUMS").read_bytes()
        (folder / "SHA256SUMS").write_bytes(old + SUMS[case] if SUMS[case] else b"")
    else:
        replace_by(ema, case)


def replace_by(file: Path, case: str) -> None:
    file.unlink()
    if case == "a folder":
        file.mkdir()
    elif case == "a pipe":
        os.mkfifo(file)
    elif case == "a device":
        file.symlink_to("/dev/zero")
    else:
        with open(file, "wb") as f:
            f.truncate(10**12)


def peak() -> int:
    "The most memory this process has had since the last `forget`, bytes."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


CASES = [("weights", c) for c in WEIGHTS]
CASES += [("config", c) for c in CONFIGS]
CASES += [("meta", c) for c in METAS]
CASES += [("sums", c) for c in SUMS]
CASES += [("place", c) for c in PLACES]


@pytest.mark.parametrize("part, case", CASES)
def test_a_forged_run_is_refused_in_a_sentence(lab, tmp_path, good, part, case):
    folder, trap, seen = copy_of(good, lab), tmp_path / "trap", len(UNPICKLED)
    (folder / "status.json").unlink()
    forge(folder, trap, part, case)
    watched = os.path.exists("/proc/self/clear_refs")
    before = 0
    if watched:
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
    with pytest.raises(CorruptData) as caught:
        Run(folder).net()
    listed = [r for r in list_runs() if not r.shipped]
    assert not watched or peak() - before < 300e6
    said = str(caught.value)
    assert said.startswith("run 'forged'") and len(said) < 700 and "\n" not in said
    assert get_exit_code(caught.value) == 5
    assert [r.name for r in listed] == ["forged"]
    assert part in ("weights", "place") or case in LATER or listed[0].damaged
    assert not trap.exists() and len(UNPICKLED) == seen


def test_the_hook_sees_what_is_unpickled():
    seen = len(UNPICKLED)
    pickle.loads(pickle.dumps(Path("x")))
    assert len(UNPICKLED) > seen


def test_nothing_in_a_run_is_a_pickle(good):
    files = [file for file in good.rglob("*") if file.is_file()]
    for file in files:
        assert not zipfile.is_zipfile(file) and file.read_bytes()[:1] != b"\x80"
    kinds = {file.suffix for file in files if not file.name.startswith(".")}
    assert kinds == {".json", ".jsonl", ".safetensors", ""}  # SHA256SUMS


ODD = {
    "deep": DEEP,
    "digits": b'{"fd": ' + b"9" * 10**6 + b"}",
    "a large number": b'{"fd": 1' + b"0" * 4000 + b', "step": 2}',
    "lists for names": b'{"fd": 1, "step": 2, "solver": [1], "seed": {"a": 1}, "head": [[]]}',
    "zeros": bytes(10**6),
    "not utf-8": b'{"fd": "\xff"}',
    "half a letter": b'{"fd": 1, "step": 2, "solver": "\\ud800"}',
    "nan": b'{"fd": NaN, "step": 2}',
    "infinity": b'{"fd": -Infinity, "step": 2}',
    "status": b'{"status": ["done"]}',
    "a step in words": b'{"step": "two"}',
    "a number": b"7",
}


@pytest.mark.parametrize("file", ["scores.jsonl", "status.json", "metrics.jsonl", "notes.json"])
@pytest.mark.parametrize("case", ODD)
def test_odd_files_beside_a_checkpoint_do_no_harm(lab, good, file, case):
    folder = copy_of(good, lab, "odd")
    old = (folder / file).read_bytes() if file == "metrics.jsonl" else b""
    (folder / file).write_bytes(old + ODD[case])
    info = get_run_info("odd")
    assert info.status == "done" and not info.damaged
    json.dumps(info.best, allow_nan=False)
    run = Run.open("odd@2")
    assert run.verify() == 5 and [type(run.scores), type(run.metrics)] == [list, list]


ODD_LOG = [
    '{"step": "a", "loss": 3}',
    '{"step": 1' + 400 * "0" + ', "loss": {"net": 1}}',
    '{"step": 2.5, "loss": {"net": 1}}',
    '{"step": true, "loss": {"net": 1}}',
    '{"step": -1, "loss": {"net": 1}}',
    '{"loss": {"net": 1}}',
    '{"step": 2, "loss": {"net": "x"}}',
    '{"step": 2, "loss": {"net": [1]}}',
    '{"step": 2, "loss": {"net": 1}, "lr": {}}',
    '{"step": 2, "loss": {"net": 1}, "grad_norm": ["x"]}',
    "words",
    "[2]",
]


@pytest.mark.parametrize("line", ODD_LOG)
def test_odd_lines_of_the_log_are_counted_and_left_out(lab, good, line):
    run = Run(copy_of(good, lab, "odd"))
    rows, odd = read_log(run.dir)
    assert rows and not odd
    with open(run.dir / "metrics.jsonl", "a") as file:
        file.write(f'{line}\n{{"step": 2, "loss": {{"\\u001b[31m": NaN}}}}\n{{"step": 2, "lo')
    found, odd = read_log(run.dir)
    assert found[:-1] == rows == run.metrics[:-1] and odd == 1
    assert list(found[-1]["loss"]) == ["\\x1b[31m"]


# Names


def test_a_name_comes_before_a_path_of_the_same_name(lab, tmp_path, monkeypatch):
    small(lab, "twin")
    small(tmp_path, "twin")
    monkeypatch.chdir(tmp_path)
    assert Run.open("twin").dir == lab / "twin" and Run.open("./twin").dir == tmp_path / "twin"


def test_a_name_that_cannot_be_shown_opens_nothing_and_is_not_repeated(lab):
    small(lab, "red \x1b[31m")
    for name in ("red \x1b[31m", "red"):
        with pytest.raises(ValueError, match="unknown run") as caught:
            Run.open(name)
        assert str(caught.value).isprintable()


# Scores


def add_scores(ready, who: int, added) -> None:
    "In a process of its own: the same thirty scores."
    run = Run.open("shared")
    ready.wait(60)
    entries = [{"fd": float(who), "seconds": who, "nfe": n, "note": "x" * 5000} for n in range(30)]
    added[who] = sum(run.add_score(entry) for entry in entries)


def test_two_processes_add_each_score_once(lab):
    small(lab, "shared")
    before = len(Run.open("shared").scores)
    fork = multiprocessing.get_context("fork")
    ready, added = fork.Barrier(2), fork.Array("i", 2)
    jobs = [fork.Process(target=add_scores, args=(ready, who, added)) for who in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    run = Run.open("shared")
    scores = run.scores[before:]
    assert sum(added) == 30 and sorted(s["nfe"] for s in scores) == list(range(30))
    assert [sum(s["fd"] == who for s in scores) for who in range(2)] == list(added)
    assert not run.add_score(scores[0] | {"fd": 9.0, "recall": 0.5})
    assert run.add_score(scores[0] | {"seed": 1})


def test_the_line_after_a_torn_one_is_whole(lab):
    file = small(lab, "torn") / "scores.jsonl"
    run = Run.open("torn")
    lines = len(run.scores)
    with open(file, "a") as f:
        f.write('{"fd": 1.0, "nf')
    assert run.add_score({"fd": 2.0, "nfe": 3})
    assert len(run.scores) == lines + 1 and run.scores[-1] == {"fd": 2.0, "nfe": 3}


def test_no_score_is_written_through_a_link(lab, tmp_path):
    folder = small(lab, "linked")
    (tmp_path / "other").write_text("mine\n")
    (folder / "scores.jsonl").unlink()
    (folder / "scores.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="is a link"):
        Run(folder).add_score({"fd": 1.0})
    assert (tmp_path / "other").read_text() == "mine\n"


@pytest.mark.parametrize("file", ["scores.jsonl", "status.json", "new checkpoint"])
def test_a_stamp_changes_with_what_a_reader_sees(lab, file):
    folder = small(lab, "stamped")
    before = run_stamp(folder)
    assert run_stamp(folder) == before and hash(before) is not None
    (folder / "metrics.jsonl").write_text("grown")
    assert run_stamp(folder) == before
    if file == "new checkpoint":
        save_checkpoint(folder, 6, {}, {})
    else:
        (folder / file).write_text("{}")
    assert run_stamp(folder) != before
