"""Several processes on one batch (gloo, real processes started by torchrun): the numbers of one
process, for every method.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cudlab.methods import METHODS
from cudlab.run import Run

ROOT = Path(__file__).parent.parent
SHORT = {"steps": 4, "batch": 22, "warmup": 1, "lr": 1e-3}
ARGS = {
    "rf": [{}, {"data": "moons"}, {"classes": True}],
    "cud": [{"args": {"heads": 3}}, {"args": {"coupling": True, "target": "ema"}}],
    "dode": [
        {"args": {"teacher": "digits-rf", "moves": 2, "batches": 2, "samples": 8, "scale": 2}}
    ],
    "boot": [{"args": {"weight": "clipped"}}],
    "gdd": [{"args": {"width": 8, "lazy": 2}}],
    "reflow": [{"args": {"pairs": 64, "moves": 2}}],
    "distill": [{"args": {"pairs": 64, "moves": 2, "targets": "1 2"}}],
    "pd": [{"args": {"first": 2}}],
    "consistency": [{}, {"args": {"kind": "train", "teacher": ""}}],
    "shortcut": [{"args": {"teacher": ""}}],
    "meanflow": [{"args": {"teacher": ""}}, {"args": {"teacher": "", "h": 0}}],
}
JOBS = [
    ({} if method == "dode" else SHORT) | {"method": method} | more
    for method, kinds in ARGS.items()
    for more in kinds
]


def team(size: int, *command) -> subprocess.CompletedProcess:
    "A command on `size` processes."
    launch = (
        []
        if size == 1
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDLAB_THREADS": "1", "CUDLAB_DEVICE": "cpu"}
    return subprocess.run(
        [sys.executable, *launch, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def alone():
    done = team(1, "tests/team_losses.py", json.dumps(JOBS))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_method_is_here():
    assert set(ARGS) == set(METHODS)


@pytest.mark.parametrize("size", [2, 4])
def test_a_team_computes_what_one_process_computes(alone, size):
    done = team(size, "tests/team_losses.py", json.dumps(JOBS))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(JOBS)
    for job, one, several in zip(JOBS, alone, found):
        for a, b in zip(one["losses"], several["losses"], strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=1e-6), (job, size)
        assert one["weights"] == pytest.approx(several["weights"], rel=1e-4), (job, size)


def test_a_batch_smaller_than_the_team_is_refused():
    done = team(2, "tests/team_losses.py", json.dumps([SHORT | {"method": "rf", "batch": 1}]))
    assert done.returncode != 0 and "batch = 1 is too small for 2 processes" in done.stderr


@pytest.fixture
def lab(tmp_path):
    return os.environ | {
        "CUDLAB_RUNS_PATH": str(tmp_path),
        "CUDLAB_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDLAB_DEVICE": "cpu",
    }


def train(lab, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cudlab.cli", "train", *words],
        cwd=ROOT,
        env=lab,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(process) -> None:
    "Wait for some steps."
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= 15:
            return
    raise AssertionError(process.stderr.read())


def ranks(process) -> list:
    "The processes of the team, by rank."
    found = {}
    for p in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RANK" in p.environ():
                found[int(p.environ()["RANK"])] = p
    return [found[rank] for rank in sorted(found)]


LONG = ("method=cud", "steps=100000", "batch=24", "log_every=5", "save_every=10", "name=team")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_it_goes_on_with_another_number(lab, tmp_path, victim):
    process = train(lab, *LONG, "processes=2")
    begun(process)
    ranks(process)[victim].kill()
    killed = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30 and process.returncode == 3, err
    assert f"process {victim} of 2 is gone" in out + err and "Traceback" not in err
    run = Run.open(tmp_path / "team")
    assert run.step >= 10 and run.step % 10 == 0 and run.verify() == 5
    assert not ranks(psutil.Process())  # nobody is left behind
    before = run.step
    last = train(lab, *LONG, f"until={before + 10}")
    assert last.wait(120) == 3 and Run.open(tmp_path / "team").step == before + 10
    last = train(lab, *LONG, "processes=3", f"until={before + 20}")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 3 and f"step {before + 20} of" in out, err
    whole = train(lab, *(w for w in LONG if w != "name=team"), "name=whole", f"until={before + 20}")
    assert whole.wait(200) == 3
    for a, b in zip(
        Run.open(tmp_path / "team").metrics, Run.open(tmp_path / "whole").metrics, strict=True
    ):
        assert a["step"] == b["step"] and a["loss"]["net"] == pytest.approx(
            b["loss"]["net"], rel=1e-3
        )


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_team_within_a_step(lab, tmp_path, sign):
    process = train(lab, *LONG, "processes=2")
    begun(process)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and err == "", (out, err)
    run = Run.open(tmp_path / "team")
    status = json.loads((run.dir / "status.json").read_text())
    assert (status["status"], status["code"], status["step"]) == (
        "stopped",
        3,
        run.step,
    ) and f"at step {run.step} of" in out


def test_torchrun_starts_a_team_too_and_the_lead_alone_speaks(lab, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cudlab.cli",
        "train",
        *LONG[:1],
        "steps=20",
        "batch=8",
        "log_every=5",
        "name=short",
    ]
    done = subprocess.run(command, cwd=ROOT, env=lab, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()].count(
        "run"
    ) == 2 and "2 processes" in done.stdout
    assert [m["step"] for m in Run.open(tmp_path / "short").metrics] == [5, 10, 15, 20]


def test_wrong_teams_are_a_sentence(lab, tmp_path):
    for words, said in (
        (("processes=0",), "processes = 0 is out of range"),
        (("processes=30", "batch=24"), "processes = 30 is more than batch = 24"),
    ):
        process = train(lab, "steps=5", *words)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and said in err and len(err.splitlines()) == 1


def test_a_divergence_on_several_processes_has_its_own_code(lab, tmp_path):
    process = train(
        lab,
        "data=moons",
        "steps=200",
        "lr=1",
        "clip=0",
        "args.w2=1e38",
        "batch=32",
        "save_every=1",
        "name=wild",
        "processes=2",
    )
    out, err = process.communicate(timeout=100)
    assert process.returncode == 4 and "not finite" in err and "Traceback" not in err
