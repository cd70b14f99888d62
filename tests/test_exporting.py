"""Exports: each format sampled outside the lab, nothing half written."""

import dataclasses
import importlib.util
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT

from cudlab import export
from cudlab.cli import main
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.export import export_run
from cudlab.formats import FORMATS, Export, ExportOptions, make_card, read_template
from cudlab.imports import load_foreign_weights
from cudlab.recipe import apply_recipe, sampling_recipe
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.training import train

for package in ("onnx", "onnxruntime", "onnxscript", "diffusers", "huggingface_hub"):
    pytest.importorskip(package)

CLASSES = "digits-cud-aim8-classes"  # exported in the fast suite
RUNS = {
    CLASSES: {"guidance": 2.0, "steps": 3},
    "digits-rf": {"solver": "unipc2-bh2", "steps": 4},
    "digits-cud-heads3": {"head": 2, "steps": 3},
    "digits-boot": {},
    "digits-meanflow": {"steps": 2},
    "moons": {"solver": "ab2", "steps": 4},
}
each_run = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == CLASSES else pytest.mark.long) for name in RUNS],
)


def make(name, **config):
    "A run on points, trained here."
    run = create_run(Config(data="moons", **config), name)
    list(train(run))
    return Run(run.dir)


@pytest.fixture(scope="module")
def moons(runs_path):
    return make("export-moons", method="rf", steps=40, batch=64)


@pytest.fixture(scope="module")
def opened(moons):
    return lambda name: moons if name == "moons" else Run.open(name)


@pytest.fixture(scope="module")
def exported(opened, tmp_path_factory):
    "The export of a run in a format, made once."
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def get(to, name):
        if (to, name) not in made:
            out = folder / f"{to}-{name}"
            made[to, name] = write(opened(name), to, out, license="mit", **RUNS[name])
        return made[to, name]

    return get


def write(run, to, out, **options):
    return export_run(run, ExportOptions(to=to, out=str(out), **options))


def is_empty(folder):
    return not any(folder.iterdir())


def gap(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def read_card(folder):
    return json.loads((folder / "card.json").read_text())


# recipes


@pytest.mark.parametrize(
    "name",
    ["digits-dode-euler5", "digits-meanflow", "digits-boot", "digits-cd", "digits-gdd", "moons"],
)
def test_a_recipe_is_the_run(name, opened):
    run = opened(name)
    net = run.network_run.net(device="cpu")
    noise = draw_noise(3, torch.arange(5), run.shape)

    def velocity(x, t, r):
        return net(x, t, None, r) if net.times == 2 else net(x, t)

    with torch.no_grad():
        made = apply_recipe(sampling_recipe(run), velocity, noise)
    assert gap(made, run.solve(seed=3, index=5, device="cpu").x) < 1e-5


def test_a_recipe_may_have_a_number_for_each_channel(moons):
    args = {"teacher": moons.name, "base": "ab2", "moves": 3, "channels": True}
    solver = make("export-dode", method="dode", args=args | {"batches": 1, "samples": 50})
    rows, net = sampling_recipe(solver), moons.net(device="cpu")
    assert any(isinstance(w, list) for row in rows for w in row["weights"])
    with torch.no_grad():
        made = apply_recipe(rows, lambda x, t, r: net(x, t), draw_noise(0, torch.arange(5), (2,)))
    assert gap(made, solver.solve(index=5, device="cpu").x) < 1e-5


# formats


@each_run
def test_onnx_is_sampled_by_numpy_alone(name, opened, exported):
    import onnxruntime

    run, done = opened(name), exported("onnx", name)
    assert done.difference < 2e-5
    files = sorted(path.name for path in done.folder.iterdir())
    assert files == ["card.json", "model.onnx", "sample.py"]
    card = read_card(done.folder)
    assert card["weights"]["sha256"] == run.network_hash()
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    assert [entry.name for entry in session.get_inputs()] == card["inputs"]
    assert {entry.shape[0] for entry in session.get_inputs()} == {"batch"}
    for size in (1, 5):  # another seed, another number of samples, no label
        known = [draw_noise(7, torch.arange(size), run.shape).numpy()]
        for row in card["recipe"]:
            x = np.tensordot(np.array(row["weights"]), np.stack(known), 1).astype(np.float32)
            if row["t"] is None:
                break
            full = {key: np.full(size, row[key], np.float32) for key in ("t", "r")}
            full |= {"x": x, "y": np.full(size, len(card["classes"]))}
            known.append(session.run(None, {key: full[key] for key in card["inputs"]})[0])
        truth = run.solve(seed=7, index=size, device="cpu", **RUNS[name]).x
        assert gap(x, truth) < 2e-5


@each_run
def test_torch_program_draws_the_run(name, opened, exported):
    run, done = opened(name), exported("torch-export", name)
    assert done.difference < 2e-5
    net = torch.export.load(done.folder / "model.pt2").module()
    head = RUNS[name].get("head", 1)
    for size in (1, 3):
        given = {
            "x": draw_noise(5, torch.arange(size), run.shape),
            "t": torch.full((size,), 0.7),
            "y": torch.arange(size),
            "r": torch.full((size,), 0.2),
        }
        given = {key: given[key] for key in read_card(done.folder)["inputs"]}
        want = run.network_run.net(device="cpu").heads(**given)[head - 1]
        assert torch.allclose(net(*given.values()), want, atol=1e-5)


@each_run
def test_diffusers_pipeline_draws_the_run(name, exported):
    done = exported("diffusers-folder", name)
    assert done.difference < 2e-5 and not list(done.folder.rglob("*.bin"))


@each_run
def test_hub_folder_is_the_run_with_a_card(name, opened, exported):
    from huggingface_hub import ModelCard

    run, done = opened(name), exported("hub-folder", name)
    card, twin = ModelCard.load(done.folder / "README.md"), Run.open(str(done.folder))
    assert done.difference == 0
    assert card.data.library_name == "cudlab" and card.data.license == "mit"
    assert (card.data.pipeline_tag == "unconditional-image-generation") == (len(run.shape) == 3)
    assert card.text.count("| fd@") >= len(run.scores)
    assert "$" not in card.text and "{" not in card.text.split("## How it was made")[0]
    assert twin.verify() and twin.config == run.config and twin.scores == run.scores
    fresh = run.new_network()
    tensors = safetensors.torch.load_file(done.folder / "model.safetensors")
    assert load_foreign_weights(tensors, fresh) == "lab"
    weights = run.net(device="cpu").state_dict()
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in weights.items())


@pytest.mark.parametrize("name", ["moons", "digits-dode-euler5"])
def test_a_run_is_copied_without_its_training_state(name, opened, tmp_path):
    run = opened(name)
    done = write(run, "run", tmp_path / "copy")
    copy = Run(done.folder)
    assert done.difference == 0 and copy.verify() and copy.config == run.config
    assert not list(done.folder.rglob("train_state*"))
    assert copy.network_hash() == run.network_hash() and copy.weights == run.weights


def test_half_precision_is_smaller_and_told(moons, tmp_path):
    whole, half = (
        write(moons, "run", tmp_path / (dtype or "whole"), dtype=dtype) for dtype in ("", "float16")
    )
    assert half.size < whole.size and Run(half.folder).weights == ("ema",)
    assert Run(half.folder).network_hash() == moons.network_hash()
    assert 0 < half.difference < 0.05 and "allowed" in str(whole) and "allowed" not in str(half)


@pytest.mark.long
def test_the_whole_sampler_as_one_graph(tmp_path):
    import onnxruntime

    x = draw_noise(9, torch.arange(6), (1, 8, 8))
    run, how = Run.open("digits-rf"), {"solver": "ab2", "steps": 2}
    done = write(run, "onnx", tmp_path / "a", what="sampler", **how)
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    made = session.run(None, {"x": x.numpy()})[0]
    assert done.difference < 2e-5
    assert gap(made, run.solve(seed=9, index=6, device="cpu", **how).x) < 2e-5
    run, how, y = Run.open(CLASSES), {"steps": 1, "guidance": 3.0}, torch.tensor([1, 7, 7])
    done = write(run, "torch-export", tmp_path / "b", what="sampler", **how)
    made = torch.export.load(done.folder / "model.pt2").module()(x[:3], y)
    truth = run.solve(seed=9, index=3, y=y, device="cpu", **how).x
    assert done.nfe == 2 and gap(made, truth) < 2e-5


def test_a_learned_solver_takes_its_network_along(tmp_path):
    run = Run.open("digits-dode-euler5")
    card = make_card(Export(run, ExportOptions(to="torch-export")))
    assert card["sampling"]["nfe"] == 5 and card["weights"]["run"] == "digits-rf"
    said = error_of(write, run, "hub-folder", tmp_path / "b")
    assert "export that run" in said and is_empty(tmp_path)


@pytest.mark.long
def test_a_learned_solver_is_drawn_by_torch(tmp_path):
    done = write(Run.open("digits-dode-euler5"), "torch-export", tmp_path / "a")
    assert done.nfe == 5 and done.difference < 2e-5


def read_tree(folder) -> dict:
    "Every file of a folder by its path, JSON files as what they say."
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    read = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: json.loads(b) if name.endswith("json") else b for name, b in read.items()}


def test_diffusers_pipeline_knows_solvers_labels_half_precision_and_how_to_save_itself(
    exported, tmp_path
):
    "A process with diffusers and without the lab: six seconds."
    run, done = Run.open(CLASSES), exported("diffusers-folder", CLASSES)
    np.save(tmp_path / "noise.npy", draw_noise(2, torch.arange(4), run.shape).numpy())
    program = Path(__file__).with_name("sample_with_diffusers.py")
    words = ["-I", program, done.folder, tmp_path / "noise.npy", tmp_path / "made.npz"]
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    again = done.folder.with_name(f"{done.folder.name}-again")
    ended = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    made = np.load(tmp_path / "made.npz")
    for key, choices in (
        ("ab2", {"solver": "ab2", "steps": 5}),
        ("unipc", {"solver": "unipc2-bh2", "steps": 4, "grid": "logsnr"}),
        ("label", {"steps": 2, "guidance": 1.5, "y": 3}),
    ):
        assert gap(made[key], run.solve(seed=2, index=4, device="cpu", **choices).x) < 2e-5, key
    own = run.solve(seed=2, index=4, device="cpu", solver="rk45", guidance=2, y=1 + torch.arange(4))
    assert gap(made["adaptive"], own.x) < 0.02  # rounding decides which steps it takes
    assert np.array_equal(made["again"], made["plain"])
    assert 0 < gap(made["torch.float16"], made["plain"]) < 0.03
    assert 0 < gap(made["torch.bfloat16"], made["plain"]) < 0.3
    before, after = read_tree(done.folder), read_tree(again)
    assert before.keys() == after.keys() and before["card.json"] == after["card.json"]
    code = [name for name in before if name.endswith(".py")]
    assert len(code) >= 12 and all(before[name] == after[name] for name in code)


@pytest.mark.parametrize("what", ["net", "sampler"])
def test_the_program_of_an_export_takes_noise_of_any_precision(what, tmp_path):
    rows = [{"t": 1.0, "r": 1.0, "weights": [1.0]}, {"t": None, "weights": [1.0, -1.0]}]
    card = {"what": what, "classes": ["a"], "recipe": rows, "sampling": {"guidance": 1}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "sample.py").write_text(read_template("sample.py"))
    space = runpy.run_path(str(tmp_path / "sample.py"))
    asked = []

    def net(x, y, **times):
        asked.append({x.dtype, *(t.dtype for t in times.values())})
        return x / 2

    noise = np.random.default_rng(0).standard_normal((3, 2))
    assert gap(space["sample"](net, noise), noise / 2) < 1e-6
    assert asked == [{np.dtype("float32")}]


# what is refused, and what is left behind


@pytest.fixture
def stub(monkeypatch):
    "A format that writes what it is told."

    def put(write):
        monkeypatch.setitem(FORMATS, "stub", dataclasses.replace(FORMATS["onnx"], write=write))

    return put


@pytest.mark.parametrize("fault", [1e-3, math.nan])
def test_an_export_that_disagrees_is_not_kept(fault, moons, stub, monkeypatch, tmp_path):
    truth = moons.solve(index=8, device="cpu").x
    stub(lambda export, folder: (folder / "model.onnx").write_bytes(b"anything"))
    monkeypatch.setattr(export, "sample_with_export", lambda *given: truth + fault)
    said = error_of(write, moons, "stub", tmp_path / "out")
    assert "draws other samples than the run" in said and is_empty(tmp_path)


def test_an_export_that_needs_the_lab_is_not_kept(moons, stub, tmp_path):
    stub(lambda export, folder: (folder / "sample.py").write_text("import cudlab"))
    said = error_of(write, moons, "stub", tmp_path / "out")
    assert "does not run without the lab" in said and is_empty(tmp_path)


def test_an_interrupted_export_leaves_nothing(moons, stub, tmp_path):
    def stop(export, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    stub(stop)
    with pytest.raises(KeyboardInterrupt):
        write(moons, "stub", tmp_path / "out")
    assert is_empty(tmp_path)


@pytest.mark.parametrize(
    "how",
    [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)],
    ids=lambda how: how.name,
)
def test_a_killed_export_never_has_its_name(how, tmp_path):
    words = ["export", "digits-boot", "--to", "onnx", "--out", tmp_path / "out"]
    job = subprocess.Popen(
        [sys.executable, "-m", "cudlab", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while is_empty(tmp_path) and job.poll() is None:
            time.sleep(0.02)
        assert not is_empty(tmp_path) and not (tmp_path / "out").exists()
        job.send_signal(how)
        code = job.wait(60)
    finally:
        job.kill()
    assert not (tmp_path / "out").exists()
    if how == signal.SIGTERM:
        assert code == 3 and is_empty(tmp_path)


def test_targets_that_cannot_be_written(moons, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "file", "link"):
        assert "exists; name a new folder" in error_of(write, moons, "run", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        assert "cannot be written" in error_of(write, moons, "run", out)
    monkeypatch.chdir(tmp_path)
    done = write(moons, "run", Path("new", "out"))
    assert done.folder == tmp_path / "new" / "out"  # parents are made
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # root may write anywhere
        assert "Permission denied" in error_of(write, moons, "run", closed / "out")


@pytest.mark.parametrize(
    "name, to, options, said",
    [
        ("digits-rf", "onxn", {}, "did you mean 'onnx'?"),
        ("digits-rf", "", {}, "to = '' names no format"),
        ("digits-rf", "hub-foldr", {}, "did you mean 'hub-folder'?"),
        ("digits-rf", "onnx", {"solver": "euller"}, "did you mean 'euler'?"),
        ("digits-rf", "onnx", {"solver": "rk45"}, "sample by sample"),
        ("digits-cd", "onnx", {"steps": 2}, "fresh noise"),
        ("digits-boot", "onnx", {"steps": 4}, "in one call"),
        ("digits-rf", "onnx", {"head": 2}, "from 1 to 1"),
        ("digits-rf", "onnx", {"steps": 1001}, "at most 1,000"),
        ("digits-rf", "onnx", {"steps": 200}, "at most 128"),
        ("digits-rf", "onnx", {"guidance": "much"}, "guidance"),
        ("digits-rf", "diffusers-folder", {"what": "sampler"}, "what=net"),
        ("digits-rf", "onnx", {"dtype": "float16"}, "goes with to=run"),
        ("digits-rf", "run", {"dtype": "float8"}, "dtype = 'float8'"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(name, to, options, said, tmp_path):
    shown = error_of(write, Run.open(name), to, tmp_path / "out", **options)
    assert said in shown and "\n" not in shown and is_empty(tmp_path)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    said = error_of(write, Run.open("digits-boot"), "onnx", tmp_path / "out")
    assert said == "to = 'onnx' needs onnxscript: pip install onnxscript"


def test_the_command_line_exports(tmp_path, capsys):
    out = str(tmp_path / "hub")
    assert main(["export", "digits-boot", "--to", "hub-folder", "--out", out]) == 0
    assert f"{out}: hub-folder" in capsys.readouterr().out
    assert (tmp_path / "hub" / "README.md").is_file()
    assert main(["export", "digits-boot", "--to", "onxn", "--out", out]) == 2
    assert "did you mean 'onnx'?" in capsys.readouterr().err
    assert main(["export", "digits-boot", "--to", "onnx", "--stepps", "3"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("digits-dode-euler5", {}),
        ("digits-rf", {"solver": "unipc3-bh2", "steps": 6}),
        ("digits-cud-aim8-classes", {"solver": "heun", "steps": 3, "guidance": 2.0}),
        ("digits-boot", {}),
    ],
)
def test_any_fixed_sampler_leaves_as_a_scheduler_of_diffusers(tmp_path, name, choices):
    done = write(Run.open(name), "diffusers-scheduler", tmp_path / "out", **choices)
    assert done.difference <= done.tolerance
    held = json.loads((tmp_path / "out" / "scheduler_config.json").read_text())
    guided = 1 + (choices.get("guidance", 1) != 1)
    assert held["_class_name"] == "CudlabScheduler" and guided * len(held["asked"]) == done.nfe


def test_jumps_and_adaptive_steps_make_no_scheduler(tmp_path):
    for name, solver, text in (
        ("digits-meanflow", "flow-map", "a network of two times"),
        ("digits-rf", "rk45", "has no fixed recipe"),
    ):
        with pytest.raises(ValueError, match=text):
            write(Run.open(name), "diffusers-scheduler", tmp_path / name, solver=solver)
        assert not (tmp_path / name).exists()
