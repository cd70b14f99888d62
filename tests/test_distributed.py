"""Several processes on one batch (gloo, real processes of torchrun): the numbers of one process."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from processes import end_processes, run_main, start_processes, train_poisoned
from world_program import print_training, short_training

from cudlab import fit
from cudlab.config import error_of
from cudlab.distributed import World, get_world
from cudlab.jobs import parse_parameters, read_status
from cudlab.methods import METHODS, build_objective
from cudlab.run import Run

ROOT = Path(__file__).parent.parent
PROGRAM = ["tests/world_program.py"]
SHORT = {"steps": 4, "batch": 22, "warmup": 1, "lr": 1e-3}
SOLVER = {"teacher": "digits-rf", "moves": 2, "batches": 2, "samples": 8, "scale": 2}
ARGS = {
    "rf": [{"data": "moons"}, {}, {"classes": True}],
    "cud": [{"data": "moons", "args": {"heads": 3}}, {"args": {"coupling": True, "target": "ema"}}],
    "dode": [{"args": SOLVER}],
    "boot": [{"args": {"weight": "clipped"}}],
    "gdd": [{"args": {"width": 8, "lazy": 2}}],
    "reflow": [{"args": {"pairs": 64, "moves": 2}}],
    "distill": [{"args": {"pairs": 64, "moves": 2, "targets": "1 2"}}],
    "pd": [{"args": {"first": 2}}],
    "consistency": [{}, {"args": {"kind": "train", "teacher": ""}}],
    "shortcut": [{"args": {"teacher": ""}}],
    "meanflow": [{"args": {"teacher": ""}}, {"args": {"teacher": "", "h": 0}}],
}
FAST = {"rf": 1, "cud": 1, "dode": 1, "gdd": 1}  # how many of each kind of communication
WILD = {"data": "moons", "method": "cud", "steps": 60, "lr": 1, "clip": 0, "batch": 32}
TOLERANCE = 1e-5
LONG = {"method": "cud", "data": "moons", "steps": 100_000, "batch": 24, "name": "team"}
LONG |= {"log_every": 5, "save_every": 10}


def jobs(counts: dict) -> list:
    found = []
    for method, count in counts.items():
        usual = {} if method == "dode" else SHORT
        found += [usual | {"method": method} | more for more in ARGS[method][:count]]
    return found


def torchrun(size: int) -> list:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, "--nproc-per-node", str(size)]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def start(lab):
    "Starts a training on several processes."
    started = []

    def begin(size, params):
        command = [*torchrun(size), *PROGRAM, "train", json.dumps(params)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def read_losses(size: int, params: list) -> list:
    command = [*torchrun(size), *PROGRAM, "losses", json.dumps(params)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def wait_for_steps(process) -> None:
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= 15:
            return
    raise AssertionError(process.stderr.read())


def ranks(process) -> list:
    "The processes of the world, by rank."
    found = {}
    for p in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RANK" in p.environ():
                found[int(p.environ()["RANK"])] = p
    return [found[rank] for rank in sorted(found)]


def test_alone_every_word_does_nothing():
    assert get_world() == World(0, 1) and World().split(10) == (0, 10)
    assert World().all_reduce_max(3) == 3
    parts = [World(rank, 7).split(100) for rank in range(7)]
    assert parts[0][0] == 0 and parts[-1][1] == 100
    assert all(a[1] == b[0] for a, b in zip(parts, parts[1:]))


def test_a_batch_smaller_than_the_world_is_refused(monkeypatch):
    monkeypatch.setattr(fit, "get_world", lambda: World(0, 2))
    config, _ = parse_parameters({"method": "rf", "data": "moons", "batch": 1})
    objective, data = build_objective(config, None, "cpu")
    message = error_of(next, objective.fit(data, config))
    assert "batch = 1 is too small for 2 processes" in message


def test_every_method_is_here():
    assert set(ARGS) == set(METHODS)


@pytest.mark.parametrize(
    "size, counts",
    [
        (2, FAST),
        pytest.param(2, dict.fromkeys(ARGS, 9), marks=pytest.mark.long),
        pytest.param(4, dict.fromkeys(ARGS, 9), marks=pytest.mark.long),
    ],
    ids=["2-fast", "2-every", "4-every"],
)
def test_a_world_computes_what_one_process_computes(lab, size, counts):
    params = [*jobs(counts), WILD | {"args": {"w2": 1e38}}]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    alone = [short_training(job, World()) for job in params]
    torch.set_num_threads(threads)
    several = read_losses(size, params)
    assert len(alone) == len(several) == len(params)
    assert alone.pop()["error"].startswith("Diverged") and "error" in several.pop()
    for job, one, many in zip(params, alone, several):
        for a, b in zip(one["losses"], many["losses"], strict=True):
            assert a == pytest.approx(b, rel=TOLERANCE, abs=1e-5), (job, size)
        assert one["weights"] == pytest.approx(many["weights"], rel=TOLERANCE), (job, size)


TRAIN = "train --method cud --data moons --steps 60 --batch 32 --warmup 0 --name wild".split()


def test_a_world_that_diverges_ends_with_code_4_in_every_process(lab):
    wild = ["--lr", "1", "--clip", "0", "--args.w2", "1e38"]
    started = start_processes(2, run_main, TRAIN + wild)
    assert end_processes(started) == [4, 4]
    assert read_status(lab / "wild").code == 4 and Run.open("wild").step == 0


@pytest.mark.parametrize("victim", [0, 1])
def test_weights_that_are_not_finite_in_one_process_end_all_as_diverged(lab, victim):
    started = start_processes(2, train_poisoned, [*TRAIN, "--save_every", "2"], victim)
    assert end_processes(started) == [4, 4]
    run = Run.open("wild")
    assert read_status(run.dir).status == "diverged" and run.step == 2
    assert all(torch.isfinite(p).all() for p in run.net("raw").parameters())


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_process_ends_the_job_and_it_goes_on_with_another_number(lab, start, victim):
    process = start(2, LONG)
    wait_for_steps(process)
    ranks(process)[victim].kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode and f"process {victim} of 2 is gone" in out, (out, err)
    run = Run.open("team")
    assert run.step >= 10 and run.step % 10 == 0 and run.verify()
    if victim:
        assert read_status(run.dir).code == 3
    before = run.step
    legs = [(1, "team", 10), (1, "whole", 10)]
    if victim == 0:
        legs = [(1, "team", 10), (3, "team", 20), (1, "whole", 20)]
    for size, name, until in legs:
        params = LONG | {"name": name, "until": before + until}
        if size == 1:
            assert print_training(params) == 3
        else:
            assert start(size, params).wait(200) and Run.open(name).step == params["until"]
    for a, b in zip(Run.open("team").metrics, Run.open("whole").metrics, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"]["net"] == pytest.approx(b["loss"]["net"], rel=1e-3)


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_a_signal_stops_a_world_within_a_step(lab, start, sign):
    process = start(2, LONG)
    wait_for_steps(process)
    process.send_signal(sign)
    out, err = process.communicate(timeout=100)
    run = Run.open("team")
    status = read_status(run.dir)
    assert (status.status, status.code, status.step) == ("stopped", 3, run.step), (out, err)
    assert process.returncode and run.verify()
    told = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(told) == len(set(told)), "more than the first process speaks"


@pytest.mark.skipif(sys.platform != "linux", reason="the system cannot tell a process")
def test_a_launcher_that_is_killed_leaves_no_worker_behind(lab, start):
    process = start(2, LONG)
    wait_for_steps(process)
    workers = ranks(process)
    process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=100)
    assert len(gone) == 2 and not alive
    run = Run.open("team")
    assert read_status(run.dir).status == "stopped" and run.verify() and run.step >= 15
