"""One command line: flags from the options, one line for a mistake, one exit code for an ending."""

import builtins
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from cudlab.cli import COMMANDS, main, train_parameters
from cudlab.config import Config, CorruptData
from cudlab.fit import Diverged
from cudlab.flags import flags_of, options_from_args
from cudlab.jobs import (
    TrainingStopped,
    TrainOptions,
    error_message,
    get_exit_code,
    parse_parameters,
)
from cudlab.run import Run

SHORT = ["--data", "moons", "--steps", "6", "--batch", "16", "--log_every", "2"]


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    "Runs go to a folder of the test's own."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def say(capsys, *argv: str) -> tuple:
    "Exit code, output and errors of a command."
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def assert_refused(capsys, argv: list, *words: str, codes: tuple = (2,)) -> None:
    "The command ends with one line that has these words, and leaves nothing behind."
    code, out, err = say(capsys, *argv)
    assert code in codes, (argv, code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert any(word in err for word in words), (argv, err)


def test_a_run_from_the_shell(capsys, lab):
    code, out, err = say(capsys, "train", *SHORT, "--args.aim", "4", "--name", "mine")
    assert (code, err) == (0, "") and "step      6/6  loss " in out and out.count("\n") == 6
    code, out, _ = say(capsys, "train", *SHORT, "--args.aim=4", "--name", "mine")
    assert code == 0 and "already trained" in out
    code, out, _ = say(capsys, "show", "mine")
    assert code == 0 and "--data moons" in out and "--args.aim 4" in out
    code, out, _ = say(capsys, "verify", "mine")
    assert code == 0 and "files as saved" in out
    code, out, _ = say(capsys, "list")
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == "run method data step/of status made".split()
    assert lines[1].startswith("mine ") and "\ndigits-rf " in out
    assert lines[1].index("6/6") == lines[0].index("step/of") + 3
    path = Run.open("mine").checkpoint / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, _, err = say(capsys, "verify", "mine")
    assert code == 5 and err.startswith("error: ") and "net.safetensors" in err


def test_a_run_is_stopped_and_resumed_by_its_name(capsys):
    code, out, _ = say(capsys, "train", *SHORT, "--name", "cut", "--until", "3")
    assert code == 3 and out.endswith("at step 3 of 6; the same command continues it\n")
    code, out, _ = say(capsys, "resume", "cut", "--until", "4", "--save_every", "1", "--keep", "9")
    assert code == 3 and "from step 3" in out
    code, out, _ = say(capsys, "resume", "cut")
    assert code == 0 and Run.open("cut").step == 6
    assert_refused(capsys, ["resume", "cut", "--lr", "1"], "--lr")
    assert_refused(capsys, ["resume", "digits-rf"], "ships with the lab")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(capsys, command):
    code, out, err = say(capsys, command, "--help")
    assert code == 0 and out.startswith(f"usage: cudlab {command}") and not err


def test_the_help_of_a_training_has_every_parameter(capsys):
    _, out, _ = say(capsys, "train", "--help", "--method", "gdd")
    names = [f.name for cls in (Config, TrainOptions) for f in fields(cls) if f.name != "args"]
    assert all(f"--{name} " in out for name in names) and "--args.width" in out
    _, out, _ = say(capsys)
    assert all(f"  {command} " in out for command in COMMANDS)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "data": st.sampled_from(["moons", "mnist"]),
            "steps": st.integers(1, 10**6),
            "lr": st.floats(1e-6, 1),
            "classes": st.booleans(),
            "name": st.sampled_from(["a", "2026"]),
            "minutes": st.floats(0, 100),
            "args": st.fixed_dictionaries({"aim": st.integers(0, 9), "rule": st.just("origin")}),
        },
    )
)
@settings(max_examples=60, deadline=None)
def test_flags_make_the_same_options_again(params):
    config, options = parse_parameters(params)
    words = flags_of(config) + flags_of(options)
    assert parse_parameters(train_parameters(words)) == (config, options)
    assert options_from_args(TrainOptions, flags_of(options)) == options


UNKNOWN = ("metod", "stpes", "Steps", "learning_rate", "_steps", "__builtins__", "ｓｔｅｐｓ", "🎲")
WRONG = {
    "method": ("cdu", "3", "GDD", "cud\n"),
    "schedule": ("linear", '"""'),
    "dtype": ("float16", "&a [*a]"),
    "path": ("vpp", "vp"),
    "net": ("mnsit", "vit"),
    "data": ("digit", "imagenet", "folder:../../nowhere", "folder:", "folder:/dev"),
    "device": ("gpu", "cpu'); ('"),
    "steps": ("ten", "1.5", "True", "None", "[1, 2]", "0", "-5", "100000001", "9" * 400),
    "batch": ("{}", "1e9"),
    "classes": ("maybe", "1"),
    "lr": ("fast", "0", "nan", "inf", "-inf", "-1"),
    "seed": ("0x10", "-1", str(2**63)),
    "minutes": ("soon", "-3"),
    "until": ("-1",),
    "ema": ("1",),
    "clip": ("nan", "inf"),
    "phi0": ("1e400",),
    "save_every": ("0",),
    "name": ("a\nb", "'", "../up", "/etc/x", ".", "~", "🎲", "x" * 300),
    "args.haeds": ("2",),
    "args.aim": ("-1", "nan", "many"),
    "args.heads": ("two", "9"),
    "args.__class__": ("1",),
}


def test_what_makes_no_sense_is_refused_in_one_line(capsys, lab):
    for key in UNKNOWN:
        assert_refused(capsys, ["train", f"--{key}", "5"], key[:4])
    for key, values in WRONG.items():
        for value in values:
            argv = ["train", "--steps", "3", f"--{key}={value}"]
            if key == "steps":
                argv = ["train", f"--{key}={value}"]
            words = (key.removeprefix("args."), "data set", "argument")
            assert_refused(capsys, argv, *words, codes=(2, 5) if key == "data" else (2,))
    assert not lab.exists()


UNMEASURED = {
    "nfe": ("3",),
    "nfes": ("0", "1 two", "-1", "1.5", "nan"),
    "seeds": ("-1",),
    "solvers": ("eulr", "'; import os"),
    "n": ("15", "nan", "many"),
    "weights": ("emma",),
    "head": ("0",),
    "grid": ("unifrom",),
    "denoise": ("maybe",),
    "guidance": ("inf",),
    "extractor": ("digits-v3",),
}


def test_an_evaluation_that_makes_no_sense_is_refused(capsys, lab):
    for key, values in UNMEASURED.items():
        for value in values:
            argv = ["evaluate", "digits-rf", f"--{key}={value}"]
            assert_refused(capsys, argv, key.rstrip("s"))
    for name in ("nope", "../.."):
        assert_refused(capsys, ["evaluate", name], name)
    assert not lab.exists()


def test_near_misses_and_old_words_get_a_hint(capsys):
    for argv, hint in (
        (["tarin"], "did you mean 'train'?"),
        (["train", "--stpes", "5"], "did you mean '--steps'?"),
        (["train", "steps=5"], "write --steps 5"),
        (["train", "--steps"], "expected one argument"),
        (["train", "--method", "GDD"], "did you mean 'gdd'?"),
        (["train", "--clip", "inf"], "clip = inf is out of range: at least 0 and a finite number"),
        (["sample", "digits-rf"], "--out"),
        (["show", "digits-fr"], "did you mean 'digits-rf'?"),
        (["train", "--aim", "8"], "did you mean '--args.aim'?"),
        (["train", "--method", "rf", "--args.aim", "8"], "belongs to method cud"),
        (["list", "extra"], "unknown word 'extra'"),
    ):
        assert_refused(capsys, argv, hint)


def test_the_command_that_show_prints_can_be_typed(capsys):
    for name in ("mnist-hour-meanflow", "digits-cud"):
        assert main(["show", name]) == 0
        line = next(row for row in capsys.readouterr().out.splitlines() if "cudlab train" in row)
        words = shlex.split(line.removeprefix("command"))
        assert "--name" not in words  # it ships, so its name is taken
        config, _ = parse_parameters(train_parameters(words[2:]))
        assert config == Run.open(name).config


def test_a_flag_given_twice_is_refused(capsys, tmp_path):
    for argv in (
        ["train", "--steps", "1", "--steps", "2"],
        ["train", "--args.aim", "4", "--args.aim", "8"],
        ["evaluate", "digits-rf", "--n", "60", "--n", "70"],
        ["sample", "digits-rf", "--out", "there", "--n", "60", "--n", "70"],
        ["sweep", "sweep.json", "--workers", "1", "--workers", "2"],
        ["export", "digits-rf", "--to", "onnx", "--to", "hub-folder"],
    ):
        assert_refused(capsys, argv, "is given twice: '")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, code",
    [
        (None, 0),
        (ValueError("x"), 2),
        (TrainingStopped("x"), 3),
        (KeyboardInterrupt(), 3),
        (Diverged("x"), 4),
        (CorruptData("x"), 5),
        (OSError("x"), 5),
        (FileNotFoundError(2, "No such file", "a"), 5),
        (KeyError("x"), 1),
        (RuntimeError("x"), 1),
    ],
    ids=repr,
)
def test_the_code_of_an_ending(error, code):
    assert get_exit_code(error) == code
    assert error is None or error_message(error)


def test_a_mistake_of_the_lab_is_not_hidden(monkeypatch):
    monkeypatch.setitem(COMMANDS, "list", (lambda argv: builtins.int("x" * argv), "broken"))
    with pytest.raises(TypeError):
        main(["list"])


@pytest.mark.parametrize("words", [("cudlab.cli",), ("cudlab", "--"), ("cudlab.cli", "--")])
def test_every_way_to_call_it_is_the_same_command(words):
    "torchrun -m cudlab -- hands on the two dashes."
    asked = [sys.executable, "-m", *words, "show", "nobody"]
    ended = subprocess.run(asked, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: unknown run 'nobody'")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


def test_a_pipe_that_is_closed_says_nothing_and_a_full_disk_says_so():
    command = f"{sys.executable} -m cudlab list"
    piped = subprocess.run(
        ["bash", "-c", f"{command} | head -1"], capture_output=True, text=True, env=os.environ
    )
    assert piped.returncode == 0 and piped.stdout.count("\n") == 1 and not piped.stderr
    full = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
    assert full.returncode == 5 and full.stderr == "error: No space left on device\n"


def test_an_interrupt_that_came_through_exec_ends_with_its_code(tmp_path):
    "Dataclasses make functions by exec: Python then ends by SIGINT though it was caught."
    lines = [
        "import sys",
        "from cudlab.cli import report_error",
        "try:",
        "    exec('raise KeyboardInterrupt')",
        "except KeyboardInterrupt as error:",
        "    sys.exit(report_error(error))",
    ]
    (tmp_path / "ended.py").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "ended"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 3 and "Traceback" not in ended.stderr


def test_odd_lines_are_marked_by_list_and_show(lab, capsys):
    folder = Path(shutil.copytree(ROOT / "checkpoints" / "digits-rf", lab / "marked"))
    rows = (folder / "scores.jsonl").read_text()
    (folder / "scores.jsonl").write_text('{"fd": NaN, "nfe": "two"}\n' + rows + '{"fd": [1]}\n')
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": "x"}\n')
    assert main(["list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "2 odd lines in scores.jsonl" in line][0].startswith("marked ")
    for name in ("marked", f"marked@{Run.open('marked').step}", str(folder)):
        assert main(["show", name]) == 0
        said = capsys.readouterr().out
        assert "odd       2 of the lines of scores.jsonl" in said and "best      fd@digits" in said
        assert "odd       1 of the lines of metrics.jsonl" in said
