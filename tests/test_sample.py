"Samples as files: stopped, continued, shared out among processes, and refused."

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import end_processes, run_processes, sample_run, start_processes

from cudlab.config import CorruptData, error_of
from cudlab.run import Run
from cudlab.sample import SampleOptions, read_samples, tile_samples, write_samples

WAY = dict(n=32, per_part=16, steps=2)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_stop_keeps_the_parts_and_other_processes_finish_them(tmp_path, sign):
    folder = tmp_path / "set"
    asked = dict(n=2000, per_part=20, steps=2)
    (process,) = start_processes(1, sample_run, "digits-rf", str(folder), asked)
    while len(list(folder.glob("part-*.safetensors"))) < 2 and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, sign)
    assert end_processes([process]) != [0]
    made = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.safetensors")}
    assert 2 <= len(made) < 100
    with pytest.raises(CorruptData, match="has no part-"):
        read_samples(folder)
    run_processes(2, sample_run, "digits-rf", str(folder), asked)
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    x, labels, about = read_samples(folder)
    assert x.shape == (2000, 1, 8, 8) and labels is None and about["solver"] == "euler"
    list(write_samples(Run.open("digits-rf"), tmp_path / "alone", **asked | {"n": 60}))
    alone = read_samples(tmp_path / "alone")[0]
    assert (x[:60].int() - alone.int()).abs().max() <= 1


def test_events_count_the_parts(tmp_path):
    run = Run.open("digits-rf")
    events = write_samples(run, tmp_path / "set", **WAY)
    first = next(events)
    assert (first.part, first.parts, first.new) == (1, 2, True)
    assert str(first) == "part 1/2: samples 0 to 15"
    events.close()
    again = list(write_samples(run, tmp_path / "set", **WAY))
    assert [(event.part, event.new) for event in again] == [(1, False), (2, True), (0, False)]
    assert str(again[0]).endswith(", there already")
    way = "euler with 2 steps, NFE 2, seed 0"
    assert str(again[2]).startswith(f"32 samples of digits-rf, {way}, in ")


def test_labels_are_kept_and_points_are_not_rounded(tmp_path):
    run = Run.open("digits-cud-aim8-classes")
    list(write_samples(run, tmp_path / "classes", n=32, per_part=16))
    x, labels, about = read_samples(tmp_path / "classes")
    assert labels.tolist() == [k % 10 for k in range(32)] and len(about["classes"]) == 10
    assert x.dtype == torch.uint8
    run = Run.open("checkerboard-cud-aim4")
    list(write_samples(run, tmp_path / "points", n=32, per_part=16))
    x, expected = read_samples(tmp_path / "points")[0], run.solve(index=32).x
    assert (x - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_run_is_sampled_its_own_way_unless_told():
    student, learned = Run.open("digits-boot"), Run.open("digits-dode-euler5")
    assert SampleOptions().to_sampling(student).steps == 1
    how = SampleOptions().to_sampling(learned)
    assert (how.solver, how.steps, how.batch) == (learned.name, 5, 500)
    asked = SampleOptions(solver="ab2", steps=3, guidance=0, per_part=20)
    how = asked.to_sampling(Run.open("digits-cud-aim8-classes"))
    assert (how.solver, how.steps, how.guidance, how.batch) == ("ab2", 3, 0, 20)


@pytest.mark.parametrize(
    "name, asked, said",
    [
        ("digits-rf", dict(n=-1), "n = -1 is out of range"),
        ("checkerboard-cud-aim4", dict(png=True), "draws points, not pictures"),
        ("digits-rf", dict(setps=3), "did you mean 'steps'"),
        ("digits-boot", dict(steps=3), "steps = '3' is not possible"),
        ("digits-rf", dict(solver="eular"), "eular"),
        ("digits-rf", dict(head=2), "head = '2'"),
        ("digits-rf", dict(guidance=-0.5), "guidance = -0.5 is out of range"),
        ("digits-rf", dict(guidance=2), "guidance = 2 means nothing to run 'digits-rf'"),
    ],
)
def test_wrong_options_are_a_sentence_and_leave_no_folder(tmp_path, name, asked, said):
    found = error_of(list, write_samples(Run.open(name), tmp_path / "a", **asked))
    assert said in found and "\n" not in found and not (tmp_path / "a").exists()


def test_a_place_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("x")
    for place in ("file", "full"):
        found = error_of(list, write_samples(Run.open("digits-rf"), tmp_path / place, **WAY))
        assert "holds something else" in found


def test_a_folder_of_other_samples_and_a_broken_part(tmp_path):
    run, folder = Run.open("digits-rf"), tmp_path / "set"
    list(write_samples(run, folder, **WAY))
    for other in ({"steps": 3}, {"seed": 1}, {"n": 48}, {"per_part": 8}):
        assert "name another folder" in error_of(list, write_samples(run, folder, **WAY | other))
    part = folder / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(CorruptData, match="cannot be read"):
        read_samples(folder)
    (folder / "index.json").write_text(json.dumps({"n": 1}))
    assert "name another folder" in error_of(list, write_samples(run, folder, **WAY))


def test_any_number_of_samples_down_to_one(tmp_path):
    run = Run.open("digits-rf")
    for n in (1, 3):
        list(write_samples(run, tmp_path / str(n), n=n, steps=2))
        x, _, about = read_samples(tmp_path / str(n))
        assert len(x) == about["n"] == n
    assert SampleOptions(out="a").to_sampling(run).n == 5000
    assert SampleOptions(out="a.png").to_sampling(run).n == 64


def read_png(path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy())


def test_a_sheet_shows_the_samples_of_the_folder_and_says_what_they_are(tmp_path):
    run = Run.open("digits-rf")
    list(write_samples(run, tmp_path / "set", n=7, per_part=4, steps=2, png=True))
    (event,) = write_samples(run, tmp_path / "sheet.png", n=7, per_part=3, steps=2)
    assert str(event).startswith("7 samples of digits-rf, euler with 2 steps, NFE 2, seed 0, on ")
    x = read_samples(tmp_path / "set")[0][:, 0].int()
    sheet = read_png(tmp_path / "sheet.png").int()
    assert sheet.shape == (3 * 66 - 2, 3 * 66 - 2)
    for k in range(9):
        top, left = 66 * (k // 3), 66 * (k % 3)
        cell = sheet[top : top + 64, left : left + 64]
        want = x[k].repeat_interleave(8, 0).repeat_interleave(8, 1) if k < 7 else 255
        assert (cell - want).abs().max() <= 1
    assert json.loads(Image.open(tmp_path / "sheet.png").text["cudlab"])["steps"] == 2
    pictures = sorted((tmp_path / "set" / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{k:06d}.png" for k in range(7)]
    assert torch.equal(torch.stack([read_png(path) for path in pictures]).int(), x)


def test_pictures_that_are_missing_are_added_to_a_folder(tmp_path):
    run, folder = Run.open("digits-rf"), tmp_path / "set"
    list(write_samples(run, folder, **WAY))
    list(write_samples(run, folder, png=True, **WAY))
    first = folder / "pictures" / "000000.png"
    before = first.read_bytes()
    first.unlink()
    events = list(write_samples(run, folder, png=True, **WAY))
    assert first.read_bytes() == before and not any(event.new for event in events)


def test_tiles_keep_colours_and_the_order_of_rows():
    x = torch.arange(6 * 3 * 80 * 80).remainder(251).to(torch.uint8).view(6, 3, 80, 80)
    sheet = tile_samples(x)
    assert sheet.shape == (3, 2 * 82 - 2, 3 * 82 - 2)
    assert torch.equal(sheet[:, 82:, 82:162], x[4]) and (sheet[:, 80:82] == 255).all()


@pytest.mark.parametrize(
    "name, n, said",
    [
        ("checkerboard-cud-aim4", 4, "draws points, not pictures"),
        ("digits-rf", 10_001, "at most 10,000"),
        ("digits-rf", 4, "is not a file in a folder that is there"),
    ],
)
def test_a_sheet_that_cannot_be_is_refused_before_anything_is_sampled(tmp_path, name, n, said):
    out = tmp_path / "nowhere" / "a.png"
    assert said in error_of(list, write_samples(Run.open(name), out, n=n))
    assert not list(tmp_path.iterdir())


def test_a_learned_solver_is_taken_with_its_own_times(tmp_path):
    *_, end = write_samples(
        Run.open("digits-rf"), tmp_path / "five", solver="digits-dode-euler5", n=4
    )
    assert "digits-dode-euler5 with 5 steps, NFE 5" in str(end)


def test_pictures_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no PNG: name a folder, or NAME.png"):
        list(write_samples(Run.open("digits-rf"), tmp_path / "sheet.jpg", n=4))
    assert not (tmp_path / "sheet.jpg").exists()
