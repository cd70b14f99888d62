"""Checkpoints on disk: kills, power cuts, full disks, changed bytes and links. Nothing that was
saved is lost, and nothing that was changed is believed.
"""

import contextlib
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from cudlab import disk
from cudlab.catalog import run_info
from cudlab.checkpoint import (
    checkpoint_dir,
    checkpoint_steps,
    find_damage,
    load_optimizer,
    newest_checkpoint,
    pack_modules,
    prune_checkpoints,
    read_verified,
    remove_leftovers,
    restore_hint,
    save_checkpoint,
    save_optimizer,
    trim_metrics,
    verify_checkpoint,
)
from cudlab.config import CorruptData, get_settings
from cudlab.disk import atomic_write, read_jsonl, write_durable
from cudlab.fit import Diverged
from cudlab.run import Run

SOLVER = "digits-dode-euler5"  # the smallest run that ships
CALLS = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
UNPICKLED = []
sys.addaudithook(
    lambda event, args: UNPICKLED.append(args) if event == "pickle.find_class" else None
)


def create(run_dir: Path) -> None:
    "A run at step 0, as a training creates it."
    run_dir.mkdir(parents=True)
    atomic_write(run_dir / "config.json", b'{"a": 1}')
    write_durable(run_dir / "metrics.jsonl", b"")
    save(run_dir, 0)


def save(run_dir: Path, step: int) -> None:
    "A checkpoint, and the line of the log that belongs to it."
    if step:
        with open(run_dir / "metrics.jsonl", "ab") as f:
            f.write(f'{{"step": {step}}}\n'.encode())
    files = {"net.safetensors": b"weights of %d" % step, "train_state.safetensors": b"state"}
    save_checkpoint(run_dir, step, files, {"training_cost": {"cpu": 1.5}})


@pytest.fixture
def folder():
    "A folder in memory, where there is one: forcing a thousand files to a disk takes its time."
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


@pytest.fixture
def run_dir(folder):
    create(folder / "runs" / "run")
    return folder / "runs" / "run"


def leftovers(run_dir: Path) -> list:
    "Unfinished things in a run folder."
    return [p for p in run_dir.rglob("*") if ".tmp" in p.name]


# Kills, power cuts, full disks


class Killed(BaseException):
    "The process ends here."


@contextlib.contextmanager
def failing(error: BaseException, after: int):
    "Within, one file operation raises: the first one after so many."
    made, real = [], {name: getattr(os, name) for name in CALLS}

    def watch(name):
        def call(*args, **options):
            made.append(name)
            if len(made) == after + 1:
                raise error
            return real[name](*args, **options)

        return call

    try:
        for name in real:
            setattr(os, name, watch(name))
        yield made
    finally:
        for name, function in real.items():
            setattr(os, name, function)


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_fails_at_any_operation_leaves_the_old_checkpoint_or_the_new(run_dir, error):
    save(run_dir, 1)
    for after in range(99):
        with failing(error, after) as made, contextlib.suppress(Killed, OSError):
            save(run_dir, 2)
            prune_checkpoints(run_dir, 1, 0)
        newest = newest_checkpoint(run_dir)
        assert verify_checkpoint(newest) == 4 and newest.name in ("step-000001", "step-000002")
        if isinstance(error, OSError) and newest.name == "step-000001":
            assert not leftovers(run_dir)
        remove_leftovers(run_dir)
        assert not leftovers(run_dir) and newest == newest_checkpoint(run_dir)
        if len(made) <= after:
            break
        shutil.rmtree(run_dir)
        create(run_dir)
        save(run_dir, 1)
    assert newest.name == "step-000002" and 20 < after < 98


class Journal:
    "What of a folder has been forced to the disk: contents of files and names in folders."

    def __init__(self, root: Path):
        self.root, self.contents, self.names, self.fsync = root, {}, {}, os.fsync

    def force(self, handle: int) -> None:
        known = os.fstat(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                self.names[known.st_ino] = {e.name: (e.inode(), e.is_dir()) for e in entries}
        else:
            self.contents[known.st_ino] = Path(path).read_bytes()
        self.fsync(handle)

    def after_power_cut(self, target: Path) -> None:
        "The folder as it may be found: what was not forced is gone."
        self.rebuild(os.stat(self.root).st_ino, target)

    def rebuild(self, inode: int, target: Path) -> None:
        target.mkdir(parents=True)
        for name, (inside, is_dir) in self.names.get(inode, {}).items():
            if is_dir:
                self.rebuild(inside, target / name)
            else:
                (target / name).write_bytes(self.contents.get(inside, b""))

    def with_early_names(self, target: Path) -> None:
        "The folder as it may be found, too: all names are there, contents only if forced."
        shutil.copytree(self.root, target)
        for path in self.root.rglob("*"):
            if path.is_file():
                content = self.contents.get(path.stat().st_ino, b"")
                (target / path.relative_to(self.root)).write_bytes(content)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_power_cut_at_any_operation_costs_one_interval_at_most(folder, monkeypatch, keep):
    journal, checked, last = Journal(folder / "disk"), [0], [-1]
    (folder / "disk" / "runs").mkdir(parents=True)
    run_dir = folder / "disk" / "runs" / "run"
    monkeypatch.setattr(os, "fsync", journal.force)
    real = {name: getattr(os, name) for name in ("mkdir", "rename", "replace", "fsync")}

    def examine():
        for image in (journal.after_power_cut, journal.with_early_names):
            image(folder / "image")
            found = folder / "image" / "runs" / "run"
            if last[0] >= 0:
                newest = newest_checkpoint(found)
                step = int(newest.name[-6:])
                assert verify_checkpoint(newest) == 4 and step >= last[0], journal.names
                logged = [row["step"] for row in read_jsonl(found / "metrics.jsonl")]
                assert logged[:step] == [*range(1, step + 1)]
            shutil.rmtree(folder / "image")
            checked[0] += 1

    def watch(name):
        def call(*args, **options):
            monkeypatch.undo()
            examine()
            install()
            done = real[name](*args, **options)
            return done

        return call

    def install():
        for name in real:
            monkeypatch.setattr(os, name, watch(name))

    for path in (folder / "disk", folder / "disk" / "runs"):
        disk.fsync_dir(path)
    install()
    create(run_dir)
    last[0] = 0
    for step in (1, 2, 3):
        save(run_dir, step)
        last[0] = step
        prune_checkpoints(run_dir, keep, 0)
    monkeypatch.undo()
    examine()
    assert checked[0] > 80 and len(checkpoint_steps(run_dir)) == keep


@pytest.mark.parametrize(
    "keep, keep_every, steps",
    [
        (1, 0, [7]),
        (2, 0, [6, 7]),
        (3, 0, [5, 6, 7]),
        (1, 3, [3, 6, 7]),
        (2, 2, [2, 4, 6, 7]),
        (0, 0, [7]),
        (100, 0, list(range(8))),
    ],
)
def test_the_last_and_every_mth_checkpoint_are_kept(run_dir, keep, keep_every, steps):
    for step in range(1, 8):
        save(run_dir, step)
        prune_checkpoints(run_dir, keep, keep_every)
    assert checkpoint_steps(run_dir) == steps


def test_odd_things_among_checkpoints_do_no_harm(run_dir):
    place = run_dir / "checkpoints"
    for name in ("notes.txt", "step-7", "step-٣٣٣٣٣٣", "step-0000007", "step-000008.tmp", "step-9"):
        (place / name).mkdir()
    (place / "step-000003").write_text("a file")
    (place / "step-000004").symlink_to("step-000000")
    (place / "step-000005").mkdir()
    assert checkpoint_steps(run_dir) == [0]
    save(run_dir, 5)
    assert checkpoint_steps(run_dir) == [0, 5]


@pytest.mark.parametrize(
    "log, step, left",
    [
        ("", 3, ""),
        ('{"step": 1}\n{"step": 2}\n', 1, '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}\n{"st', 2, '{"step": 1}\n{"step": 2}\n'),
        (
            '{"step": 1}\nodd\n7\n{"step": "x"}\n{"step": 2}\n',
            1,
            '{"step": 1}\nodd\n7\n{"step": "x"}\n',
        ),
        ('{"step": 5}\n', 0, ""),
        (None, 4, ""),
    ],
)
def test_the_log_is_cut_behind_the_checkpoint(run_dir, log, step, left):
    path = run_dir / "metrics.jsonl"
    if log is None:
        path.unlink()
    else:
        path.write_text(log)
    trim_metrics(run_dir, step)
    assert path.read_text() == left


def test_weights_that_are_not_finite_are_not_saved():
    net = torch.nn.Linear(2, 2)
    net.weight.data[0, 1] = math.nan
    with pytest.raises(Diverged, match="net.weight are not finite"):
        pack_modules({"net": net})


# Changed bytes


def mutate(rng: random.Random, files: dict) -> dict:
    "Some of the files, changed at random: path -> bytes, or None where one is gone."
    while True:
        path = rng.choice(list(files))
        data = bytearray(files[path])
        kind = rng.choice(["flip", "cut", "append", "delete", "swap", "zero", "exchange"])
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        length = rng.choice([1, 1, 4, 64])
        changed = {}
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "append":
            data += rng.randbytes(length)
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "swap":
            data[at], data[other] = data[other], data[at]
        elif kind == "exchange":
            second = rng.choice(list(files))
            changed = {path: files[second], second: files[path]}
        else:
            return {path: None}
        changed = changed or {path: bytes(data)}
        if all(new != files[p] for p, new in changed.items()):
            return changed


@pytest.mark.parametrize("count", [300, pytest.param(9000, marks=pytest.mark.long)])
def test_every_change_of_a_byte_is_found(tmp_path, count):
    folder = shutil.copytree(get_settings().checkpoints_path / SOLVER, tmp_path / "mutated")
    paths = [folder / "config.json", *newest_checkpoint(folder).iterdir()]
    files = {path: path.read_bytes() for path in paths}
    rng, opened, seen = random.Random(count), 0, len(UNPICKLED)
    for _ in range(count):
        changed = mutate(rng, files)
        for path, data in changed.items():
            path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(CorruptData):  # anything else is a crash
            run = Run(folder)
            opened += 1
            run.verify()
        run_info(folder)
        for path in changed:
            path.write_bytes(files[path])
    assert Run(folder).verify() == 3 and opened > count // 10 and len(UNPICKLED) == seen


def test_other_tools_read_a_checkpoint():
    folder = newest_checkpoint(get_settings().checkpoints_path / SOLVER)
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
        assert done.returncode == 0 and done.stdout.count(b": OK\n") == 4
    assert list(safetensors.torch.load_file(folder / "ema.safetensors"))


@pytest.mark.parametrize("harm", ["gone", "flipped"])
@pytest.mark.parametrize(
    "name", ["net.safetensors", "train_state.safetensors", "checkpoint.json", "SHA256SUMS"]
)
def test_a_damaged_checkpoint_names_the_one_that_is_whole(run_dir, name, harm):
    for step in (1, 2, 3):
        save(run_dir, step)
    (checkpoint_dir(run_dir, 2) / "net.safetensors").write_bytes(b"")
    path = checkpoint_dir(run_dir, 3) / name
    if harm == "flipped":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:])
    elif name == "SHA256SUMS":
        path.write_bytes(b"")  # without it there would be no checkpoint
    else:
        path.unlink()
    assert find_damage(checkpoint_dir(run_dir, 3))
    hint = "delete checkpoints/step-000003 and checkpoints/step-000002"
    assert restore_hint(run_dir) == f"; step 1 is whole: to go back to it, {hint}"
    shutil.rmtree(checkpoint_dir(run_dir, 3))
    shutil.rmtree(checkpoint_dir(run_dir, 2))
    assert newest_checkpoint(run_dir).name == "step-000001"
    assert not find_damage(newest_checkpoint(run_dir)) and restore_hint(run_dir) == ""


@pytest.mark.parametrize("harm", [None, b"", b'{"a": 2}'])
def test_a_damaged_configuration_has_a_copy(run_dir, harm):
    path = run_dir / "config.json"
    good = path.read_bytes()
    path.unlink() if harm is None else path.write_bytes(harm)
    assert "config.json" in find_damage(newest_checkpoint(run_dir))
    hint = restore_hint(run_dir)
    assert hint == "; checkpoints/step-000000/config.json is a copy to put in its place"
    shutil.copy(newest_checkpoint(run_dir) / "config.json", path)
    assert path.read_bytes() == good and verify_checkpoint(newest_checkpoint(run_dir)) == 4


def lying(stride) -> bytes:
    "A training state whose tensor claims to lie in memory like this."
    inside = {"tensor": "0", "stride": stride}
    state = {"dict": [["step", 3], ["state", inside]]}
    return safetensors.torch.save({"0": torch.zeros(2)}, {"state": json.dumps(state)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        safetensors.torch.save({"0": torch.zeros(2)}),
        safetensors.torch.save({}, {"state": "[" * 10**5}),
        lying([2**40]),
        lying([-1]),
        lying([1, 1]),
        lying("x"),
        lying([0.5]),
    ],
    ids=lambda data: str(len(data)),
)
def test_a_forged_training_state_is_refused(data):
    seen = len(UNPICKLED)
    kinds = (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError)
    with pytest.raises(kinds):  # whoever loads it turns any of them into a sentence
        load_optimizer(data)
    assert len(UNPICKLED) == seen


def test_a_training_state_comes_back_as_it_was():
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    groups = [{"betas": [0.9, 0.999], "fused": True, "foreach": None}]
    state = {"step": 3, "lr": 0.1, "groups": groups, "m": {0: image, "n": torch.tensor(3.0)}}
    again = load_optimizer(save_optimizer(state))
    moments = again.pop("m")
    assert torch.equal(moments[0], image) and moments[0].stride() == image.stride()
    assert moments["n"] == 3 and again == {k: v for k, v in state.items() if k != "m"}


def test_read_verified_knows_only_what_was_saved(run_dir):
    newest = newest_checkpoint(run_dir)
    assert read_verified(newest, "net.safetensors") == b"weights of 0"
    for name in ("other", "../../metrics.jsonl", "SHA256SUMS"):
        with pytest.raises(CorruptData, match="names no"):
            read_verified(newest, name)
    with pytest.raises(CorruptData, match="at most 3 make sense"):
        read_verified(newest, "net.safetensors", 3)
