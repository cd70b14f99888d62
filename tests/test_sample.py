"""Samples as files: the command as a real process, stopped, continued, shared out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cudlab.config import CorruptData
from cudlab.run import Run
from cudlab.sample import read_samples, write_samples

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDLAB_THREADS": "1", "CUDLAB_DEVICE": "cpu"}


def command(*words, processes=1):
    team = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *team, "-m", "cudlab.cli", "sample", *words],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_keeps_the_parts_and_another_team_finishes_them(tmp_path, sign):
    words = ("digits-rf", f"out={tmp_path / 'set'}", "n=3000", "batch=20", "steps=4")
    process = command(*words)
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if sign == signal.SIGKILL else 3) and not err
    parts = list((tmp_path / "set").glob("part-*"))
    assert 2 <= len(parts) < 150
    with pytest.raises(CorruptData, match="has no part-"):
        read_samples(tmp_path / "set")
    made = {p.name: p.stat().st_mtime_ns for p in parts}
    again = command(*words, processes=2)
    said, err = again.communicate(timeout=200)
    assert again.returncode == 0 and said.count(", there already\n") == len(made), err
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == when for name, when in made.items())
    x, labels, about = read_samples(tmp_path / "set")
    assert x.shape == (3000, 1, 8, 8) and labels is None and about["solver"] == "euler"
    list(write_samples(Run.open("digits-rf"), tmp_path / "alone", n=200, batch=20, steps=4))
    assert torch.equal(x[:200], read_samples(tmp_path / "alone")[0])


def test_labels_are_kept_and_points_are_not_rounded(tmp_path):
    list(write_samples(Run.open("digits-cud-aim8-classes"), tmp_path / "classes", n=32, batch=16))
    x, labels, about = read_samples(tmp_path / "classes")
    assert (
        labels.tolist() == [k % 10 for k in range(32)]
        and x.dtype == torch.uint8
        and len(about["classes"]) == 10
    )
    run = Run.open("checkerboard-cud-aim4")
    list(write_samples(run, tmp_path / "points", n=32, batch=16))
    assert torch.equal(read_samples(tmp_path / "points")[0], run.solve(index=32).x)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], ""),
        (["digits-rf"], "out = ''"),
        (["out=x"], "RUN is missing"),
        (["digits-rf", "out={}/a", "n=3"], "n = 3 is out of range"),
        (["digits-rf", "out={}/a", "setps=3"], "did you mean 'steps'"),
        (["digits-boot", "out={}/a", "steps=3"], "steps = '3' is not possible"),
        (["digits-rf", "out={}/file"], "holds something else"),
        (["digits-rf", "out={}/full"], "holds something else"),
        (["digits-rf", "out={}/a", "solver=eular"], "eular"),
        (["digits-rf", "out={}/a", "head=2"], "head = '2'"),
        (["digits-rf", "out=/proc/none"], "/proc/none"),
    ],
)
def test_wrong_words_are_a_sentence(tmp_path, capsys, words, said):
    from cudlab.cli import main

    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("x")
    code = main(["sample", *(w.format(tmp_path) for w in words)])
    err = capsys.readouterr().err
    assert code in ((2, 5) if words else (0,)) and said in err and err.count("\n") == bool(words)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_other_samples_and_a_broken_part(tmp_path):
    run = Run.open("digits-rf")
    list(write_samples(run, tmp_path / "set", n=32, batch=16, steps=2))
    for other in ({"steps": 3}, {"seed": 1}, {"n": 48}, {"batch": 8}):
        with pytest.raises(ValueError, match="name another folder"):
            list(write_samples(run, tmp_path / "set", **{"n": 32, "batch": 16, "steps": 2} | other))
    part = tmp_path / "set" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(CorruptData, match="cannot be read"):
        read_samples(tmp_path / "set")
    (tmp_path / "set" / "index.json").write_text(json.dumps({"n": 1}))
    with pytest.raises(ValueError, match="name another folder"):
        list(write_samples(run, tmp_path / "set", n=32, batch=16, steps=2))
