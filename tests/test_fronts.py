"""One training through four front ends: what they refuse, how they stop, what they write to, and
what a stop leaves behind.
"""

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest

from cudlab import cli
from cudlab.checkpoint import is_locked
from cudlab.config import Config
from cudlab.run import Run
from cudlab.training import TrainingStopped, create_run, train

pytest.importorskip("papermill")
ROOT = Path(__file__).parents[1]
TRAIN, EVALUATE = (str(ROOT / "nbs" / f"{name}.ipynb") for name in ("train", "evaluate"))
spec = importlib.util.spec_from_file_location("job", ROOT / "tools" / "job.py")
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A lab of its own for this process and those it starts; the folder of its runs."
    for key, value in {"RUNS_PATH": tmp_path / "runs", "THREADS": 1, "DEVICE": "cpu"}.items():
        monkeypatch.setenv(f"CUDLAB_{key}", str(value))
    return tmp_path / "runs"


# What is refused

TOUCHED = Path(tempfile.gettempdir()) / f"cudlab-fronts-{os.getpid()}"
TOUCH = f"import os; os.system('touch {TOUCHED}')"
CODE = f'"; {TOUCH}; "'
REFUSED = [
    # unknown names, near misses, names that Python or IPython know
    ("metod", "rf"),
    ("stpes", "100"),
    ("Steps", "5"),
    ("learning_rate", "1e-3"),
    ("_steps", "5"),
    ("In", "5"),
    ("open", "1"),
    ("__builtins__", "1"),
    ("", "5"),
    ("ｓｔｅｐｓ", "5"),
    ("🎲", "1"),
    (f"steps;{TOUCH};x", "5"),
    ("steps\nbatch", "5"),
    # names of choices
    ("method", "cdu"),
    ("method", "3"),
    ("schedule", "linear"),
    ("dtype", "float16"),
    ("path", "vpp"),
    ("net", "mnsit"),
    ("data", "digit"),
    ("device", "gpu"),
    # types
    ("steps", "ten"),
    ("steps", "1.5"),
    ("steps", "True"),
    ("steps", "None"),
    ("steps", "[1, 2]"),
    ("batch", "{}"),
    ("classes", "maybe"),
    ("classes", "1"),
    ("lr", "fast"),
    ("seed", "0x10"),
    ("minutes", "soon"),
    # ranges
    ("steps", "0"),
    ("steps", "-5"),
    ("steps", "100000001"),
    ("batch", "1e9"),
    ("lr", "0"),
    ("lr", "nan"),
    ("lr", "inf"),
    ("lr", "-inf"),
    ("ema", "1"),
    ("clip", "nan"),
    ("minutes", "-3"),
    ("until", "-1"),
    ("seed", str(2**63)),
    ("steps", "9" * 400),
    ("save_every", "0"),
    ("phi0", "1e400"),
    # arguments of the method
    ("args", "haeds=2"),
    ("args", "aim=-1"),
    ("args", "aim=nan"),
    ("args", "heads=two"),
    ("args", "aim"),
    ("args", '{"aim": 8'),
    ("args", '{"__class__": 1}'),
    ("args", '{"aim": {"aim": 8}}'),
    # code, quotes, line ends, YAML, paths
    ("name", CODE),
    ("method", CODE),
    ("data", CODE),
    ("args", CODE),
    ("device", f"cpu'); {TOUCH}; ('"),
    ("schedule", '"""'),
    ("name", "a\nb"),
    ("name", "'"),
    ("method", "cud\n"),
    ("steps", "!!python/object/apply:os.system ['true']"),
    ("dtype", "&a [*a]"),
    ("name", "../up"),
    ("name", "/etc/x"),
    ("name", "."),
    ("name", "~"),
    ("name", "🎲"),
    ("data", "folder:../../nowhere"),
    ("data", "folder:"),
    ("data", "folder:/dev"),
    ("args", "teacher=../../etc"),
]
UNMEASURED = [
    ("nfe", "3"),
    ("Run", "x"),
    ("nfes", "0"),
    ("nfes", "1 two"),
    ("nfes", "-1"),
    ("nfes", "1.5"),
    ("nfes", "nan"),
    ("seeds", "-1"),
    ("solvers", "eulr"),
    ("solvers", CODE),
    ("n", "15"),
    ("n", "nan"),
    ("n", "many"),
    ("weights", "emma"),
    ("head", "0"),
    ("grid", "unifrom"),
    ("denoise", "maybe"),
    ("guidance", "inf"),
    ("extractor", "digits-v3"),
    ("run", "nope"),
    ("run", "../.."),
    ("run", CODE),
]


def named(message: str, key: str, value: str) -> bool:
    "Whether a message is one sentence about this parameter."
    about = (key.rstrip("s") or "''", repr(key).strip("'")) + (
        ("argument", "args", "aim", "heads", "teacher")
        if key == "args"
        else ("data set",)
        if key == "data"
        else ()
    )
    return (
        message.count("\n") == 1 and any(a in message for a in about) and "Traceback" not in message
    )


class Here:
    "The process that tools/job.py asks, without the process."

    returncode = 0

    def __init__(self, command, **how):
        assert command[1:] == [job.__file__, "--check"]

    def communicate(self, request):
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as answer,
        ):
            patch.setattr(sys, "stdin", io.StringIO(request))
            job.verdict()
        return answer.getvalue(), None

    def kill(self):
        pass


@pytest.fixture
def front(monkeypatch):
    "tools/job.py in this process; a notebook that would be executed is an error."
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    monkeypatch.setattr(job.subprocess, "Popen", Here)
    monkeypatch.setattr(
        "papermill.execute.execute_notebook", lambda **given: pytest.fail("a kernel would start")
    )
    yield job.main
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("key, value", REFUSED)
def test_a_training_is_refused_before_a_kernel_starts(lab, front, capsys, key, value):
    codes = (2, 5) if key == "data" else (2,)
    assert front(TRAIN, "-p", key, value) in codes
    said = capsys.readouterr().err
    assert named(said, key, value), said
    assert cli.main(["train", f"{key}={value}"]) in codes
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named(said, key, value), said
    assert not lab.exists() and not TOUCHED.exists()


@pytest.mark.parametrize("key, value", UNMEASURED)
def test_an_evaluation_is_refused_before_a_kernel_starts(lab, front, capsys, key, value):
    assert front(EVALUATE, "-p", key, value) == 2
    said = capsys.readouterr().err
    assert named(said, key, value), said
    assert cli.main(["evaluate", f"{key}={value}"]) == 2
    assert named(said := capsys.readouterr().err, key, value), said
    assert not lab.exists() and not TOUCHED.exists()


@pytest.mark.parametrize(
    "args, name",
    [
        (("-y", "steps: many"), "steps"),
        (("-y", "{steps: !!python/object/apply:os.system ['true']}"), "parameters"),
        (("-y", "- steps"), "parameters"),
        (("-y", "7"), "parameters"),
        (("-y", "1: 2"), "'1'"),
        (("-y", "steps: 2026-01-01"), "steps"),
        (("-y", "{steps: !!set {a, b}}"), "steps"),
        (("-y", "{? [a] : 1}"), "parameters"),
        (("-r", "steps", "5"), "steps"),
        (("-r", "batch", "1e3"), "batch"),
        (("-b", "c3RwZXM6IDU="), "stpes"),
        (("-b", "c"), "parameters"),
        (("-f", "/nowhere/p.yaml"), "/nowhere"),
        (("-p", "steps"), "-p"),
        (("--stpes", "5"), "--stpes"),
        (("-p", "steps", "5", "-y", "stpes: 5"), "stpes"),
        (("--inject-paths",), "PAPERMILL"),
    ],
)
def test_every_way_to_pass_a_parameter_is_checked(lab, front, capsys, args, name):
    assert front(TRAIN, *args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and name in said and "Traceback" not in said
    assert not lab.exists()


def test_what_papermill_would_run_is_let_through(lab, front, tmp_path, capsys):
    """Numbers as text, YAML, a file, values that only look dangerous; the notebook's own parameter
    cell counts.
    """
    (tmp_path / "p.yaml").write_text("steps: 5\nargs: aim=8 heads=2")
    for args in (
        ("-p", "steps", "5"),
        ("-y", "{lr: 1.0e-3, classes: true}"),
        ("-f", str(tmp_path / "p.yaml")),
        ("-r", "name", "2026"),
        ("-b", "c3RlcHM6IDU="),
        ("-p", "seed", "1_0"),
        ("-p", "method", "boot", "-p", "args", "teacher=digits-rf"),
        ("-p", "data", "moons", "-p", "net", "mlp"),
        (),
    ):
        assert front(TRAIN, *args) == 1 and "a kernel would start" in capsys.readouterr().err


# Real processes

MOONS = {
    "method": "rf",
    "data": "moons",
    "steps": "100000",
    "batch": "8192",
    "log_every": "1",
    "save_every": "10",
    "name": "leg",
}  # a step takes a tenth of a second


def command(front: str, out: Path, **params) -> list:
    "The command line of a training in one of the front ends."
    if front in ("cudlab", "module"):
        start = (
            ["-c", "import sys; from cudlab.cli import main; sys.exit(main())"]
            if front == "cudlab"
            else ["-m", "cudlab.cli"]
        )
        return [sys.executable, *start, "train", *(f"{k}={v}" for k, v in params.items())]
    start = (
        ["-m", "papermill", TRAIN, str(out), "--no-progress-bar"]
        if front == "papermill"
        else [str(ROOT / "tools" / "job.py"), TRAIN]
    )
    return [sys.executable, *start, *(word for k, v in params.items() for word in ("-p", k, v))]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A function that says which Python processes were started so far; every one notes its command
    line.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"with open({str(tmp_path / 'started')!r}, 'ab') as log:\n    "
        "log.write(open('/proc/self/cmdline', 'rb').read().replace(b'\\n', b' ') + b'\\n')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    return lambda: (tmp_path / "started").read_text().splitlines()


@pytest.mark.parametrize(
    "front, key, value",
    [
        ("job", "stpes", "100"),
        ("job", "lr", "nan"),
        ("job", "name", CODE),
        ("job", "args", "teacher=../../etc"),
        ("cudlab", "name", CODE),
        ("module", "🎲", "1"),
    ],
)
def test_a_refusal_is_code_2_and_one_sentence_and_no_kernel(
    lab, started, tmp_path, front, key, value
):
    done = subprocess.run(
        command(front, tmp_path / "out.ipynb", **{key: value}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and named(done.stderr, key, value) and not done.stdout, done
    assert len(started()) == (2 if front == "job" else 1) and not any(
        "ipykernel" in line for line in started()
    )
    assert not lab.exists() and not TOUCHED.exists()


class Terminal:
    "A process that leads the session of a terminal, as a shell starts it."

    def __init__(self, command: list, env: dict = None):
        self.master, slave = os.openpty()

        def lead():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=lead, env=env
        )
        os.close(slave)
        self.said, self.open = b"", True
        os.set_blocking(self.master, False)

    def read(self) -> str:
        "What was written to the terminal so far."
        with contextlib.suppress(OSError):  # nothing new, or nobody writes any more
            while self.open and (new := os.read(self.master, 65536)):
                self.said += new
        return self.said.decode(errors="replace")

    def hang_up(self):
        self.open = False
        os.close(self.master)

    def wait(self, seconds: float = 60) -> int:
        "The exit status; a process that does not end in time is killed."
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            self.read()
            time.sleep(0.05)
        self.read()
        self.process.kill()
        return self.process.wait(10)


def rows(folder: Path) -> int:
    "The step the log of a run is at."
    lines = (
        (folder / "metrics.jsonl").read_bytes().splitlines()
        if (folder / "metrics.jsonl").is_file()
        else []
    )
    return json.loads(lines[-1])["step"] if lines else 0


def log_of(folder: Path) -> int:
    """Which file the log of a run is now: a training starts with a fresh copy, cut to its
    checkpoint.
    """
    return (folder / "metrics.jsonl").stat().st_ino if (folder / "metrics.jsonl").is_file() else 0


def underway(terminal, folder: Path, after: int, log: int) -> int:
    """Wait until a training has gone on for two steps beyond a checkpoint and the log before it;
    the step it is at.
    """
    end = time.monotonic() + 100
    while log_of(folder) == log or rows(folder) < after + 2:
        assert time.monotonic() < end and terminal.process.poll() is None, terminal.read()
        terminal.read()
        time.sleep(0.02)
    return rows(folder)


WAYS = {
    "SIGTERM": lambda terminal, folder: terminal.process.send_signal(signal.SIGTERM),
    "Ctrl-C": lambda terminal, folder: os.write(terminal.master, b"\x03"),
    "STOP": lambda terminal, folder: (folder / "STOP").touch(),
    "hang-up": lambda terminal, folder: terminal.hang_up(),
}
# Nobody takes these signals, or papermill ends first and its kernel has a second to save: the last
# checkpoint counts.
UNHEARD = {("papermill", "hang-up"), ("papermill", "SIGTERM"), ("papermill", "Ctrl-C")}


def settled(folder: Path) -> Run:
    "The run, once nobody trains it; a kernel may outlive papermill for a moment."
    end = time.monotonic() + 30
    while is_locked(folder / ".lock"):
        assert time.monotonic() < end
        time.sleep(0.05)
    return Run(folder)


@pytest.mark.parametrize("front", ["cudlab", "module", "papermill", "job"])
def test_every_stop_saves_the_step_it_is_at_and_the_same_command_goes_on(lab, tmp_path, front):
    folder, last = lab / "leg", 0
    for way, act in WAYS.items():
        log, terminal = log_of(folder), Terminal(command(front, tmp_path / "out.ipynb", **MOONS))
        at = underway(terminal, folder, last, log)
        act(terminal, folder)
        late, code = (
            rows(folder),
            terminal.wait(20 if (front, way) in UNHEARD else 60),
        )  # papermill may hang after Ctrl-C
        run = settled(folder)
        assert run.verify() >= 4 and run.step >= max(last, at - 10), (way, at, run.step)
        if (front, way) not in UNHEARD:
            status = json.loads((folder / "status.json").read_text())
            assert code == (1 if front == "papermill" else 3), (way, code, terminal.read())
            assert at <= run.step <= late + 2 and rows(folder) == run.step, (
                way,
                at,
                late,
                run.step,
            )
            assert (
                status["status"] == "stopped"
                and status["step"] == run.step
                and status.get("code", 3) == 3
            )
            assert (
                way == "hang-up" or front == "papermill" or f"step {run.step} of" in terminal.read()
            ), way
        last = run.step
    with pytest.raises(TrainingStopped):
        list(train(run, until=last + 1))


@pytest.mark.parametrize("front", ["cudlab", "job"])
def test_a_training_outlives_what_reads_it(lab, tmp_path, front):
    """A reader that is gone, no output at all, a full disk under nohup: the training goes on, and a
    stop still saves, said once or twice at once (as `timeout` does).
    """
    words, folder, last = command(front, tmp_path / "out.ipynb", **MOONS), lab / "leg", 0
    shell = lambda way: ["sh", "-c", f'exec "$@" {way}', "sh", *words]
    for way in (words, shell("<&- >&- 2>&-"), ["nohup", *shell("> /dev/full 2>&1")]):
        process = subprocess.Popen(
            way, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        if way is words:
            process.stdout.readline()
            process.stdout.close()
        end = time.monotonic() + 60
        while rows(folder) < last + 4 and time.monotonic() < end:
            time.sleep(0.02)
        assert process.poll() is None, way
        if way[0] == "nohup":
            os.killpg(process.pid, signal.SIGHUP)
            now = rows(folder)
            while rows(folder) < now + 3:
                assert time.monotonic() < end
                time.sleep(0.02)
        process.terminate()
        time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 3, way
        run = settled(folder)
        assert run.step > last and run.verify() >= 4 and rows(folder) == run.step
        last = run.step


def test_a_module_whose_reader_is_gone_leaves_a_whole_checkpoint(lab, tmp_path):
    process = subprocess.Popen(
        command("module", tmp_path, **MOONS), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    process.terminate()
    process.wait(30)
    run = settled(lab / "leg")
    assert run.verify() >= 4
    with pytest.raises(TrainingStopped):
        list(train(run, until=run.step + 1))


# Scores


@pytest.fixture
def little(lab):
    "A trained run of some seconds."
    run = create_run(Config(method="rf", data="moons", steps=40, batch=64), "little")
    list(train(run))
    return run


def test_an_evaluation_stops_between_two_scores_and_goes_on(lab, little):
    words = [
        sys.executable,
        str(ROOT / "tools" / "job.py"),
        EVALUATE,
        "-p",
        "run",
        "little",
        "-p",
        "solvers",
        "euler heun",
        "-p",
        "nfes",
        "2 4 6 8",
        "-p",
        "n",
        "4000",
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not little.scores and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    kept = little.scores
    assert process.returncode == 3 and not err and "same command" in out and 1 <= len(kept) < 8
    assert out.count(" NFE ") in (
        len(kept),
        len(kept) - 1,
    )  # the stop may come between a score and its line
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert (
        done.returncode == 0
        and done.stdout.count("measured before") == len(kept)
        and done.stdout.count(" NFE ") == 8 - len(kept)
    )
    assert little.scores[: len(kept)] == kept and len(little.scores) == 8


def test_a_kill_while_scores_are_written_breaks_no_line(lab, little):
    script = (
        "import sys\nfrom cudlab.run import Run\nrun, k = Run.open('little'), "
        "int(sys.argv[1])\nprint('up', flush=True)\nwhile True:\n    k += 1\n    "
        "run.add_score({'seed': k, 'pad': 'x' * 3000})"
    )
    for start in (0, 10**6, 2 * 10**6):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(start)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2 + start / 10**7)
        process.kill()
        process.wait()
    *lines, tail = (little.dir / "scores.jsonl").read_bytes().split(b"\n")
    seeds = [json.loads(line)["seed"] for line in lines]
    assert len(seeds) > 10 and seeds == sorted(set(seeds)) and len(little.scores) == len(seeds)
    assert little.add_score({"seed": -1}) and len(little.scores) == len(seeds) + 1


def test_a_torn_score_is_left_out_and_the_next_one_is_whole(lab, little):
    "Every length that a power cut may leave of the last line."
    file, first, torn = (
        little.dir / "scores.jsonl",
        {"seed": 1, "fd": 2.5},
        {"seed": 2, "fd": 1e-3, "solver": "euler"},
    )
    whole, last = (json.dumps(score).encode() + b"\n" for score in (first, torn))
    for cut in range(len(last)):
        file.write_bytes(whole + last[:cut])
        found = [first, torn] if cut == len(last) - 1 else [first]
        assert little.scores == found
        assert little.add_score({"seed": 3}) and little.scores == [*found, {"seed": 3}]


@pytest.mark.parametrize(
    "error, code",
    [
        ("ValueError", 2),
        ("TrainingStopped", 3),
        ("Diverged", 4),
        ("CorruptData", 5),
        ("OSError", 5),
        ("FileNotFoundError", 5),
        ("PermissionError", 5),
        ("KeyError", 1),
        ("RuntimeError", 1),
        ("Whatever", 1),
        ("print", 1),
    ],
)
def test_the_code_of_an_error(error, code):
    assert job.code_of(error) == code


def test_an_interrupt_that_came_through_exec_ends_with_the_code(tmp_path):
    """Dataclasses and torch make functions by exec: Python then ends a module by SIGINT though the
    interrupt was caught.
    """
    lines = [
        "import sys",
        "from cudlab.training import exit_with",
        "try:",
        "    exec('raise KeyboardInterrupt')",
        "except KeyboardInterrupt as error:",
        "    sys.exit(exit_with(error))",
    ]
    (tmp_path / "ended.py").write_text("\n".join(lines))
    path = os.pathsep.join((str(tmp_path), str(Path(cli.__file__).parents[1])))
    ended = subprocess.run(
        [sys.executable, "-m", "ended"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 3 and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        "train steps=1 steps=2",
        "train args.aim=4 args.aim=8",
        "evaluate digits-rf n=60 n=70",
        "sample digits-rf out=there n=60 n=70",
        "sweep sweep.json workers=1 workers=2",
        "export digits-rf to=onnx --to hub-folder",
    ],
)
def test_a_key_given_twice_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.json").write_text('{"train": {"steps": 1}}')
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "is given twice: '" in said
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


def test_sentences_know_capitals_and_infinity(capsys):
    for words, says in (
        ("train method=GDD", "did you mean 'gdd'?"),
        ("train clip=inf", "clip = inf is out of range: at least 0 and a finite number"),
        ("train lr=inf", "lr = inf is out of range: above 0 and at most 1\n"),
    ):
        assert cli.main(words.split()) == 2 and says in capsys.readouterr().err
