"""Runs that strangers have made: whatever their names and texts hold, a terminal shows it as text
and the page shows no markup of theirs.
"""

import json
import re
import shutil

import pytest
from small_lab import vouch

from cudlab.checkpoint import newest_checkpoint
from cudlab.cli import main
from cudlab.config import get_settings

MARKUP = "<img src=x onerror=alert(1)>"
EVIL = f"\x1b[2J\x1b]0;owned\x07\r\u202e{MARKUP}"


@pytest.fixture
def strange(tmp_path, monkeypatch):
    "A run whose texts steer a terminal, under a name of markup, and a copy under a worse one."
    folder = tmp_path / "runs"
    source = get_settings().checkpoints_path / "digits-dode-euler5"
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(folder))
    run_dir = folder / MARKUP
    shutil.copytree(source, run_dir)
    info = json.loads((run_dir / "config.json").read_bytes())
    info |= {"classes": [EVIL] * 10, "created": EVIL, "machine": EVIL, "user": EVIL}
    info["teacher"]["name"] = EVIL
    info["data"]["note"] = EVIL
    for place in (run_dir, newest_checkpoint(run_dir)):
        (place / "config.json").write_text(json.dumps(info))
    vouch(run_dir)
    score = dict(run=EVIL, solver=EVIL, extractor=EVIL, fd=1.0, nfe=5, machine=EVIL, note=EVIL, n=9)
    (run_dir / "scores.jsonl").write_text(json.dumps(score) + "\n")
    (run_dir / "status.json").write_text(json.dumps(dict(status=EVIL, why=EVIL)))
    shutil.copytree(run_dir, folder / EVIL.replace("/", ""))
    return run_dir


def test_a_terminal_shows_text_only(strange, capsys, tmp_path):
    worse = next(path for path in strange.parent.iterdir() if path != strange)
    commands = [["list"], ["verify", "nope\x1b[2J"], ["train", "--name", EVIL], ["sweep", EVIL]]
    for path in (strange.name, str(strange), str(worse)):
        commands += [
            ["show", path],
            ["verify", path],
            ["sample", path, "--out", str(tmp_path / "x")],
        ]
        commands += [["evaluate", path, "--solvers", EVIL], ["resume", path]]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [{"method": EVIL, "name": EVIL}]}))
    commands.append(["sweep", str(tmp_path / "sweep.json"), "--here"])
    said = ""
    for argv in commands:
        main(argv)
        out, err = capsys.readouterr()
        assert (out + err).strip(), argv
        for c in out + err:
            assert c.isprintable() or c in "\n\t", (argv, out + err)
        said += out + err
    assert said.count("\\x1b[2J") > 6  # it was shown


def markup_of_strangers(value) -> list:
    "Tags that only a stranger can have written."
    return re.findall(r"<img src=x|onerror=alert\(1\)>", value)


def test_the_page_shows_no_markup_of_theirs(strange):
    pytest.importorskip("gradio")
    import offer
    from views import form, live, runs, scores, tradeoff

    name = strange.name
    assert name in [choice for _, choice in offer.run_choices()]
    facts, _, log, command, config = runs.show_run(name)
    pages = [facts, log, config, runs.show_differences([name, "digits-rf"])]
    pages += [form.on_run(name)[0], form.describe_cost(name, "steps", 5, True, name)]
    pages += tradeoff.show_scores([name], [name])[1:]
    pages += [live.describe_job(live.read_job(name)), *live.show_job(name)[2::3]]
    pages += [scores.describe_group(scores.Chart(), offer.open_run(name).scores, [])]
    for page in pages:
        assert not markup_of_strangers(page), page
    assert any("&lt;img src=x" in page for page in pages)
