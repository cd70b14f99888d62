"""Files on disk: links are not followed for writing, locks hold on every file system, and what
nobody vouches for is read with care.
"""

import contextlib
import errno
import multiprocessing
import os
import shutil
import sys

import filelock
import pytest

from cudlab import disk
from cudlab.config import CorruptData
from cudlab.disk import (
    atomic_write,
    is_locked,
    plain_streams,
    printable,
    read_file,
    read_jsonl,
    run_lock,
)
from cudlab.jobs import request_stop


@pytest.fixture
def run_dir(tmp_path):
    "A folder with what a run holds."
    folder = tmp_path / "runs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", [".lock", ".scores.lock", "scores.jsonl", "checkpoints", "x/y"])
def test_nothing_is_written_through_a_link(run_dir, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = run_dir / name
    shutil.rmtree(link, ignore_errors=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=r"is a link; .*plain files"), run_lock(run_dir):
        pass
    assert outside.read_text() == "mine" and link.is_symlink()


def test_a_run_folder_that_is_a_link_is_not_trained(run_dir):
    (run_dir.parent / "alias").symlink_to(run_dir)
    with pytest.raises(ValueError, match="'alias' is a link"), run_lock(run_dir.parent / "alias"):
        pass
    with run_lock(run_dir):
        pass


@pytest.mark.parametrize("durable", [True, False])
def test_a_small_file_is_replaced_and_not_written_through(tmp_path, durable):
    (tmp_path / "other").write_text("mine")
    for name in (".tmp-status.json", "status.json"):
        (tmp_path / name).symlink_to("other")
    with contextlib.suppress(OSError):
        atomic_write(tmp_path / "status.json", b"new", durable)
    assert (tmp_path / "other").read_text() == "mine"
    atomic_write(tmp_path / "status.json", b"new", durable)
    assert (tmp_path / "status.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("exists", [True, False])
def test_a_request_to_stop_follows_no_link(run_dir, tmp_path, exists):
    if exists:
        (tmp_path / "other").write_text("mine")
        os.utime(tmp_path / "other", (1, 1))
    (run_dir / "STOP").symlink_to(tmp_path / "other")
    request_stop(run_dir)
    assert (tmp_path / "other").exists() == exists
    assert not exists or os.stat(tmp_path / "other").st_mtime == 1
    (run_dir / "STOP").unlink()
    request_stop(run_dir)
    request_stop(run_dir)
    assert (run_dir / "STOP").read_bytes() == b""


# Locks


def test_a_second_job_is_refused_and_a_dead_one_frees_its_lock(run_dir):
    def hold(ready, go):
        with run_lock(run_dir):
            ready.set()
            go.wait(60)
            os._exit(9)

    fork = multiprocessing.get_context("fork")
    ready, go = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(ready, go))
    assert not is_locked(run_dir)
    other.start()
    assert ready.wait(60) and is_locked(run_dir)
    with pytest.raises(ValueError, match="another process"), run_lock(run_dir):
        pass
    go.set()
    other.join(60)
    assert not is_locked(run_dir)
    with run_lock(run_dir):
        assert is_locked(run_dir)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
@pytest.mark.filterwarnings("ignore")
def test_a_file_system_without_flock_gets_a_lock_file(run_dir, monkeypatch, code):
    def flock(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock._unix.fcntl, "flock", flock)
    assert not is_locked(run_dir)
    with run_lock(run_dir):
        assert is_locked(run_dir)
        with pytest.raises(ValueError, match="another process"), run_lock(run_dir):
            pass
    assert not is_locked(run_dir)


def test_a_reader_who_may_not_write_sees_no_lock(run_dir, monkeypatch):
    with run_lock(run_dir):
        pass

    def deny(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disk, "acquire_lock", deny)
    assert not is_locked(run_dir)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("digits-cud", "digits-cud"),
        ("опыт 實驗", "опыт 實驗"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("a\nb\ud800", "a\\nb\\ud800"),
        ("\u202eabc", "\\u202eabc"),
    ],
)
def test_names_are_shown_without_control_characters(text, shown):
    assert printable(text) == shown


def test_what_is_printed_cannot_steer_a_terminal(capsys):
    with plain_streams():
        print("\x1b[2J\ra name\x07", "\ud800", "опыт")
        print("two\tcolumns\nand a line", file=sys.stderr)
    out, err = capsys.readouterr()
    assert out == "\\x1b[2J\\ra name\\x07 \\ud800 опыт\n"
    assert err == "two\tcolumns\nand a line\n"
    assert not isinstance(sys.stdout, disk.PlainStream)


def test_a_long_log_is_read_from_its_end(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1000)))
    rows = read_jsonl(path, 200)
    assert rows[-1] == {"step": 999} and 5 < len(rows) < 20


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "nothing"])
def test_only_plain_files_are_read(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    with pytest.raises(CorruptData, match="file is (no plain file|missing)"):
        read_file(path)
