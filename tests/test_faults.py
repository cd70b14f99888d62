"""What can happen to a run: kills, full and lying disks, folders that go away, changed bytes,
forged files. Nothing is lost, and nothing is believed.

`make soak` kills a hundred times (CUDLAB_KILLS=100)."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cudlab import training
from cudlab.catalog import get_run_info, list_runs, run_info
from cudlab.checkpoint import (
    checkpoint_steps,
    commit_files,
    hash_bytes,
    load_optimizer,
    parse_jsonl,
    read_manifest,
    run_lock,
    save_optimizer,
    seal_manifest,
)
from cudlab.cli import run_main
from cudlab.config import Config, CorruptData
from cudlab.run import Run
from cudlab.training import EXIT_CODES, TrainingStopped, create_run, get_exit_code, restore, train

TINY = dict(method="rf", data="moons", batch=8, log_every=1, save_every=1, warmup=1)
WORDS = [f"{key}={value}" for key, value in TINY.items()]
UNPICKLED = []
sys.addaudithook(
    lambda event, args: UNPICKLED.append(args) if event == "pickle.find_class" else None
)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    return tmp_path / "runs"


def without(words: list[str], *keys: str) -> list[str]:
    "The words that speak of none of these keys."
    return [word for word in words if word.partition("=")[0] not in keys]


def trained(name: str, until: int = 0, **changes) -> Run:
    with contextlib.suppress(TrainingStopped):
        list(train(create_run(Config(**TINY | {"steps": 6} | changes), name), until=until))
    return Run.open(name)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def leftovers(folder: Path) -> list:
    "Hidden and unfinished things in a run folder."
    return [
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.name.startswith(".") and p.name != ".lock" or p.name == "progress.json"
    ]


def failure(lines) -> Exception:
    with pytest.raises((ValueError, OSError)) as caught:
        list(lines)
    return caught.value


# Kills


def forked(*words) -> multiprocessing.Process:
    "`cudlab train` as a process that can be killed, without the seconds an import of torch takes."

    def work():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os._exit(run_main(["train", *words]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait(for_what, process) -> None:
    end = time.monotonic() + 60
    while not for_what():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.0005)


@pytest.fixture
def memory(monkeypatch):
    "A folder of runs in memory, where there is one: a kill does not ask how slow the disk is."
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as folder:
        monkeypatch.setenv("CUDLAB_RUNS_PATH", folder)
        monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
        yield Path(folder)


def test_kills_at_any_moment_lose_one_interval_at_most(memory):
    lab, rng = memory, random.Random(0)
    trained("warm")  # what torch loads on its first step is loaded before the forks
    folder, last, inside, count = lab / "killed", 0, 0, int(os.environ.get("CUDLAB_KILLS", 12))
    words = [*WORDS, "steps=100000", "name=killed", "keep=3", "keep_every=4"]
    for kill in range(count):
        process = forked(*words)
        wait(
            lambda done=last: (
                folder.is_dir()
                and (folder / "MANIFEST.json").is_file()
                and read_manifest(folder)["step"] > done
            ),
            process,
        )
        if kill % 3:
            time.sleep(rng.random() * 0.1)
        else:  # in the midst of a save
            wait((folder / ".next").exists, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        inside += any(p.startswith((".next", ".commit", "kept/.")) for p in leftovers(folder))
        run = Run(folder)
        assert (
            run.verify() == 5
            and run.step > last
            and get_run_info("killed").status == "dead"
            and not get_run_info("killed").damaged
        )
        assert run.solve(index=2, steps=1).x.isfinite().all() and (run.net("raw"), run.net("ema"))
        logged = max(row["step"] for row in parse_jsonl((folder / "metrics.jsonl").read_bytes()))
        assert 0 <= logged - run.step <= 1
        assert all(
            Run(folder / "kept" / str(step)).verify() == (5 if step else 4)
            for step in checkpoint_steps(folder)
        )
        last = run.step
    print(f"{inside} of {count} kills fell into a save")
    assert inside >= count // 4
    process = forked(*words, f"until={last + 3}")
    process.join(60)
    assert process.exitcode == 3 and not leftovers(folder) and status(folder)["code"] == 3
    assert (
        all(step >= last or step % 4 == 0 for step in checkpoint_steps(folder))
        and len([s for s in checkpoint_steps(folder) if s % 4]) <= 2
    )
    process = forked(
        *without(words, "name", "save_every", "keep_every"),
        "name=whole",
        "save_every=1000000",
        "keep_every=0",
        f"until={last + 3}",
    )
    process.join(60)
    for name in ("net.safetensors", "ema.safetensors", "train_state.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (lab / "whole" / name).read_bytes(), name


def test_what_a_killed_job_left_is_swept_up_and_named(lab):
    folder = trained("swept", until=3).dir
    for name in (".next", ".commit", "kept/.2"):
        (folder / name).mkdir()
    for name in (
        ".next/net.safetensors",
        "kept/.2/net.safetensors",
        ".tmpQ7x",
        ".tmp-progress.json",
        ".progress",
        "progress.json",
    ):
        (folder / name).write_bytes(b"half")
    first = list(train(create_run(Config(**TINY | {"steps": 6}), "swept")))[0]
    assert all(
        name in first
        for name in (".next", ".commit", "kept/.2", ".tmpQ7x", ".progress", "progress.json")
    ) and not leftovers(folder)
    assert Run(folder).verify() == 5 and Run(folder).step == 6


def test_what_ships_is_not_continued_but_explained(lab, capsys):
    assert (
        run_main(["continue", "digits-rf"]) == 2
        and "nothing to continue; checkpoints/README.md" in capsys.readouterr().err
        and not (lab / "digits-rf").exists()
    )


def test_a_second_job_changes_nothing(lab, capsys):
    folder = trained("shared", until=2).dir
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with run_lock(folder):
        assert (
            run_main(["train", *WORDS, "steps=6", "name=shared"]) == 2
            and "another process" in capsys.readouterr().err
        )
        with pytest.raises(ValueError, match="another process"):
            restore(folder)
    assert before.items() <= {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }.items() | {(folder / ".lock", before[folder / ".lock"])}


# Endings


def test_a_code_follows_from_the_class_and_not_from_the_words():
    for words in ("data is damaged", "stopped", "", "another process"):
        assert (
            get_exit_code(ValueError(words)) == 2
            and get_exit_code(CorruptData(words)) == 5
            and get_exit_code(KeyError(words)) == 1
        )
    assert (
        get_exit_code() == 0
        and get_exit_code(FileNotFoundError(2, "x")) == get_exit_code(OSError("x")) == 5
        and set(EXIT_CODES.values()) == {2, 3, 4, 5}
    )


def test_every_ending_is_written_in_one_form(lab, monkeypatch):
    keys = {"status", "code", "why", "step", "of", "pid"}
    folder = trained("ends", until=2).dir
    assert status(folder).keys() == keys and (
        status(folder)["status"],
        status(folder)["code"],
        status(folder)["step"],
        status(folder)["of"],
    ) == ("stopped", 3, 2, 6)
    job = train(Run(folder))
    next(job)
    job.close()
    assert (status(folder)["status"], status(folder)["why"]) == (
        "stopped",
        "its caller went away",
    ) and get_run_info("ends").status == "stopped"
    monkeypatch.setattr(training, "build_objective", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(train(Run(folder)))
    assert status(folder).keys() == keys and (
        status(folder)["status"],
        status(folder)["code"],
        status(folder)["step"],
    ) == ("failed", 1, 2)
    monkeypatch.undo()
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(lab))
    assert run_main(["train", *WORDS, "steps=6", "name=ends"]) == 0
    assert status(folder) == {
        "status": "done",
        "code": 0,
        "why": "all steps are done",
        "step": 6,
        "of": 6,
        "pid": os.getpid(),
    }


# Disks


@contextlib.contextmanager
def mounted(*words, on: Path):
    "Mount something for a while; skip where that is refused."
    done = (
        subprocess.run(["mount", *words, str(on)], capture_output=True, text=True)
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip(
            f"mounting is refused here: {done.stderr.strip() if done else 'no mount command'}"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(on)], check=True)


def refused(capsys, *words) -> str:
    "Run `cudlab` on it: code 5 and one sentence."
    capsys.readouterr()
    assert run_main(list(words)) == 5
    said = capsys.readouterr().err
    assert (
        said.startswith("error: ")
        and said.count("\n") == 1
        and "Traceback" not in said
        and "[Errno" not in said
    ), said
    return said


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "met while writing"])
def test_a_full_disk_costs_no_checkpoint(lab, capsys, monkeypatch, seen):
    lab.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=16m", "none", on=lab):
        run = create_run(Config(**TINY | {"steps": 60}), "full")
        job = train(run)
        for line in job:
            if line.startswith("step      4/"):
                break
        free = shutil.disk_usage(lab).free
        with open(lab / "filler", "wb") as f:
            f.write(b"x" * (free - 700_000))
        if not seen:  # as under a quota
            monkeypatch.setattr(
                shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**40})
            )
        why = str(failure(job))
        folder = run.dir
        assert (
            ("bytes and the disk of" in why) if seen else ("No space left" in why)
        ) and f"its checkpoint of step {Run(folder).step} is whole" in why
        assert (
            Run(folder).verify() == 5
            and Run(folder).step >= 3
            and not leftovers(folder)
            and (status(folder)["status"], status(folder)["code"]) == ("failed", 5)
        )
        assert all(Run(folder / "kept" / str(step)).verify() for step in checkpoint_steps(folder))
        refused(capsys, "train", *WORDS, "steps=60", "name=full")
        assert Run(folder).verify() == 5 and not leftovers(folder)
        refused(capsys, "train", *WORDS, "steps=61", "name=other")
        assert not (lab / "other").exists()
        (lab / "filler").unlink()
        assert (
            run_main(["train", *WORDS, "steps=60", "name=full", f"until={Run(folder).step + 2}"])
            == 3
        )


def test_a_disk_that_turns_read_only_costs_no_checkpoint(lab, capsys):
    run = create_run(Config(**TINY | {"steps": 60}), "still")
    job = train(run)
    next(line for line in job if line.startswith("step      4/"))
    with mounted("--bind", str(run.dir), on=run.dir):
        if subprocess.run(
            ["mount", "-o", "remount,ro,bind", str(run.dir)], capture_output=True
        ).returncode:
            pytest.skip("a read-only mount is refused here")
        error = failure(job)
        assert (
            get_exit_code(error) == 5
            and "Read-only" in str(error)
            and "is whole" in str(error)
            and Run(run.dir).verify() == 5
        )
        refused(capsys, "train", *WORDS, "steps=60", "name=still")
    assert not leftovers(run.dir) or leftovers(run.dir) == [
        "progress.json"
    ]  # which could not be removed
    assert run_main(["train", *WORDS, "steps=60", "name=still", "until=8"]) == 3


def test_a_folder_that_goes_away_stays_away(lab):
    run = create_run(Config(**TINY | {"steps": 60}), "gone")
    job = train(run)
    next(line for line in job if line.startswith("step      4/"))
    shutil.rmtree(run.dir)
    error = failure(job)
    assert (
        get_exit_code(error) == 5
        and "is whole" not in str(error)
        and not run.dir.exists()
        and not [r for r in list_runs() if not r.shipped]
    )


def test_a_disk_that_lies_is_caught_before_anything_old_goes(lab, monkeypatch):
    run = trained("lied", until=3)
    before = {
        p.name: p.read_bytes() for p in run.dir.iterdir() if p.is_file() and p.name != "status.json"
    }
    honest = os.fsync

    def fsync(handle):
        honest(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".next/ema.safetensors"):
            os.pwrite(handle, b"\0" * 64, os.fstat(handle).st_size // 2)

    monkeypatch.setattr(os, "fsync", fsync)
    error = failure(train(run))
    assert (
        get_exit_code(error) == 5 and "cannot be trusted" in str(error) and not leftovers(run.dir)
    )
    assert (
        all(
            (run.dir / name).read_bytes() == data
            for name, data in before.items()
            if name != "metrics.jsonl"
        )
        and Run(run.dir).verify() == 5
    )


def pictures(folder: Path, seed: int) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    for i in range(12):
        image.frombytes("L", (8, 8), random.Random(seed + i).randbytes(64)).save(
            folder / f"{i}.png"
        )


def test_data_that_is_gone_or_changed_ends_with_code_5(lab, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path / "cache"))
    words = [
        "train",
        *without(WORDS, "data"),
        f"data=folder:{tmp_path / 'mine'}",
        "steps=3",
        "name=pictures",
    ]
    pictures(tmp_path / "mine", 0)
    assert run_main([*words, "until=2"]) == 3
    pictures(tmp_path / "mine", 50)
    assert "is not the data that run 'pictures' was started on" in refused(capsys, *words)
    (tmp_path / "mine" / "0.png").write_bytes(b"<html>")
    assert "not readable as an image" in refused(capsys, *words)
    shutil.rmtree(tmp_path / "mine")
    assert (
        "there is no folder" in refused(capsys, *words)
        and Run.open("pictures").verify() == 5
        and status(lab / "pictures")["code"] == 5
    )
    pictures(tmp_path / "mine", 0)
    assert run_main(words) == 0


# More than one checkpoint


@pytest.mark.parametrize(
    "keep, keep_every, steps",
    [
        (1, 0, []),
        (2, 0, [6]),
        (3, 0, [5, 6]),
        (1, 3, [3, 6]),
        (2, 2, [2, 4, 6]),
        (100, 0, list(range(7))),
    ],
)
def test_the_last_and_every_mth_are_kept(lab, keep, keep_every, steps):
    run = trained("kept", steps=7, keep=keep, keep_every=keep_every)
    assert checkpoint_steps(run.dir) == steps
    for step in steps:
        old = Run.open(f"kept@{step}")
        assert (
            old.step == step
            and old.name == f"kept@{step}"
            and old.verify() == (4 if step == 0 else 5)
            and len(old.metrics) == step
            and old.solve(index=2, steps=2).nfe == 2
        )
    assert [r.name for r in list_runs() if not r.shipped] == ["kept"]


def test_keep_every_is_kept_between_saves_too(lab):
    assert checkpoint_steps(trained("between", save_every=1000, keep_every=2, keep=1).dir) == [
        2,
        4,
    ]


def test_keeping_is_not_another_run_and_may_change_on_the_way(lab):
    run = trained("more", until=4, keep=4)
    assert (
        checkpoint_steps(run.dir) == [1, 2, 3]
        and create_run(Config(**TINY | {"steps": 6, "keep": 1}), "more").config.keep == 1
    )
    assert (
        checkpoint_steps(trained("more", until=5, keep=1).dir) == []
        and Run.open("more").config.keep == 1
    )


@pytest.mark.parametrize("links", [True, False])
def test_a_kept_checkpoint_shares_what_is_not_written_again(lab, monkeypatch, links):
    if not links:
        monkeypatch.setattr(
            os, "link", lambda *args: (_ for _ in ()).throw(PermissionError(1, "no links here"))
        )
    run = trained("linked", until=3)
    weights = {p: p.read_bytes() for p in (run.dir / "kept" / "2").iterdir()}
    trained("linked", until=4, keep=5)
    assert (
        all(p.read_bytes() == data for p, data in weights.items())
        and Run.open("linked@2").verify() == 5
    )
    assert (os.stat(run.dir / "kept" / "3" / "ema.safetensors").st_nlink == 1) and (
        run.dir / "metrics.jsonl"
    ).stat().st_ino != (run.dir / "kept" / "3" / "metrics.jsonl").stat().st_ino


@pytest.mark.parametrize(
    "file",
    ["config.json", "MANIFEST.json", "net.safetensors", "train_state.safetensors", "metrics.jsonl"],
)
@pytest.mark.parametrize("harm", ["gone", "flipped"])
def test_from_a_damaged_newest_checkpoint_a_kept_one_leads_to_the_same_end(lab, capsys, file, harm):
    words = ["train", *WORDS, "steps=6", "name=back", "keep=3"]
    whole = trained("straight")
    assert run_main([*words, "until=4"]) == 3
    path = lab / "back" / file
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    (lab / "back" / "kept" / "3" / "ema.safetensors").write_bytes(b"")
    assert get_run_info("back").damaged or file not in ("config.json", "MANIFEST.json")
    said = refused(capsys, *words)
    assert "its checkpoint of step 2 is whole, go back to it with: cudlab restore back" in said
    assert "keeps no whole checkpoint of step 3" in refused(capsys, "restore", "back", "3")
    assert (
        run_main(["restore", "back"]) == 0
        and Run.open("back").step == 2
        and Run.open("back").verify() == 5
        and get_run_info("back").status == "stopped"
    )
    assert run_main(words) == 0
    for name in ("net.safetensors", "ema.safetensors", "train_state.safetensors", "metrics.jsonl"):
        assert (lab / "back" / name).read_bytes() == (whole.dir / name).read_bytes(), name


def test_going_back_loses_nothing_and_wrong_steps_are_refused(lab, capsys):
    trained("rewound", keep=3)
    assert (
        run_main(["restore", "rewound", "5"]) == 0
        and checkpoint_steps(lab / "rewound") == [4, 5, 6]
        and Run.open("rewound@6").step == 6
    )
    for words, code in (
        (["rewound", "3"], 2),
        (["rewound", "../4"], 2),
        (["rewonud"], 2),
        (["digits-rf"], 2),
    ):
        assert run_main(["restore", *words]) == code and capsys.readouterr().err.startswith(
            "error: "
        )
    for name in ("rewound@3", "rewound@", "rewound@../kept/4", "@4", "nobody@4"):
        with pytest.raises(ValueError, match="keeps no step|unknown run"):
            Run.open(name)


def test_odd_things_in_kept_do_no_harm(lab):
    folder = trained("odd").dir
    for name in ("notes.txt", "007", "٣", "-1", "4 "):
        (folder / "kept" / name).mkdir()
    (folder / "kept" / "3").write_text("a file")
    (folder / "kept" / "8").symlink_to("/")
    assert checkpoint_steps(folder) == [5] and not get_run_info("odd").damaged


# Changed bytes


def mutate(rng: random.Random, folder: Path, files: dict) -> dict:
    "Change a run folder at random; what it was: name -> bytes."
    while True:
        name = rng.choice(list(files))
        data, kind = (
            bytearray(files[name]),
            rng.choice(["flip", "truncate", "append", "delete", "swap", "zero", "exchange"]),
        )
        at, length = rng.randrange(len(data)), rng.choice([1, 1, 4, 64])
        changed = {}
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "truncate":
            del data[at:]
        elif kind == "append" and name != "metrics.jsonl":  # the log grows between checkpoints
            data += rng.randbytes(length)
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "swap":
            other = rng.randrange(len(data))
            data[at], data[other] = data[other], data[at]
        elif kind == "exchange":
            other = rng.choice(list(files))
            changed = {name: files[other], other: files[name]}
        if kind == "delete":
            (folder / name).unlink()
            return {name: files[name]}
        changed = changed or {name: bytes(data)}
        if all(data != files[n] for n, data in changed.items()):
            for n, new in changed.items():
                (folder / n).write_bytes(new)
            return {n: files[n] for n in changed}


@pytest.mark.parametrize("kind, count", [("solver", 9000), ("network", 1000)])
def test_every_change_of_a_byte_is_found(lab, kind, count):
    if kind == "network":
        folder = trained("mutated", until=3).dir
    else:
        list(
            train(
                create_run(
                    Config(
                        method="dode",
                        args=dict(teacher="digits-rf", moves=2, samples=2, batches=2, scale=1),
                    ),
                    "mutated",
                )
            )
        )
        folder = lab / "mutated"
    files = {
        name: (folder / name).read_bytes()
        for name in [*read_manifest(folder)["files"], "MANIFEST.json"]
    }
    assert len(files) == 6
    rng, opened, seen = random.Random(kind), 0, len(UNPICKLED)
    for i in range(count):
        was = mutate(rng, folder, files)
        with pytest.raises(CorruptData):  # anything else is a crash
            run = Run(folder)
            opened += 1
            run.verify()
        run_info(folder, False)
        if i % 25 == 0 and kind == "network":
            with contextlib.suppress(ValueError):
                Run(folder).net(("raw", "ema")[i % 2])
            with pytest.raises(ValueError):
                list(train(Run(folder)))
        for name, data in was.items():
            (folder / name).write_bytes(data)
    assert Run(folder).verify() == 5 and opened > count // 4 and len(UNPICKLED) == seen


def test_the_hook_sees_what_is_unpickled():
    seen = len(UNPICKLED)
    pickle.loads(pickle.dumps(Path("x")))
    assert len(UNPICKLED) > seen


# Forged files


def forge(folder: Path, name: str, data) -> None:
    "Put a file into a run and make the manifest vouch for it."
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    manifest = read_manifest(folder)
    manifest["files"][name] = {"sha256": hash_bytes(data), "bytes": len(data)}
    (folder / "MANIFEST.json").write_bytes(seal_manifest(manifest))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def safe(header, payload: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + payload


def bomb() -> bytes:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z,
        z.open("archive/data.pkl", "w", force_zip64=True) as f,
    ):
        for _ in range(128):
            f.write(bytes(2**20))
    return file.getvalue()


def torch_pickle(trap: str) -> bytes:
    file = io.BytesIO()
    torch.save({"net.weight": Evil(trap)}, file)
    return file.getvalue()


def changed(**tensors):
    "The good weights with some tensors replaced; None takes one out."
    return lambda good, trap: safetensors.torch.save(
        {k: v for k, v in (good | tensors).items() if v is not None}
    )


def first(change):
    "The good weights with the first tensor changed."
    return lambda good, trap: safetensors.torch.save(
        good | {key: change(v).contiguous() for key, v in list(good.items())[:1]}
    )


DEEP = b"[" * 10**6
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
    "huge shape": lambda good, trap: safe(
        {"net.w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "overflowing shape": lambda good, trap: safe(
        {"net.w": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}
    ),
    "negative offsets": lambda good, trap: safe(
        {"net.w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"\0" * 4
    ),
    "overlap": lambda good, trap: safe(
        {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in ("net.a", "net.b")},
        b"\0" * 4,
    ),
    "strange dtype": lambda good, trap: safe(
        {"net.w": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
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
    **{key: {"shape": shape} for key, shape in SHAPES.items()},
    "a million classes": {"classes": list(range(10**6))},
    "classes as a number": {"classes": 10},
    "parameters as text": {"parameters": "many"},
    "10^30 parameters": {"parameters": 10**30},
    "created in numbers": {"created": 5},
    "teacher as a list": {"teacher": [1]},
    "config as text": {"config": "rf"},
    "config as a list": {"config": [["steps", 5]]},
    "no config": {"config": None},
    **{
        f"{key} = {str(value)[:12]}": {"config": {"method": "rf", "data": "moons", key: value}}
        for key, value in (
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
    },
}
MANIFESTS = {
    "nothing": b"",
    "deep": DEEP,
    "html": b"<html>",
    "text": b'"x"',
    "step in words": {"step": "six"},
    "step beyond the end": {"step": 10**9},
    "step -1": {"step": -1},
    "step true": {"step": True},
    "step infinite": {"step": math.inf},
    "files as a list": {"files": ["net.safetensors"]},
    "a path": {"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 10}}},
    "an absolute path": {"files": {"/dev/zero": {"sha256": "0" * 64, "bytes": 10}}},
    "a petabyte": {"files": {"net.safetensors": {"sha256": "0" * 64, "bytes": 10**15}}},
    "negative bytes": {"files": {"net.safetensors": {"sha256": "0" * 64, "bytes": -1}}},
    "more keys": {"evil": 1},
}
LATER = (
    "shape of another net",
    "net = ../net",
)  # which the list, that makes no network, cannot know
PLACES = ("a folder", "a pipe", "a device", "a sparse terabyte")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A finished run to be forged, and its averaged weights."
    folder = tmp_path_factory.mktemp("good") / "run"
    os.environ["CUDLAB_RUNS_PATH"], before = str(folder.parent), os.environ.get("CUDLAB_RUNS_PATH")
    list(train(create_run(Config(**TINY | {"steps": 2, "keep": 1}), "run")))
    os.environ["CUDLAB_RUNS_PATH"] = before
    return folder, safetensors.torch.load((folder / "ema.safetensors").read_bytes())


def peak() -> int:
    "The most memory this process has had since the last `forget`, bytes."
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def forged(folder: Path, weights: dict, trap: Path, part: str, case: str) -> None:
    if part == "weights":
        forge(folder, "ema.safetensors", WEIGHTS[case](weights, str(trap)))
    elif part == "config":
        value = CONFIGS[case]
        forge(
            folder,
            "config.json",
            value
            if isinstance(value, bytes)
            else json.dumps(json.loads((folder / "config.json").read_bytes()) | value).encode(),
        )
    elif part == "manifest":
        value = MANIFESTS[case]
        (folder / "MANIFEST.json").write_bytes(
            value if isinstance(value, bytes) else seal_manifest(read_manifest(folder) | value)
        )
    else:
        file = folder / "ema.safetensors"
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
            manifest = read_manifest(folder)
            manifest["files"]["ema.safetensors"]["bytes"] = 10**12
            (folder / "MANIFEST.json").write_bytes(seal_manifest(manifest))


@pytest.mark.parametrize(
    "part, case",
    [
        *(("weights", c) for c in WEIGHTS),
        *(("config", c) for c in CONFIGS),
        *(("manifest", c) for c in MANIFESTS),
        *(("place", c) for c in PLACES),
    ],
)
def test_a_forged_run_is_refused_in_a_sentence(lab, tmp_path, good, part, case):
    folder, trap, seen = (
        Path(shutil.copytree(good[0], lab / "forged")),
        tmp_path / "trap",
        len(UNPICKLED),
    )
    (folder / "status.json").unlink()
    assert Run(folder).net() is not None
    forged(folder, good[1], trap, part, case)
    if os.path.exists("/proc/self/clear_refs"):
        forget()
        before = peak()
    began = time.monotonic()
    with pytest.raises(CorruptData) as caught:
        Run(folder).net()
    listed = [r for r in list_runs() if not r.shipped]
    assert time.monotonic() - began < 5
    assert not os.path.exists("/proc/self/clear_refs") or peak() - before < 300e6
    assert (
        str(caught.value).startswith("run 'forged'")
        and len(str(caught.value)) < 700
        and "\n" not in str(caught.value)
        and get_exit_code(caught.value) == 5
    )
    assert [r.name for r in listed] == ["forged"] and (
        part not in ("config", "manifest") or case in LATER or listed[0].damaged
    )
    assert not trap.exists() and len(UNPICKLED) == seen


ODD = {
    "deep": DEEP,
    "digits": b'{"fd": ' + b"9" * 10**6 + b"}",
    "a large number": b'{"fd": 1' + b"0" * 4000 + b', "step": 2}',
    "lists for names": b'{"fd": 1, "step": 2, "solver": [1], "seed": {"a": 1}, "head": [[]]}',
    "zeros": bytes(10**6),
    "not utf-8": b'{"fd": "\xff"}',
    "status": b'{"status": ["done"]}',
    "a number": b"7",
}


@pytest.mark.parametrize("file", ["scores.jsonl", "status.json", "progress.json", "metrics.jsonl"])
@pytest.mark.parametrize("case", ODD)
def test_odd_files_beside_a_checkpoint_do_no_harm(lab, good, file, case):
    folder = Path(shutil.copytree(good[0], lab / "odd"))
    old = (folder / file).read_bytes() if file == "metrics.jsonl" else b""
    (folder / file).write_bytes(old + ODD[case])
    assert get_run_info("odd").status == "done" and not get_run_info("odd").damaged
    run = Run(folder)
    assert run.verify() == 5 and [type(run.scores), type(run.metrics)] == [list, list]


def test_a_forged_training_state_is_refused(lab):
    run = trained("state", until=3)
    tensor, whole = (
        torch.zeros(2),
        load_optimizer((run.dir / "train_state.safetensors").read_bytes()),
    )
    lying = lambda stride: safetensors.torch.save(
        {"0": tensor},
        {
            "state": json.dumps(
                {"dict": [["step", 3], ["state", {"tensor": "0", "stride": stride}]]}
            )
        },
    )
    bad = [
        b"",
        b"\x80\x04",
        save_optimizer(whole | {"step": 5}),
        save_optimizer({"step": 3}),
        save_optimizer({}),
        safetensors.torch.save({"0": tensor}),
        safetensors.torch.save({}, {"state": "[" * 10**5}),
        lying([2**40]),
        lying([-1]),
        lying([1, 1]),
        lying("x"),
        lying([0.5]),
    ]
    for data in bad:
        forge(run.dir, "train_state.safetensors", data)
        error = failure(train(Run(run.dir)))
        assert isinstance(error, CorruptData) and "cannot be continued" in str(error), data[:40]
    forge(run.dir, "train_state.safetensors", save_optimizer(whole))
    list(train(Run(run.dir)))
    assert Run(run.dir).step == 6


def test_nothing_in_a_run_is_a_pickle(lab):
    run = trained("plain")
    for file in run.dir.rglob("*"):
        assert (
            not file.is_file() or not zipfile.is_zipfile(file) and file.read_bytes()[:1] != b"\x80"
        )
    assert {p.suffix for p in run.dir.iterdir() if p.is_file() and p.name != ".lock"} == {
        ".json",
        ".jsonl",
        ".safetensors",
    }


# Surroundings


@pytest.mark.parametrize(
    "folder, change",
    [
        ("lab with spaces, опыты и 实验", {}),
        ("plain", {"HOME": None, "LC_ALL": "C", "LANG": None, "USER": None}),
    ],
    ids=["names", "bare"],
)
def test_training_works_in_odd_surroundings(tmp_path, folder, change):
    root, elsewhere = tmp_path / folder, tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    env = (
        os.environ
        | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "CUDLAB_RUNS_PATH": str(root / "runs"),
            "CUDLAB_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        | change
    )
    code = (
        f"from cudlab.cli import main; print(*[main(words) for words in (['train', *{WORDS}, "
        "'steps=3', 'name=опыт-实验'], ['list'], ['verify', 'опыт-实验'], ['verify', 'опыт-实验@2'])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={k: v for k, v in env.items() if v is not None},
        capture_output=True,
        timeout=200,
    )
    said = done.stdout.decode()
    assert said.splitlines()[-1] == "0 0 0 0" and "опыт-实验" in said, done.stderr.decode()[-2000:]
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("moment", [0, -5, 2**33, 2**37 + 5])
def test_a_clock_that_was_set_back_does_no_harm(lab, moment):
    run = trained("clock", until=3)
    for file in run.dir.rglob("*"):
        with contextlib.suppress(OSError):
            os.utime(file, (moment, moment))
    assert (
        get_run_info("clock").status == "stopped"
        and not get_run_info("clock").damaged
        and Run(run.dir).verify() == 5
    )
    assert trained("clock").step == 6


def test_commit_forces_folders_to_the_disk_too(tmp_path, monkeypatch):
    forced, honest = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            forced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))),
            honest(handle),
        ),
    )
    commit_files(tmp_path, {"a": b"1"}, {"step": 0}, {})
    assert forced == ["a", "MANIFEST.json", ".next", tmp_path.name, tmp_path.name]
