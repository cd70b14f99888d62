"""What can happen to a training: kills, full disks, folders and data that go away, damaged
checkpoints, forged states. Nothing is lost, and nothing is believed.

`make soak` kills a hundred times (CUDLAB_KILLS=100).
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cudlab.catalog import get_run_info, list_runs
from cudlab.checkpoint import (
    checkpoint_dir,
    checkpoint_steps,
    load_optimizer,
    newest_checkpoint,
    restore_hint,
    save_checkpoint,
    save_optimizer,
)
from cudlab.config import Config, CorruptData
from cudlab.create import create_run
from cudlab.disk import run_lock
from cudlab.jobs import TrainingStopped, get_exit_code, read_status
from cudlab.run import Run
from cudlab.training import train

TINY = dict(method="rf", data="moons", batch=8, log_every=1, save_every=1, warmup=1)
CALLS = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    return tmp_path / "runs"


@pytest.fixture
def memory(monkeypatch):
    "A folder of runs in memory, where there is one."
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        monkeypatch.setenv("CUDLAB_RUNS_PATH", folder)
        monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
        yield Path(folder)


def trained(name: str, until: int = 0, **changes) -> Run:
    "A run trained up to a step, or to its end."
    run = create_run(Config(**TINY | {"steps": 6} | changes), name)
    with contextlib.suppress(TrainingStopped):
        list(train(run, until=until))
    return Run.open(name)


def begun(name: str, step: int, **changes):
    "A training that has made so many steps, and is between two of them: (run, its iterator)."
    run = create_run(Config(**TINY | {"steps": 60} | changes), name)
    events = train(run)
    next(e for e in events if e.step == step and e.kind == "step")
    return run, events


def failure(events) -> Exception:
    "What ends a training."
    with pytest.raises((ValueError, OSError)) as caught:
        list(events)
    assert "\n" not in str(caught.value)
    return caught.value


def leftovers(run_dir: Path) -> list:
    "Unfinished things in a run folder."
    return [p for p in run_dir.rglob("*") if ".tmp" in p.name]


def assert_same(a: Run, b: Run) -> None:
    "Bit for bit, training state and log included."
    files = ("net.safetensors", "ema.safetensors", "train_state.safetensors")
    assert [a.files[name] for name in files] == [b.files[name] for name in files]
    assert a.metrics == b.metrics


# Kills


def killed(after: int, **config) -> int:
    "Train in a process that is killed at a file operation, the first one after so many."

    def work():
        left = [after]
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name), left))
        with contextlib.suppress(TrainingStopped):
            list(train(create_run(Config(**TINY | {"steps": 10**5} | config), "killed")))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def counted(function, left: list):
    "The same function, whose last call is the end of the process."

    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call


def test_kills_at_any_moment_lose_one_interval_at_most(memory):
    trained("warm")  # what torch loads on its first step is loaded before the forks
    folder, last, inside, rng = memory / "killed", -1, 0, random.Random(0)
    count = int(os.environ.get("CUDLAB_KILLS", 10))
    for _ in range(count):
        assert killed(rng.randrange(100, 300), keep=3, keep_every=4) == -signal.SIGKILL
        inside += bool(leftovers(folder))
        run = Run(folder)
        assert run.verify() == (5 if run.step else 4) and run.step > last
        assert get_run_info("killed").status == "dead" and not get_run_info("killed").damaged
        assert run.solve(index=2, steps=1).x.isfinite().all() and run.net("raw")
        assert 0 <= max((row["step"] for row in run.metrics), default=0) - run.step <= 1
        for step in checkpoint_steps(folder):
            assert Run(checkpoint_dir(folder, step)).verify() == (5 if step else 4)
        last = run.step
    print(f"{inside} of {count} kills fell into a save")
    assert inside >= count // 4
    end = trained("killed", until=last + 3, steps=10**5, keep=3, keep_every=4)
    assert not leftovers(folder) and read_status(folder).status == "stopped"
    kept = [step for step in checkpoint_steps(folder) if step % 4]
    assert len(kept) <= 3 and all(step > last for step in kept)
    whole = trained("whole", until=last + 3, steps=10**5, save_every=10**6)
    assert end.step == whole.step == last + 3
    assert_same(end, whole)


def test_a_second_job_changes_nothing(lab):
    run = trained("shared", until=2)
    before = {p: p.stat().st_mtime_ns for p in run.dir.rglob("*") if p.is_file()}
    with run_lock(run.dir):
        assert "another process" in str(failure(train(Run(run.dir))))
    assert before == {p: p.stat().st_mtime_ns for p in run.dir.rglob("*") if p.is_file()}


# Disks


@contextlib.contextmanager
def mounted(*words, on: Path):
    "Mount something for a while; skip where that is refused."
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    done = subprocess.run(["mount", *words, str(on)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(on)], check=True)


def fill_disk(place: Path) -> None:
    "Leave so little room that no checkpoint fits."
    with open(place / "filler", "ab") as f:
        f.write(b"x" * max(0, shutil.disk_usage(place).free - 700_000))


def test_a_full_disk_costs_no_checkpoint(lab):
    lab.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=16m", "none", on=lab):
        run, events = begun("full", 4, keep=1)
        fill_disk(lab)
        error = failure(events)
        assert get_exit_code(error) == 5 and "No space left" in str(error)
        for _ in range(2):
            assert Run(run.dir).verify() == 5 and Run(run.dir).step >= 3
            assert not leftovers(run.dir)
            for step in checkpoint_steps(run.dir):
                assert Run(checkpoint_dir(run.dir, step)).verify()
            fill_disk(lab)  # old checkpoints make room before a new one is written
            assert get_exit_code(failure(train(Run(run.dir)))) == 5  # a second time
        (lab / "filler").unlink()
        assert trained("full", until=Run(run.dir).step + 2, steps=60).step >= 5


def test_a_disk_that_turns_read_only_costs_no_checkpoint(lab):
    run, events = begun("still", 4)
    with mounted("--bind", str(run.dir), on=run.dir):
        words = ["mount", "-o", "remount,ro,bind", str(run.dir)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("a read-only mount is refused here")
        error = failure(events)
        assert get_exit_code(error) == 5 and "Read-only" in str(error)
        assert Run(run.dir).verify() == 5
        assert get_exit_code(failure(train(Run(run.dir)))) == 5
    assert trained("still", until=8, steps=60).step == 8 and not leftovers(run.dir)


def test_a_folder_that_goes_away_stays_away(lab):
    run, events = begun("gone", 4)
    shutil.rmtree(run.dir)
    error = failure(events)
    assert get_exit_code(error) == 5 and "whole" not in str(error) and not run.dir.exists()
    assert not [r for r in list_runs() if not r.shipped]


def make_pictures(folder: Path, seed: int) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    for i in range(12):
        pixels = random.Random(seed + i).randbytes(64)
        image.frombytes("L", (8, 8), pixels).save(folder / f"{i}.png")


def test_data_that_is_gone_or_changed_ends_with_code_5(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path / "cache"))
    data = tmp_path / "mine"
    make_pictures(data, 0)
    run = trained("pictures", until=1, steps=3, data=f"folder:{data}")
    make_pictures(data, 50)
    said = [failure(train(Run(run.dir)))]
    (data / "0.png").write_bytes(b"<html>")
    said.append(failure(train(Run(run.dir))))
    shutil.rmtree(data)
    said.append(failure(train(Run(run.dir))))
    assert "is not the data that run 'pictures' was started on" in str(said[0])
    assert "not readable as an image" in str(said[1]) and "there is no folder" in str(said[2])
    assert {get_exit_code(error) for error in said} == {5} == {read_status(run.dir).code}
    assert Run(run.dir).verify() == 5
    make_pictures(data, 0)
    list(train(Run(run.dir)))
    assert Run(run.dir).step == 3


# More than one checkpoint


@pytest.mark.parametrize(
    "choices, steps",
    [
        (dict(keep=1), [7]),
        (dict(), [6, 7]),
        (dict(keep=2, keep_every=2), [2, 4, 6, 7]),
        (dict(save_every=1000, keep_every=2, keep=1), [2, 4, 6, 7]),
        (dict(save_every=1000), [0, 7]),
    ],
)
def test_a_training_keeps_the_last_and_every_mth_checkpoint(lab, choices, steps):
    assert checkpoint_steps(trained("kept", steps=7, **choices).dir) == steps


def test_keeping_is_not_another_run_and_may_change_on_the_way(lab):
    run = trained("more", until=4, keep=4)
    assert checkpoint_steps(run.dir) == [1, 2, 3, 4]
    config = (run.dir / "config.json").read_bytes()
    assert checkpoint_steps(trained("more", until=5, keep=1).dir) == [5]
    assert (run.dir / "config.json").read_bytes() == config and Run(run.dir).verify() == 5


@pytest.mark.parametrize("file", ["net.safetensors", "train_state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["gone", "flipped"])
def test_from_a_damaged_checkpoint_an_older_one_leads_to_the_same_end(lab, file, harm):
    whole = trained("straight")
    run = trained("back", until=4, keep=3)
    path = run.checkpoint / file
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    with pytest.raises(CorruptData, match=file):
        list(train(Run(run.dir)))
    place = "delete checkpoints/step-000004"
    assert restore_hint(run.dir) == f"; step 3 is whole: to go back to it, {place}"
    shutil.rmtree(run.checkpoint)
    again = trained("back", keep=3)
    assert_same(again, whole)


def test_a_damaged_configuration_is_mended_by_its_copy(lab):
    run = trained("config", until=4)
    (run.dir / "config.json").write_bytes(b"")
    with pytest.raises(CorruptData, match="config.json"):
        create_run(Config(**TINY | {"steps": 6}), "config")
    shutil.copy(run.checkpoint / "config.json", run.dir / "config.json")
    assert trained("config").step == 6


# Forged states, odd surroundings


def test_a_forged_training_state_is_refused(lab):
    run = trained("state", until=3)
    files = {n: (run.checkpoint / n).read_bytes() for n in ("net.safetensors", "ema.safetensors")}
    whole = load_optimizer((run.checkpoint / "train_state.safetensors").read_bytes())
    bad = [
        b"",
        b"\x80\x04",
        save_optimizer(whole | {"step": 5}),
        save_optimizer({"step": 3}),
        save_optimizer({}),
        safetensors.torch.save({"0": torch.zeros(2)}),
        safetensors.torch.save({}, {"state": "[" * 10**5}),
    ]
    for data in [*bad, save_optimizer(whole)]:
        shutil.rmtree(checkpoint_dir(run.dir, 3))
        save_checkpoint(run.dir, 3, files | {"train_state.safetensors": data}, {})
        if data in bad:
            error = failure(train(Run(run.dir)))
            assert isinstance(error, CorruptData) and "cannot be continued" in str(error)
    list(train(Run(run.dir)))
    assert Run(run.dir).step == 6


def test_a_run_that_holds_a_link_is_not_trained(lab, tmp_path):
    run = trained("linked", until=3)
    (tmp_path / "other").write_text("mine")
    (run.dir / "metrics.jsonl").unlink()
    (run.dir / "metrics.jsonl").symlink_to(tmp_path / "other")
    for make in (lambda: list(train(Run(run.dir))), lambda: list(train(run))):
        with pytest.raises(ValueError, match="'linked/metrics.jsonl' is a link"):
            make()
    assert (tmp_path / "other").read_text() == "mine"
    lab.joinpath("elsewhere").symlink_to(tmp_path / "nowhere")
    with pytest.raises((ValueError, OSError)):
        trained("elsewhere")
    assert not (tmp_path / "nowhere").exists()


ODD_NAMES = """
import json, sys
from cudlab.config import Config
from cudlab.create import create_run
from cudlab.training import train
list(train(create_run(Config(**json.loads(sys.argv[1])), "опыт-实验")))
"""


@pytest.mark.parametrize(
    "folder, change",
    [
        ("lab with spaces, опыты и 实验", {}),
        ("plain", {"HOME": None, "LC_ALL": "C", "LANG": None, "USER": None}),
    ],
    ids=["names", "bare"],
)
@pytest.mark.long
def test_training_works_in_odd_surroundings(tmp_path, monkeypatch, folder, change):
    root, elsewhere = tmp_path / folder, tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "CUDLAB_RUNS_PATH": str(root / "runs")}
    env = os.environ | env | {"CUDLAB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | change
    env = {key: value for key, value in env.items() if value is not None}
    words = [sys.executable, "-c", ODD_NAMES, json.dumps(TINY | {"steps": 3})]
    done = subprocess.run(words, cwd=elsewhere, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(root / "runs"))
    assert Run.open("опыт-实验@2").verify() == 5 and not list(elsewhere.iterdir())
    assert newest_checkpoint(root / "runs" / "опыт-实验").name == "step-000003"
