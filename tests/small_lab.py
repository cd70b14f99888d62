"Six small runs, forged ones, and the explorer as a process: what several test files share."

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cudlab.checkpoint import newest_checkpoint, read_sums
from cudlab.config import Config
from cudlab.create import create_run
from cudlab.disk import hash_bytes
from cudlab.run import Run
from cudlab.training import train

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "apps" / "explorer.py"
RUNS = {
    "moons-run": dict(method="rf", data="moons", steps=20),
    "moons-solver": dict(
        method="dode", data="moons", args=dict(teacher="moons-run", samples=16, batches=2, moves=3)
    ),
    "moons-short": dict(
        method="distill",
        data="moons",
        args=dict(teacher="moons-run", pairs=64, moves=2, targets="2"),
        steps=4,
    ),
    "moons-jumps": dict(method="shortcut", data="moons", steps=4),
    "digits-run": dict(method="rf", data="digits", classes=True, steps=4),
}


def train_tiny(name: str, **config) -> Run:
    "A run trained for a few steps."
    usual = dict(batch=32, warmup=1, ema=0.5) if config["method"] != "dode" else {}
    run = create_run(Config(**usual | dict(log_every=1) | config), name)
    for _ in train(run):
        pass
    return Run(run.dir)


def make_lab(folder: Path) -> dict:
    """A lab with a 2-D run, a solver, a student and a network of two times for it, a conditional
    digits run and a damaged copy of that; the environment that means this lab.
    """
    env = {
        "CUDLAB_RUNS_PATH": str(folder / "runs"),
        "CUDLAB_CHECKPOINTS_PATH": str(folder / "shipped"),
        "CUDLAB_DEVICE": "cpu",
        "CUDLAB_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        for name, config in RUNS.items():
            train_tiny(name, **config)
    shutil.copytree(folder / "runs" / "digits-run", folder / "runs" / "damaged-run")
    weights = next((folder / "runs" / "damaged-run").rglob("ema.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    return env


def vouch(run_dir: Path) -> None:
    "Make the newest checkpoint's hashes and lengths fit whatever its files are now."
    folder = newest_checkpoint(run_dir)
    meta = json.loads((folder / "checkpoint.json").read_bytes())
    names = [n for n in read_sums(folder) if n not in ("checkpoint.json", "../../config.json")]
    meta["bytes"] = {n: (folder / n).stat().st_size for n in names}
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    write_sums(folder)


def write_sums(folder: Path) -> None:
    "Make the hashes of a checkpoint fit."
    names = read_sums(folder)
    lines = [f"{hash_bytes((folder / name).read_bytes())}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def wait_for(condition, seconds: float = 120):
    "What a condition gives as soon as that is true."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.02)
    return found


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_explorer(env: dict, *flags, port: int = 0) -> tuple:
    "The app as a process: (process, address, what it printed until it was ready)."
    process = subprocess.Popen(
        [sys.executable, str(APP), "--port", str(port or free_port()), *flags],
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # background jobs of a shell are deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    printed = []
    for line in process.stdout:
        printed.append(line.strip())
        if "ready at" in line:
            return process, re.search(r"http\S+/", line).group(), printed
    raise AssertionError(f"the explorer ended with {process.wait()}: {printed}")


def stop_explorer(process) -> None:
    "Ctrl-C, and if that is not enough, more."
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
