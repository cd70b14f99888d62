"""Jobs that a page starts, stops and continues: processes of their own, known by what they leave on
the disk.
"""

import fcntl
import hmac
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from offer import listed_runs
from request import as_one_line

from cudlab.catalog import RunInfo, get_run_info
from cudlab.cli import train_parameters
from cudlab.config import Config, Options, did_you_mean, get_settings
from cudlab.create import open_teacher, resolve_run_dir
from cudlab.data import DATA
from cudlab.jobs import parse_parameters, read_status, request_stop
from cudlab.methods import make_method
from cudlab.run import Run

# what a page must know to start jobs; the explorer draws one, and without one no job is started
TOKEN = ""
NO_TOKEN = (
    "jobs are started, stopped and continued with a token only: open the address that the terminal "
    "has printed, with ?token= and what follows"
)
LONGEST = 2000  # characters of parameters
MOST = dict(steps=1_000_000, batch=4096, keep=20)  # of what a page may ask for
LARGEST = 100_000  # number among the arguments of a method


def check_token(given) -> None:
    "Raises a `ValueError` unless this is the token of the explorer."
    known = isinstance(given, str) and given.isascii() and hmac.compare_digest(given, TOKEN)
    if not (TOKEN and known):
        raise ValueError(NO_TOKEN)


# What is on disk


def jobs_dir() -> Path:
    "Where logs of jobs are, and what the page has started last."
    return get_settings().runs_path / ".jobs"


@contextmanager
def job_lock(wait: float = 0.3):
    "Holds the lock that a job keeps as long as it lives; yields the open file."
    with open(jobs_dir() / "page.lock", "w") as lock:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    name = started_name() or "another"
                    raise ValueError(
                        f"a job is running: {name}; stop it or wait for its end"
                    ) from None
                time.sleep(0.01)
        yield lock


def is_job_alive() -> bool:
    "Whether the process of the last job from a page still runs."
    try:
        with open(jobs_dir() / "page.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def started_name() -> str:
    "The name of the run that the last job from a page trains, or ''."
    try:
        return str(json.loads((jobs_dir() / "page.json").read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_training(name: str) -> bool:
    "Whether a run is being trained now."
    return any(info.name == name and info.status == "running" for info in listed_runs())


def busy_name() -> str:
    "The run of the job from a page that has not ended yet, or ''."
    name = started_name()
    return name if name and (is_training(name) or is_job_alive()) else ""


def own_runs() -> list[RunInfo]:
    "Your runs: what is running, then what can be continued, then what is done; the newest first."
    rank = {"running": 0, "dead": 1, "failed": 1, "stopped": 2, "new": 2, "diverged": 3}
    mine = [info for info in listed_runs() if not info.shipped and not info.damaged]
    return sorted(mine, key=lambda info: rank.get(info.status, 4))


def tail_log(name: str, lines: int = 12) -> list:
    "The last lines that the job of a run has printed."
    try:
        with open(jobs_dir() / f"{name}.log", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 8000))
            text = f.read().decode(errors="replace")
    except OSError:
        return []
    found = [line for line in text.splitlines() if line.strip()][-lines:]
    return ["".join(c for c in line if c.isprintable()) for line in found]


@dataclass
class JobState:
    "What the disk says of a job."

    run: str
    status: str = "failed"
    step: int = 0
    of: int = None  # steps in all; None where there is no run yet
    saved: int = 0  # step of the last checkpoint
    pid: int = None
    pace: float = None  # steps a second
    left: float = None  # seconds
    log: list = None  # its last lines

    @property
    def is_active(self) -> bool:
        "Whether a process works on it."
        return self.status in ("running", "starting", "ending")

    @property
    def is_resumable(self) -> bool:
        "Whether its run can go on."
        ended = self.status in ("stopped", "dead", "new", "diverged", "failed")
        return ended and self.of is not None


def read_job(name) -> JobState:
    "The state of a job, by the name of its run."
    runs = {info.name: info for info in own_runs()}
    if not isinstance(name, str) or name not in {*runs, started_name()} - {""}:
        short = str(name)[:60]
        raise ValueError(
            f"the job {short!r} is not here{did_you_mean(short, runs)}; choose one of the list"
        )
    job = JobState(name, log=tail_log(name))
    if info := runs.get(name):
        beat = read_status(info.dir)
        job.status = info.status
        job.of = info.steps
        job.saved = info.step
        job.step = max(info.step, beat.step)
        job.pid = beat.pid
        if info.status == "running" and beat.seconds_per_step:
            job.pace = 1 / beat.seconds_per_step
            job.left = (info.steps - job.step) * beat.seconds_per_step
    if job.status != "running" and name == started_name() and is_job_alive():
        job.status = "ending" if job.status == "done" else "starting"
    return job


def job_state(name: str) -> dict:
    """What the disk says of a job: run, status, step, of, saved, pid, pace (steps a second), left
    (seconds), and log, the last lines.
    """
    with as_one_line():
        return asdict(read_job(name))


# Start, stop, go on


def looks_like_path(value) -> bool:
    "Whether a value could mean a file; from a page, runs and data sets are given by name."
    if not isinstance(value, str):
        return False
    parts = value.split(":")
    return any(part.startswith((".", "~")) for part in parts) or any(c in value for c in "/\\\0")


def check_job(config: Config, options: Options) -> None:
    "Raises a `ValueError` where a job is more than a page may ask for."
    values = {**config.args, **vars(config), **vars(options)}
    for key, value in values.items():
        if looks_like_path(value):
            raise ValueError(
                f"{key} = {value[:60]!r} looks like a path; from a page, runs and data sets are "
                "given by name"
            )
        most = MOST.get(key, LARGEST if key in config.args else None)
        if most and isinstance(value, (int, float)) and value > most:
            raise ValueError(
                f"{key} = {value:g} is more than a page may ask for; at most {most:,}, or use "
                "cudlab train"
            )
    if config.data not in DATA:
        raise ValueError(
            f"data = {config.data[:60]!r} is not one of {', '.join(DATA)}; others need cudlab train"
        )
    if config.keep_every and config.steps // config.keep_every > MOST["keep"]:
        raise ValueError(
            f"keep_every = {config.keep_every} keeps more than {MOST['keep']} checkpoints; use "
            "cudlab train"
        )


def parse_job(text) -> tuple:
    "Checked (Config, options, folder) of the parameters a person typed; nothing is made yet."
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"the parameters are not a text of at most {LONGEST:,} characters")
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise ValueError(
            f"the parameters cannot be read: {str(e).lower()}; write --key value pairs"
        ) from None
    config, options = parse_parameters(train_parameters(words))
    check_job(config, options)
    method = make_method(config)
    if method.teacher:
        get_run_info(method.teacher)
    open_teacher(config)
    return config, options, resolve_run_dir(config, options.name)


def papermill_flags(config: Config, options: Options, name: str) -> list:
    "The parameters as papermill takes them; text stays text whatever it looks like."
    given = {}
    for part in (config, options):
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name in ("method", "data") or value != field.default:
                given[field.name] = value
    given |= {"args": json.dumps(config.args), "name": name}
    words = []
    for key, value in given.items():
        words += ["-r", key, value] if isinstance(value, str) else ["-p", key, str(value)]
    return words


def check_free(name: str) -> None:
    "Raises a `ValueError` if a run cannot be trained (on) under this name."
    for info in listed_runs():
        if info.name != name:
            continue
        if info.damaged:
            raise ValueError(f"run {name!r} is damaged; choose another --name")
        if not info.shipped and info.status in ("done", "running"):
            state = "trained already" if info.status == "done" else "being trained"
            raise ValueError(f"run {name!r} is {state}; choose another --name")


def launch_job(config: Config, options: Options, folder: Path) -> str:
    "Start the job as a process of its own and return the run's name; a `ValueError` if one runs."
    name = folder.name
    check_free(name)
    root = get_settings().root
    script = root / "tools" / "job.py"
    notebook = root / "nbs" / "train.ipynb"
    if not (script.is_file() and notebook.is_file()):
        raise ValueError(
            "tools/job.py and nbs/train.ipynb are not here: jobs need a checkout of the lab"
        )
    command = [sys.executable, str(script), str(notebook), *papermill_flags(config, options, name)]
    where = jobs_dir()
    where.mkdir(parents=True, exist_ok=True)
    with job_lock() as lock:
        if is_training(started_name()):
            raise ValueError(f"a job is running: {started_name()}; stop it or wait for its end")
        (where / "page.json").write_text(json.dumps({"name": name}))
        with open(where / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # the job keeps the lock, and nobody longer
            )
    threading.Thread(target=process.wait, daemon=True).start()
    return name


def start_job(text: str, token: str = "") -> str:
    "Start a job from the flags of `cudlab train`, checked beforehand; the name of its run."
    with as_one_line():
        check_token(token)
        return launch_job(*parse_job(text))


def resume_job(name: str, token: str = "") -> str:
    "Go on with a run that was stopped or killed: the same configuration under the same name."
    with as_one_line():
        check_token(token)
        job = read_job(name)
        if not job.is_resumable:
            raise ValueError(
                f"run {name!r} is {job.status}; only a run that was stopped or killed can go on"
            )
        folder = get_run_info(name).dir
        options = parse_parameters({})[1]
        return launch_job(Run(folder).config, options, folder)


def stop_job(name: str, token: str = "") -> str:
    "Ask a running job to save and end; the name of its run."
    with as_one_line():
        check_token(token)
        job = read_job(name)
        if job.status != "running":
            raise ValueError(f"run {name!r} is {job.status}; only a running job can be stopped")
        request_stop(get_run_info(name).dir)
        return name
