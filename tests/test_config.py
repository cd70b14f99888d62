"""Options say what is wrong with a value; settings.ini is read, and a wrong line is a sentence."""

import configparser
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from cudlab.cli import main
from cudlab.config import (
    Config,
    Settings,
    error_of,
    find_device,
    from_dict,
    get_settings,
    parse_value,
    set_threads,
)


@pytest.mark.parametrize(
    "params",
    [
        {"lr": "fast"},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": 0},
        {"schedule": "cosin"},
        {"steps": True},
        {"steps": 2.5},
        {"steps": 10**400},
        {"args": "aim=8"},
        {"compile": 1},
        {"method": 3},
        {"seed": -1},
    ],
)
def test_a_wrong_value_is_a_sentence_that_names_its_key(params):
    message = error_of(from_dict, Config, params)
    assert message.startswith(next(iter(params))) and "\n" not in message and len(message) < 200


def test_a_misspelt_key_gets_a_hint():
    assert "did you mean 'steps'" in error_of(from_dict, Config, {"stpes": 1000})


def test_options_do_not_share_a_dict():
    assert Config().args is not Config().args


def test_a_text_becomes_the_value_it_means():
    assert [parse_value(text) for text in ("1e-3", "8", "TRUE", "a b")] == [1e-3, 8, True, "a b"]
    assert parse_value("8", str) == "8" and parse_value("yes") == "yes"
    assert [parse_value(t, bool) for t in ("yes", "No", "on", "off")] == [True, False, True, False]


def test_a_device_of_the_settings_that_is_none_is_refused_by_every_command(monkeypatch, capsys):
    monkeypatch.setenv("CUDLAB_DEVICE", "tpu")
    words = "device = 'tpu' is not a device"
    assert f"{words}; auto, cpu, cuda, cuda:0 or mps" == error_of(get_settings)
    for command in (["list"], ["show", "digits-rf"], ["verify", "digits-rf"]):
        assert main(command) == 2 and words in capsys.readouterr().err
    monkeypatch.setenv("CUDLAB_DEVICE", "cuda:7")  # which need not be here to list runs
    assert main(["list"]) == 0


def test_wrong_devices_are_a_sentence():
    assert find_device("cpu").type == "cpu"
    for name in ("gpu", "xla", "cuda:99"):
        assert f"device = {name!r} is not" in error_of(find_device, name)


def test_threads_are_those_asked_for_or_the_environments(monkeypatch):
    before = set_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [set_threads(2), set_threads(0)] == [2, 1]
    set_threads(before)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    "No CUDLAB_ variable but those a test sets."
    for key in [k for k in os.environ if k.startswith("CUDLAB_")]:
        monkeypatch.delenv(key)


@pytest.fixture
def lab(tmp_path):
    "A lab elsewhere: write its [lab] section, get its folder."

    def make(text="", head="[DEFAULT]\nlib_name = cudlab\n[lab]\n"):
        (tmp_path / "settings.ini").write_text(head + text)
        return tmp_path

    return make


def ini(root):
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini")
    return parser


def test_agrees_with_nbdev(root, monkeypatch):
    monkeypatch.chdir(root)
    from nbdev.config import get_config

    config, shared = get_config(), ini(root).defaults()
    assert {"lib_name", "lib_path", "nbs_path", "tst_flags"} == set(shared)
    for key, value in shared.items():
        theirs = getattr(config, key)
        if key.endswith("_path"):
            assert (root / value).resolve() == type(root)(theirs).resolve(), key
        else:
            assert value == (" ".join(theirs) if isinstance(theirs, (list, tuple)) else theirs), key


def test_every_key_is_read_and_stated(root):
    stated = set(ini(root)["lab"]) - set(ini(root).defaults())
    assert stated == {f.name for f in fields(Settings)} - {"root"}


def test_every_setting_is_used(root):
    files = [p for folder in ("cudlab", "apps") for p in (root / folder).rglob("*.py")]
    code = "\n".join(p.read_text() for p in files)
    unused = [f.name for f in fields(Settings) if not re.search(rf"\.{f.name}\b", code)]
    assert not unused


def test_defaults_equal_the_file(root, tmp_path):
    "Without a settings.ini the lab behaves as with the one it ships, below the working directory."
    here = get_settings(root)
    for f in fields(Settings):
        if f.type in (str, int):
            assert getattr(here, f.name) == f.default, f.name
    assert (
        here.root == root and here.runs_path == root / "runs" and here.data_path[0] == root / "data"
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("colour = blue", ["colour", "one of", "runs_path"]),
        ("devise = cpu", ["devise", "did you mean 'device'"]),
        ("port = eighty", ["port", "eighty", "a whole number"]),
        ("port = 0", ["port", "0", "at least 1", "at most 65,535"]),
        ("port = 7860.5", ["port", "7860.5", "a whole number"]),
        ("threads = -1", ["threads", "-1", "at least 0"]),
        ("threads = nan", ["threads", "nan"]),
        ("seed = 1e400", ["seed", "a whole number"]),
    ],
)
def test_wrong_line_is_a_sentence(lab, line, words):
    message = error_of(get_settings, lab(line))
    assert "\n" not in message and all(w in message for w in words), message


@pytest.mark.parametrize("text", ["port = 1\nport = 2", "no equals sign", "[lab]"])
def test_unreadable_file_is_a_sentence(lab, text):
    message = error_of(get_settings, lab(text))
    assert "settings.ini" in message and "\n" not in message


def test_unreadable_bytes_are_a_sentence(lab):
    folder = lab()
    (folder / "settings.ini").write_bytes(b"[lab]\nport = \xff\xfe\n")
    assert "settings.ini" in error_of(get_settings, folder)


@pytest.mark.parametrize("name", ["50%", "%(date)s", "my runs"])
def test_a_path_is_taken_as_it_stands(lab, name):
    folder = lab(f"runs_path = {name}\n")
    assert get_settings(folder).runs_path == folder / name


def test_environment_wins(lab, monkeypatch):
    folder = lab("port = 8000\nruns_path = mine\n")
    assert get_settings(folder).port == 8000 and get_settings(folder).runs_path == folder / "mine"
    monkeypatch.setenv("CUDLAB_PORT", "9000")
    monkeypatch.setenv("CUDLAB_RUNS_PATH", "/elsewhere/runs")
    monkeypatch.setenv("CUDLAB_DATA_PATH", "a, b ,")
    s = get_settings(folder)
    assert (s.port, str(s.runs_path)) == (9000, "/elsewhere/runs") and s.data_path == (
        folder / "a",
        folder / "b",
    )
    monkeypatch.setenv("CUDLAB_PORT", "http")
    assert "http" in error_of(get_settings, folder)


def test_found_from_a_subfolder(lab):
    folder = lab("seed = 7\n")
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    assert get_settings(deep).root == folder and get_settings(deep).seed == 7


def test_found_from_anywhere(root, tmp_path):
    "An unrelated working directory falls back to the lab that the package was installed from."
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "from cudlab.config import get_settings; print(get_settings().root)",
        ],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=True,
    ).stdout.strip()
    assert out == str(root)


def test_a_file_without_the_section_is_fine(lab):
    assert get_settings(lab(head="[DEFAULT]\nlib_name = cudlab\n")).port == 7860


@pytest.mark.parametrize("head", ["[LAB]\n", "[Lab]\n", "\ufeff[lab]\n"])
def test_the_section_is_found_in_any_case_and_behind_a_byte_order_mark(tmp_path, head):
    (tmp_path / "settings.ini").write_text(head + "port = 8000\n", encoding="utf-8")
    assert get_settings(tmp_path).port == 8000


def test_a_comment_may_follow_a_value(lab):
    folder = lab("port = 8000  # the page\nruns_path = a#b ; mine\n")
    here = get_settings(folder)
    assert (here.port, here.runs_path) == (8000, folder / "a#b")


def test_a_tilde_is_the_home_folder(lab, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    here = get_settings(lab("runs_path = ~/runs\ndata_path = ~/data, here\n"))
    assert str(here.runs_path) == "/home/somebody/runs"
    assert list(map(str, here.data_path)) == ["/home/somebody/data", f"{here.root}/here"]


def test_quotes_around_a_value_are_no_part_of_it(lab, monkeypatch):
    folder = lab("port = '8000'\nruns_path = \"my # runs\"  # mine\ndata_path = \"a\", 'b c', d\n")
    here = get_settings(folder)
    assert (here.port, here.runs_path) == (8000, folder / "my # runs")
    assert here.data_path == (folder / "a", folder / "b c", folder / "d")
    monkeypatch.setenv("CUDLAB_RUNS_PATH", '"it\'s # here"')
    monkeypatch.setenv("CUDLAB_CACHE_PATH", "a # b")
    here = get_settings(folder)
    assert (here.runs_path, here.cache_path) == (folder / "it's # here", folder / "a # b")


def test_a_list_may_go_on_in_the_next_line(lab):
    folder = lab("data_path = a,  # mine\n    b  # shared\nseed = 3  ; third\n")
    here = get_settings(folder)
    assert here.data_path == (folder / "a", folder / "b") and here.seed == 3
