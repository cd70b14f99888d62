"""A training resumes bit for bit, stops when asked, and ends with one code and one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cudlab.checkpoint import checkpoint_steps, load_optimizer, read_verified
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.disk import run_lock
from cudlab.fit import Diverged
from cudlab.jobs import RunStatus, StopRequest, TrainingStopped, read_status
from cudlab.run import Run
from cudlab.training import TrainEvent, train

ROOT = Path(__file__).parent.parent
SHORT = {"data": "moons", "steps": 12, "batch": 16, "log_every": 4}


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    "Runs go to a folder of the test's own."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    return tmp_path / "runs"


def train_until(name: str, until: int, **config) -> Run:
    "A run that was trained up to a step, by a process that knows nothing but the folder."
    run = create_run(Config(**SHORT | config), name)
    try:
        list(train(run, until=until))
    except TrainingStopped:
        assert run.step == until
    return Run.open(name)


def optimizer_tensors(run: Run) -> dict:
    "Every number of the optimiser, and the counters beside it."
    state = load_optimizer(read_verified(run.checkpoint, "train_state.safetensors"))["state"]
    found = {key: state[key] for key in ("step", "skipped", "streak")}
    for player, optim in state["optim"].items():
        for i, slots in optim["state"].items():
            found |= {(player, i, key): value for key, value in slots.items()}
    return found


def assert_same_run(a: Run, b: Run) -> None:
    "Bit for bit: weights, averages, log and optimiser."
    for file in ("net.safetensors", "ema.safetensors"):
        assert a.files[file] == b.files[file], file
    assert a.metrics == b.metrics
    one, two = optimizer_tensors(a), optimizer_tensors(b)
    assert one.keys() == two.keys()
    for key, value in one.items():
        same = torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
        assert same, key


@pytest.mark.parametrize(
    "config",
    [
        {"method": "rf"},
        {"method": "cud", "args": {"heads": 2}, "data": "digits"},
        pytest.param(
            {"method": "cud", "args": {"coupling": True}, "dropout": 0.1, "data": "digits"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"method": "cud", "classes": True, "args": {"target": "ema"}, "data": "digits"},
            marks=pytest.mark.long,
        ),
    ],
    ids=["rf", "heads", "coupling", "classes"],
)
def test_three_interruptions_change_nothing(config):
    whole = train_until("whole", 0, **config)
    for stop in (3, 7, 8, 0):
        legs = train_until("legs", stop, save_every=5, **config)
    assert_same_run(whole, legs)


def test_a_training_says_what_happens_in_records():
    events = list(train(create_run(Config(**SHORT), "told")))
    assert [event.kind for event in events] == ["start", *["step"] * 4, "done"]
    assert [event.step for event in events[1:-1]] == [1, 4, 8, 12]
    last = events[-2]
    assert last.num_steps == 12 and last.losses["net"] > 0 and last.images_per_second > 0
    assert str(last).startswith("step     12/12  loss ")
    (again,) = train(Run.open("told"))
    assert again.kind == "done" and "already trained, 12 steps" in str(again)


def test_players_that_share_a_loss_are_named_once():
    event = TrainEvent("step", "", 5, 10, {"net": 0.5, "encoder": 0.5, "disc": 1.25}, 80.0, 61.0)
    assert str(event) == "step      5/10  loss 0.5000  disc 1.2500       80 img/s  ETA 1:01"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_stops_after_the_step_and_saves(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=f"stopped by {name} at step 4 of 12"):
        for event in train(create_run(Config(**SHORT), "heard")):
            if event.step == 4:
                signal.raise_signal(number)
    assert signal.getsignal(number) == before
    run, status = Run.open("heard"), read_status(Run.open("heard").dir)
    assert run.step == 4 and run.verify()
    assert (status.status, status.code, status.step) == ("stopped", 3, 4) and name in status.why


def test_nohup_ignores_the_end_of_its_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_file_and_the_time_limit_end_a_training():
    run = create_run(Config(**SHORT), "filed")
    with pytest.raises(TrainingStopped, match="a STOP file at step 4"):
        for event in train(run):
            if event.step == 4:
                (run.dir / "STOP").touch()
    assert not (run.dir / "STOP").exists()
    with pytest.raises(TrainingStopped, match="its time limit at step 5"):
        list(train(Run.open("filed"), minutes=1e-9))


def test_a_stop_is_heard_while_the_pairs_are_made():
    config = Config(method="reflow", args={"pairs": 50_000_000}, steps=100, batch=16)
    run = create_run(config, "early")
    (run.dir / "STOP").touch()
    with pytest.raises(TrainingStopped, match="before step 1 of 100; the same command continues"):
        list(train(run))
    assert read_status(run.dir).status == "stopped" and Run.open("early").step == 0


def test_a_training_is_running_before_its_first_step():
    run = train_until("again", 4)
    events = train(run)
    assert read_status(run.dir).status == "stopped" and next(events).kind == "start"
    status = read_status(run.dir)
    assert (status.status, status.code, status.step, status.pid) == (
        "running",
        None,
        4,
        os.getpid(),
    )
    events.close()


def test_a_caller_that_goes_away_leaves_a_resumable_run():
    run = create_run(Config(**SHORT), "left")
    for event in train(run):
        if event.step == 4:
            break
    status = read_status(run.dir)
    assert (status.status, status.why) == ("stopped", "its caller went away")
    assert train_until("left", 0).step == 12


def test_a_second_training_of_the_same_folder_is_refused():
    run = train_until("shared", 4)
    with run_lock(run.dir):
        assert "another process" in error_of(list, train(Run.open("shared")))
    assert read_status(run.dir).status == "stopped"  # the first one's ending, not the second's


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("wild", [{"args": {"w2": 1e38}}, {"method": "rf"}])
def test_the_checkpoint_after_a_divergence_is_finite(every, wild):
    config = {"steps": 200, "lr": 1, "clip": 0, "batch": 32, "save_every": every, "warmup": 0}
    run = create_run(Config(**SHORT | config | wild), "wild")
    try:
        list(train(run))
    except Diverged as e:
        assert "not finite" in str(e) and "the checkpoint of step" in str(e)
        assert read_status(run.dir).status == "diverged" and read_status(run.dir).code == 4
    for step in checkpoint_steps(run.dir):
        kept = Run.open(f"wild@{step}")
        weights = [*kept.net("raw").parameters(), *kept.net("ema").parameters()]
        assert all(torch.isfinite(p).all() for p in weights)


def test_a_training_that_never_is_finite_diverges():
    config = {"steps": 50, "lr": 1, "clip": 0, "args": {"w2": 1e38}}
    with pytest.raises(Diverged):
        list(train(create_run(Config(**SHORT | config), "wild")))


def test_the_status_of_odd_files_is_that_of_a_new_run(tmp_path):
    assert read_status(tmp_path) == RunStatus()
    odd = ['{"status": 3, "step": "x", "pid": null}', '{"status": "\x1b[31m", "step": 3}']
    for text in ("", "[]", "{", *odd, "\udc80" * 3, "NaN"):
        (tmp_path / "status.json").write_bytes(text.encode(errors="surrogatepass"))
        assert read_status(tmp_path) == RunStatus(), text
    big = '{"status": "stopped", "pid": 1' + 400 * "0" + ', "step": -1, "why": "\\u001b[31m"}'
    (tmp_path / "status.json").write_text(big)
    assert read_status(tmp_path) == RunStatus("stopped", why="\\x1b[31m")


def test_a_run_belongs_to_one_configuration(lab):
    run = create_run(Config(**SHORT), "mine")
    assert create_run(Config(**SHORT | {"save_every": 3}), "mine").config.save_every == 3
    assert json.loads((run.dir / "config.json").read_text())["config"]["save_every"] == 500
    assert "exists with batch = 16, not 32" in error_of(
        create_run, Config(**SHORT | {"batch": 32}), "mine"
    )
    assert "ships with the lab" in error_of(create_run, Config(), "digits-rf")
    for name in ("../up", "/etc", ".", "~", "a b", "a\nb", "x" * 300):
        assert "name = " in error_of(create_run, Config(**SHORT), name)
    assert [p.name for p in lab.iterdir()] == ["mine"]


def test_a_folder_whose_first_checkpoint_is_missing_is_made_anew(lab):
    run = create_run(Config(**SHORT), "half")
    (run.dir / "checkpoints" / "step-000000" / "SHA256SUMS").unlink()
    assert create_run(Config(**SHORT), "half").verify()


def test_a_real_process_hears_a_real_signal(lab):
    command = [sys.executable, "-m", "cudlab", "train", "--data", "moons", "--steps", "1000000"]
    command += ["--batch", "32", "--log_every", "5", "--name", "signalled"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step     10/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    status = read_status(lab / "signalled")
    assert (process.returncode, status.status, status.pid) == (3, "stopped", process.pid), err
    assert f"stopped by SIGTERM at step {Run.open('signalled').step} of" in out and not err
