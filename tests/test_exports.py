"""Exports and imports: each format sampled outside the lab, nothing half written, and EDM's network
against another implementation of it.
"""

import importlib.util
import json
import math
import os
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
from torch.nn import functional as F

from cudlab import export
from cudlab.cli import export_main
from cudlab.config import Config, error_of
from cudlab.export import apply_recipe, export_run, sampling_recipe
from cudlab.imports import edm_denoiser, load_foreign_weights
from cudlab.net import NETS
from cudlab.path import from_denoiser
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.training import create_run, train

for package in ("onnx", "onnxruntime", "onnxscript", "diffusers", "huggingface_hub"):
    pytest.importorskip(package)

RUNS = {
    "digits-rf": {"solver": "unipc2-bh2", "steps": 4},
    "digits-cud-heads3": {"head": 2, "steps": 3},
    "digits-cud-aim8-classes": {"guidance": 2.0, "steps": 3},
    "digits-boot": {},
    "digits-meanflow": {"steps": 2},
    "moons": {"solver": "ab2", "steps": 4},
}


@pytest.fixture(scope="session")
def moons(runs_path):
    "A run on points, trained here."
    run = create_run(Config(method="rf", data="moons", steps=40, batch=64), "export-moons")
    list(train(run))
    return Run(run.dir)


@pytest.fixture
def opened(moons):
    return lambda name: moons if name == "moons" else Run.open(name)


def nothing(folder):
    return list(folder.iterdir()) == []


# recipes


@pytest.mark.parametrize(
    "name",
    ["digits-dode-euler5", "digits-meanflow", "digits-boot", "digits-cd", "digits-gdd", "moons"],
)
def test_a_recipe_is_the_run(name, opened):
    run = opened(name)
    source, eps = run.network_run, draw_noise(3, torch.arange(5), run.shape)
    net = source.net(device="cpu")
    with torch.no_grad():
        made = apply_recipe(
            sampling_recipe(run), lambda x, t, r: net(x, t, None, *[r] * (net.times == 2)), eps
        )
    assert (made - run.solve(seed=3, index=5, device="cpu").x).abs().max() < 1e-5


def test_a_recipe_may_have_a_number_for_each_channel(moons, runs_path):
    solver = create_run(
        Config(
            method="dode",
            data="moons",
            args={
                "teacher": moons.name,
                "base": "ab2",
                "moves": 3,
                "channels": True,
                "batches": 1,
                "samples": 50,
            },
        ),
        "export-dode",
    )
    list(train(solver))
    solver = Run(solver.dir)
    rows, net = sampling_recipe(solver), moons.net(device="cpu")
    assert any(isinstance(w, list) for row in rows for w in row["weights"])
    with torch.no_grad():
        made = apply_recipe(rows, lambda x, t, r: net(x, t), draw_noise(0, torch.arange(5), (2,)))
    assert (made - solver.solve(index=5, device="cpu").x).abs().max() < 1e-5


# formats


@pytest.mark.long
def test_onnx_is_sampled_by_numpy_alone(opened, tmp_path):
    import onnxruntime

    for name, choices in RUNS.items():
        run = opened(name)
        done = export_run(run, "onnx", tmp_path / name, **choices)
        assert done.difference < 2e-5 and sorted(p.name for p in done.folder.iterdir()) == [
            "card.json",
            "model.onnx",
            "sample.py",
        ]
        card, session = (
            json.loads((done.folder / "card.json").read_text()),
            onnxruntime.InferenceSession(done.folder / "model.onnx"),
        )
        assert (
            [i.name for i in session.get_inputs()] == card["inputs"]
            and {i.shape[0] for i in session.get_inputs()} == {"batch"}
            and card["weights"]["sha256"] == run.network_hash()
        )
        for size in (1, 5):  # another seed, another number of samples, no label
            known = [draw_noise(7, torch.arange(size), run.shape).numpy()]
            for row in card["recipe"]:
                x = np.tensordot(np.array(row["weights"]), np.stack(known), 1).astype(np.float32)
                if row["t"] is not None:
                    full = {
                        "t": np.full(size, row["t"], np.float32),
                        "r": np.full(size, row["r"], np.float32),
                        "y": np.full(size, len(card["classes"])),
                    }
                    known.append(
                        session.run(None, {"x": x} | {k: full[k] for k in card["inputs"][1:]})[0]
                    )
            truth = run.solve(seed=7, index=size, device="cpu", **choices).x
            assert np.abs(x - truth.numpy()).max() < 2e-5, name


@pytest.mark.parametrize("name", list(RUNS))
def test_torch_program_draws_the_run(name, opened, tmp_path):
    run, out = opened(name), tmp_path / "out"
    assert export_run(run, "torch-export", out, **RUNS[name]).difference < 2e-5
    card, net = (
        json.loads((out / "card.json").read_text()),
        torch.export.load(out / "model.pt2").module(),
    )
    for size in (1, 3):
        x, given = (
            draw_noise(5, torch.arange(size), run.shape),
            {"t": torch.full((size,), 0.7), "y": torch.arange(size), "r": torch.full((size,), 0.2)},
        )
        given = {"x": x} | {k: given[k] for k in card["inputs"][1:]}
        true = run.network_run.net(device="cpu")
        want = true.heads(**given)[RUNS[name].get("head", 1) - 1]
        assert torch.allclose(net(*given.values()), want, atol=1e-5)


@pytest.mark.parametrize("name", list(RUNS))
def test_diffusers_pipeline_draws_the_run(name, opened, tmp_path):
    done = export_run(opened(name), "diffusers-folder", tmp_path / "out", **RUNS[name])
    assert done.difference < 2e-5 and not list(done.folder.rglob("*.bin"))


@pytest.mark.parametrize("name", list(RUNS))
def test_hub_folder_is_the_run_with_a_card(name, opened, tmp_path):
    from huggingface_hub import ModelCard

    run, out = opened(name), tmp_path / f"hub-{name}"
    done = export_run(run, "hub-folder", out, license="mit", **RUNS[name])
    card, twin = ModelCard.load(out / "README.md"), Run.open(str(out))
    assert (
        done.difference == 0 and card.data.library_name == "cudlab" and card.data.license == "mit"
    )
    assert (card.data.pipeline_tag == "unconditional-image-generation") == (len(run.shape) == 3)
    assert (
        card.text.count("| fd@") + card.text.count("fd@digits") >= len(run.scores)
        and "{" not in card.text.split("## How it was made")[0]
    )
    assert twin.verify() == 4 and twin.config == run.config and twin.scores == run.scores
    assert (
        load_foreign_weights(
            safetensors.torch.load_file(out / "model.safetensors"), fresh := run.new_network()
        )
        == "lab"
    )
    assert all(
        torch.equal(v, fresh.state_dict()[k]) for k, v in run.net(device="cpu").state_dict().items()
    )


@pytest.mark.long
def test_the_whole_sampler_as_one_graph(tmp_path):
    import onnxruntime

    done = export_run(
        Run.open("digits-rf"), "onnx", tmp_path / "a", "sampler", solver="ab2", steps=2
    )
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    x = draw_noise(9, torch.arange(6), (1, 8, 8))
    made = session.run(None, {"x": x.numpy()})[0]
    assert (
        done.difference < 2e-5
        and np.abs(
            made
            - Run.open("digits-rf")
            .solve(seed=9, index=6, solver="ab2", steps=2, device="cpu")
            .x.numpy()
        ).max()
        < 2e-5
    )
    run = Run.open("digits-cud-aim8-classes")
    done, y = (
        export_run(run, "torch-export", tmp_path / "b", "sampler", steps=1, guidance=3.0),
        torch.tensor([1, 7, 7]),
    )
    made = torch.export.load(done.folder / "model.pt2").module()(x[:3], y)
    assert done.nfe == 2 and torch.allclose(
        made, run.solve(seed=9, index=3, steps=1, guidance=3.0, y=y, device="cpu").x, atol=2e-5
    )


def test_a_learned_solver_takes_its_network_along(tmp_path):
    run = Run.open("digits-dode-euler5")
    done = export_run(run, "torch-export", tmp_path / "a")
    assert (
        done.nfe == 5
        and json.loads((tmp_path / "a" / "card.json").read_text())["weights"]["run"] == "digits-rf"
    )
    assert (
        "export that run" in error_of(export_run, run, "hub-folder", tmp_path / "b")
        and not (tmp_path / "b").exists()
    )


OTHERS = """
import json, sys
import numpy as np
import torch
sys.modules["cudlab"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
x = torch.from_numpy(np.load(sys.argv[2]))
draw = lambda **given: pipe(latents=x, output_type="latent", **given).images.numpy()
found = {"ab2": draw(solver="ab2", num_inference_steps=5), "unipc": draw(solver="unipc2-bh2", num_inference_steps=4, grid="logsnr"),
         "label": draw(class_labels=torch.full((len(x),), 3), num_inference_steps=2, guidance_scale=1.5)}
np.savez(sys.argv[3], **found)
images = pipe(3, generator=torch.Generator().manual_seed(0)).images
assert len(images) == 3 and images[0].size == (8, 8)
try:
    pipe(solver="ab3x")
except ValueError as e:
    assert "did you mean 'ab3'" in str(e)
else:
    sys.exit("a wrong solver was taken")
"""


@pytest.mark.long
def test_diffusers_pipeline_knows_the_solvers(tmp_path):
    run = Run.open("digits-cud-aim8-classes")
    export_run(run, "diffusers-folder", tmp_path / "out")
    np.save(tmp_path / "noise.npy", draw_noise(2, torch.arange(4), run.shape).numpy())
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            OTHERS,
            tmp_path / "out",
            tmp_path / "noise.npy",
            tmp_path / "made.npz",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = np.load(tmp_path / "made.npz")
    for key, choices in (
        ("ab2", {"solver": "ab2", "steps": 5}),
        ("unipc", {"solver": "unipc2-bh2", "steps": 4, "grid": "logsnr"}),
        ("label", {"steps": 2, "guidance": 1.5, "y": 3}),
    ):
        assert (
            np.abs(made[key] - run.solve(seed=2, index=4, device="cpu", **choices).x.numpy()).max()
            < 2e-5
        ), key


# what is refused, and what is left behind


def test_an_export_that_disagrees_is_not_kept(moons, monkeypatch, tmp_path):
    def spoilt(change):
        def write(run, graph, card, folder):
            with torch.no_grad():
                change(graph.net.outs[0].bias)
            export.write_torch(run, graph, card, folder)

        return write

    for change in (lambda b: b.add_(1e-3), lambda b: b.fill_(math.nan)):
        monkeypatch.setitem(export.FORMATS, "torch-export", spoilt(change))
        assert "draws other samples than the run" in error_of(
            export_run, moons, "torch-export", tmp_path / "out"
        )
        assert nothing(tmp_path)
    monkeypatch.setitem(
        export.FORMATS,
        "torch-export",
        lambda run, graph, card, folder: (folder / "sample.py").write_text("import cudlab"),
    )
    assert "does not run without the lab" in error_of(
        export_run, moons, "torch-export", tmp_path / "out"
    ) and nothing(tmp_path)


def test_an_interrupted_export_leaves_nothing(monkeypatch, tmp_path):
    def stop(run, graph, card, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(export.FORMATS, "onnx", stop)
    assert export_main(
        "export", ["digits-boot", "to=onnx", f"out={tmp_path / 'out'}"]
    ) == 3 and nothing(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_export_never_has_its_name(how, tmp_path):
    job = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cudlab.cli",
            "export",
            "digits-boot",
            "--to",
            "onnx",
            "--out",
            tmp_path / "out",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while nothing(tmp_path) and job.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert not nothing(tmp_path) and not (tmp_path / "out").exists()
        job.send_signal(how)
        code = job.wait(60)
    finally:
        job.kill()
    assert not (tmp_path / "out").exists()
    if how == signal.SIGTERM:
        assert code == 3 and nothing(tmp_path)


def test_targets_that_cannot_be_written(tmp_path, monkeypatch):
    run = Run.open("digits-boot")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "file", "link"):
        assert "exists; name a new folder" in error_of(
            export_run, run, "hub-folder", tmp_path / name
        )
    assert (tmp_path / "file").read_text() == "mine"
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        assert "cannot be written" in error_of(export_run, run, "hub-folder", out)
    monkeypatch.chdir(tmp_path)
    assert (
        export_run(run, "hub-folder", Path("new", "out")).folder == tmp_path / "new" / "out"
    )  # parents are made
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # root may write anywhere
        assert "Permission denied" in error_of(export_run, run, "hub-folder", closed / "out")


@pytest.mark.parametrize(
    "words, said",
    [
        (["digits-rf", "--to", "onxn"], "did you mean 'onnx'?"),
        (["digits-rf"], "to = '' names no format"),
        (["digits-rf", "to=hub-foldr"], "did you mean 'hub-folder'?"),
        (["digits-rv", "to=onnx"], "did you mean 'digits-rf'?"),
        (["digits-rf", "to=onnx", "solver=euller"], "did you mean 'euler'?"),
        (["digits-rf", "to=onnx", "solver=rk45"], "sample by sample"),
        (["digits-cd", "to=onnx", "steps=2"], "fresh noise"),
        (["digits-boot", "to=onnx", "steps=4"], "in one call"),
        (["digits-rf", "to=onnx", "head=2"], "from 1 to 1"),
        (["digits-rf", "to=onnx", "steps=1001"], "at most 1,000"),
        (["digits-rf", "to=onnx", "steps=200"], "at most 128"),
        (["digits-rf", "to=onnx", "guidance=much"], "guidance"),
        (["digits-rf", "to=diffusers-folder", "what=sampler"], "what=net"),
        (["digits-rf", "--to"], "needs a value"),
        (["digits-rf", "to=onnx", "to=onnx"], "given twice"),
        (["digits-rf", "to=onnx", "stepps=3"], "did you mean 'steps'?"),
    ],
)
def test_export_words(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert (
        export_main(
            "export",
            [*words, f"out={tmp_path / 'out'}"] if words != ["digits-rf", "--to"] else words,
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert (
        said in shown
        and shown.startswith("error: ")
        and shown.count("\n") == 1
        and nothing(tmp_path)
    )


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    true = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else true(name)
    )
    assert (
        error_of(export_run, Run.open("digits-boot"), "onnx", tmp_path / "out")
        == "to = 'onnx' needs onnxscript: pip install onnxscript"
    )


def test_the_shell_exports(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cudlab.cli", "export", "digits-boot", "--to=hub-folder"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "CUDLAB_CHECKPOINTS_PATH": str(ROOT / "checkpoints")},
    )
    assert done.returncode == 0, done.stderr
    assert (
        "digits-boot-hub-folder: hub-folder" in done.stdout
        and (tmp_path / "digits-boot-hub-folder" / "README.md").is_file()
    )
    assert export_main("export", []) == 0 and export_main("import", ["--help"]) == 0


# the way back


def test_a_hub_folder_comes_back_as_a_run(tmp_path, runs_path, capsys):
    run = Run.open("digits-boot")
    export_run(run, "hub-folder", tmp_path / "hub")
    assert export_main("import", [str(tmp_path / "hub"), "as=back"]) == 0
    back = Run.open("back")
    assert (
        back.dir == runs_path / "back"
        and back.scores == run.scores
        and torch.equal(back.solve(index=3, device="cpu").x, run.solve(index=3, device="cpu").x)
    )
    assert (
        export_main("import", [str(tmp_path / "hub"), "as=back"]) == 2
        and "exists" in capsys.readouterr().err
    )
    assert (
        export_main("import", [str(tmp_path / "hub"), "as=../out"]) == 2
        and export_main("import", [str(tmp_path / "hub"), "as=digits-rf"]) == 2
    )
    weights = tmp_path / "hub" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert (
        export_main("import", [str(tmp_path / "hub"), "as=other"]) == 5
        and not (runs_path / "other").exists()
    )
    assert not [p for p in runs_path.iterdir() if p.name.startswith(".import")]


class Song(dict):
    """EDM's DDPM++ network written from its description (2206.00364, appendix F): a dict of tensors
    that come into being where the forward pass first asks for them.
    """

    def __init__(self, channels, size, width, mult, blocks, attention):
        super().__init__()
        self.plan, self.rng = (
            (channels, size, width, mult, blocks, attention),
            torch.Generator().manual_seed(1),
        )

    def get(self, name, *shape):
        if name not in self:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 9
            self[name] = torch.randn(shape, generator=self.rng) / math.sqrt(fan) + (
                ".norm" in name or "_norm" in name
            ) * name.endswith("weight")
        return self[name]

    def conv(self, name, x, cout, size=3):
        return F.conv2d(
            x,
            self.get(f"{name}.weight", cout, x.shape[1], size, size),
            self.get(f"{name}.bias", cout),
            padding=size // 2,
        )

    def dense(self, name, x, cout):
        return x @ self.get(f"{name}.weight", cout, x.shape[1]).T + self.get(f"{name}.bias", cout)

    def norm(self, name, x):
        groups = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (
            groups.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        return (
            groups.reshape(x.shape) * self.get(f"{name}.weight", x.shape[1])[:, None, None]
            + self.get(f"{name}.bias", x.shape[1])[:, None, None]
        )

    def block(self, name, x, emb, cout, way="", attention=False):
        def scaled(h):
            if way == "down":
                return (
                    h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]
                ) / 4
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if way == "up" else h

        h = self.conv(f"{name}.conv0", scaled(F.silu(self.norm(f"{name}.norm0", x))), cout)
        h = F.silu(
            self.norm(
                f"{name}.norm1", h + self.dense(f"{name}.affine", emb, cout)[:, :, None, None]
            )
        )
        h = self.conv(f"{name}.conv1", h, cout)
        x = (
            h + (self.conv(f"{name}.skip", scaled(x), cout, 1) if way or x.shape[1] != cout else x)
        ) * 0.5**0.5
        if attention:
            q, k, v = (
                self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * cout, 1)
                .reshape(len(x), cout, 3, -1)
                .unbind(2)
            )  # (B, C, pixels)
            w = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(cout)).softmax(2)
            x = (
                x
                + self.conv(
                    f"{name}.proj", torch.einsum("bqk,bck->bcq", w, v).reshape(x.shape), cout, 1
                )
            ) * 0.5**0.5
        return x

    def inside(self, x, c_noise):
        channels, size, width, mult, blocks, attention = self.plan
        angle = c_noise[:, None] * 10000 ** -(torch.arange(width // 2) / (width // 2 - 1))
        emb = F.silu(self.dense("map_layer0", torch.cat([angle.sin(), angle.cos()], 1), 4 * width))
        emb = F.silu(self.dense("map_layer1", emb, 4 * width))
        x = self.conv(f"enc.{size}x{size}_conv", x, width)
        skips = [x]
        for level, m in enumerate(mult):
            side = size >> level
            if level:
                x = self.block(f"enc.{side}x{side}_down", x, emb, x.shape[1], "down")
                skips.append(x)
            for i in range(blocks):
                x = self.block(
                    f"enc.{side}x{side}_block{i}", x, emb, m * width, attention=side in attention
                )
                skips.append(x)
        x = self.block(f"dec.{side}x{side}_in0", x, emb, x.shape[1], attention=True)
        x = self.block(f"dec.{side}x{side}_in1", x, emb, x.shape[1])
        for level, m in reversed(list(enumerate(mult))):
            side = size >> level
            if level < len(mult) - 1:
                x = self.block(f"dec.{side}x{side}_up", x, emb, x.shape[1], "up")
            for i in range(blocks + 1):
                x = self.block(
                    f"dec.{side}x{side}_block{i}",
                    torch.cat([x, skips.pop()], 1),
                    emb,
                    m * width,
                    attention=i == blocks and side in attention,
                )
        return self.conv(
            f"dec.{size}x{size}_aux_conv",
            F.silu(self.norm(f"dec.{size}x{size}_aux_norm", x)),
            channels,
        )

    def denoise(self, y, sigma):
        "c_skip y + c_out F(c_in y, ln(sigma) / 4) with sigma_data = 1/2, table 1 of the paper."
        s = sigma[:, None, None, None]
        total = s**2 + 0.25
        return 0.25 / total * y + s * 0.5 / total.sqrt() * self.inside(
            y / total.sqrt(), sigma.log() / 4
        )


def song(preset, shape, *plan):
    "An EDM network, the tensors of its checkpoint, and the lab's network for them."
    net = Song(shape[0], shape[1], *plan)
    net.inside(torch.zeros(1, *shape), torch.zeros(1))
    extra = {"map_augment.weight": torch.randn(plan[0], 9)} | {
        f"{k.removesuffix('.weight')}.resample_filter": torch.full((1, 1, 2, 2), 0.25)
        for k in net
        if ("_up" in k or "_down" in k) and ".conv0.weight" in k
    }
    return (
        net,
        {f"model.{k}": v.clone() for k, v in (dict(net) | extra).items()},
        NETS[preset](shape).eval(),
    )


@pytest.mark.parametrize(
    "preset, shape, plan",
    [
        ("digits", (1, 8, 8), (32, (1, 1, 1), 1, ())),
        ("mnist", (3, 16, 16), (32, (2, 2, 2), 2, (16,))),
    ],
)
def test_edm_network_maps_one_to_one(preset, shape, plan):
    theirs, tensors, net = song(preset, shape, *plan)
    assert load_foreign_weights(tensors, net) == "edm"
    D, y = edm_denoiser(net), draw_noise(0, torch.arange(3), shape)
    for sigma in (0.002, 0.3, 5.0, 80.0):
        sigmas = torch.tensor([sigma, 1.7 * sigma, sigma])
        with torch.no_grad():
            want = theirs.denoise(y * (1 + sigma), sigmas)
            assert (D(y * (1 + sigma), sigmas) - want).abs().max() < 2e-4 * want.abs().max(), sigma
            f = from_denoiser(theirs.denoise)(y, sigmas / (1 + sigmas))
            assert torch.allclose(
                from_denoiser(D)(y, sigmas / (1 + sigmas)), f, atol=2e-3 * f.abs().max()
            )
    tensors["model.map_layer0.weight"] = -tensors["model.map_layer0.weight"]
    load_foreign_weights(tensors, net)
    with torch.no_grad():
        assert (edm_denoiser(net)(y, sigmas) - theirs.denoise(y, sigmas)).abs().max() > 0.01


def test_edm_weights_begin_a_training(tmp_path, runs_path, capsys):
    _, tensors, net = song("digits", (1, 8, 8), 32, (1, 1, 1), 1, ())
    safetensors.torch.save_file(tensors, tmp_path / "edm.safetensors")
    words = ["data=digits", "steps=3", "batch=8"]
    assert export_main("import", [str(tmp_path / "edm.safetensors"), "as=edm-start", *words]) == 0
    said = capsys.readouterr().out
    run = Run.open("edm-start")
    assert (
        run.step == 0
        and run.info["imported"]["names"] == "edm"
        and "cudlab train name=edm-start method=rf data=digits steps=3 batch=8" in said
        and run.verify() == 4
    )
    load_foreign_weights(tensors, net)
    assert all(
        torch.equal(v, net.state_dict()[k]) for k, v in run.net(device="cpu").state_dict().items()
    )
    assert (
        "done" in list(train(create_run(run.config, run.name)))[-1]
        and Run.open("edm-start").step == 3
    )
    assert (
        export_main(
            "import", [str(tmp_path / "edm.safetensors"), "as=edm-jumps", "method=shortcut", *words]
        )
        == 0
        and Run.open("edm-jumps").step == 0
    )  # a network of two times
    assert export_main("import", [str(tmp_path / "edm.safetensors"), "as=edm-start", *words]) == 2
    assert not list(runs_path.glob("*.part"))


def test_files_that_do_not_fit(tmp_path, runs_path, capsys):
    from diffusers import UNet2DModel

    _, tensors, net = song("digits", (1, 8, 8), 32, (1, 1, 1), 1, ())
    plain = UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    files = {
        "lacks": (
            {k: v for k, v in tensors.items() if "qkv" not in k},
            "it lacks dec.2x2_in0.qkv.weight, dec.2x2_in0.qkv.bias;",
        ),
        "extra": (
            tensors | {"model.enc.8x8_block7.conv0.weight": torch.zeros(1)},
            "nothing takes its enc.8x8_block7.conv0.weight;",
        ),
        "shape": (
            tensors | {"model.enc.8x8_conv.weight": torch.zeros(64, 1, 3, 3)},
            "shapes differ: enc.8x8_conv.weight (64, 1, 3, 3) instead of (32, 1, 3, 3)",
        ),
        "ncsn": (
            {
                k: torch.full((1, 1, 4, 4), 1 / 16) if "filter" in k else v
                for k, v in tensors.items()
            },
            "NCSN++",
        ),
        "label": (tensors | {"model.map_label.weight": torch.zeros(32, 10)}, "class-conditional"),
        "diffusers": (plain.state_dict(), "UNet2DModel"),
        "other": (
            {"a": torch.zeros(1)},
            "it lacks condition.map0.weight, condition.map0.bias, condition.map1.weight and ",
        ),
    }
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for name, (content, said) in files.items():
        safetensors.torch.save_file(
            {k: v.contiguous() for k, v in content.items()}, tmp_path / f"{name}.safetensors"
        )
        assert (
            export_main(
                "import", [str(tmp_path / f"{name}.safetensors"), "as=wrong", "data=digits"]
            )
            == 2
        )
        shown = capsys.readouterr().err
        assert said in shown and shown.count("\n") == 1, shown
        assert said in error_of(load_foreign_weights, content, net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.save(tensors, tmp_path / "net.pkl")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name, said in (
        ("net.pkl", "pickles"),
        ("empty.safetensors", "not a safetensors file"),
        ("none.safetensors", "there is no file"),
    ):
        assert (
            export_main("import", [str(tmp_path / name), "as=wrong", "data=digits"]) == 2
            and said in capsys.readouterr().err
        )
    file = str(tmp_path / "lacks.safetensors")
    for words, said in (
        ([file, "data=digits"], "as = ''"),
        ([file, "as=wrong"], "data = ''"),
        ([file, "as=wrong", "data=digits", "stebs=3"], "did you mean 'steps'?"),
        ([file, "as=wrong", "data=moons"], "for points"),
        ([str(ROOT / "checkpoints" / "digits-rf"), "as=wrong", "data=digits"], "as=NAME alone"),
        ([file, "as=wrong", "data=digits", "method=dode"], "trains no network"),
    ):
        assert export_main("import", words) in (2, 5) and said in capsys.readouterr().err, words
    assert not (runs_path / "wrong").exists() and not list(runs_path.glob("*.part"))


@pytest.mark.long
def test_edm_cifar_network_has_a_place():
    "The published size: 55.7 M numbers, every one of them placed."
    _, tensors, net = song("cifar10", (3, 32, 32), 128, (2, 2, 2), 4, (16,))
    assert (
        load_foreign_weights(tensors, net) == "edm"
        and 55e6 < sum(p.numel() for p in net.parameters()) < 57e6
    )
