"""Several processes on one batch (gloo, real processes started by torchrun): the numbers of one process, for every method."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cudlab.run import METHODS

ROOT = Path(__file__).parent.parent
SHORT = {"steps": 4, "batch": 22, "warmup": 1, "lr": 1e-3}
ARGS = {
    "rf": [{}, {"data": "moons"}, {"classes": True}],
    "cud": [{"args": {"heads": 3}}, {"args": {"coupling": True, "target": "ema"}}],
    "dode": [{"args": {"teacher": "digits-rf", "moves": 2, "batches": 2, "samples": 8, "scale": 2}}],
    "boot": [{"args": {"weight": "clipped"}}],
    "gdd": [{"args": {"width": 8, "lazy": 2}}],
    "reflow": [{"args": {"pairs": 64, "moves": 2}}],
    "distill": [{"args": {"pairs": 64, "moves": 2, "targets": "1 2"}}],
    "pd": [{"args": {"first": 2}}],
    "consistency": [{}, {"args": {"kind": "train", "teacher": ""}}],
    "shortcut": [{"args": {"teacher": ""}}],
    "meanflow": [{"args": {"teacher": ""}}, {"args": {"teacher": "", "h": 0}}],
}
JOBS = [({} if method == "dode" else SHORT) | {"method": method} | more for method, kinds in ARGS.items() for more in kinds]


def team(size: int, *command) -> subprocess.CompletedProcess:
    "A command on `size` processes."
    launch = [] if size == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDLAB_THREADS": "1", "CUDLAB_DEVICE": "cpu"}
    return subprocess.run([sys.executable, *launch, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


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
