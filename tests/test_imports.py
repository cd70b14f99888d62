"""Imports: a hub folder comes back, and EDM's network against another implementation of it."""

import contextlib
import math
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from torch.nn import functional as F

from cudlab.cli import main
from cudlab.config import Config, error_of, from_dict
from cudlab.create import create_run
from cudlab.export import export_run
from cudlab.formats import ExportOptions
from cudlab.imports import ImportOptions, edm_denoiser, import_path, load_foreign_weights
from cudlab.net import NETS
from cudlab.path import from_denoiser
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.training import train


class Song(dict):
    """EDM's DDPM++ network written from its description (2206.00364, appendix F): a dict of tensors
    that come into being where the forward pass first asks for them.
    """

    def __init__(self, channels, size, width, mult, blocks, attention):
        super().__init__()
        self.plan = (channels, size, width, mult, blocks, attention)
        self.rng = torch.Generator().manual_seed(1)

    def get(self, name, *shape):
        if name not in self:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 9
            numbers = torch.randn(shape, generator=self.rng) / math.sqrt(fan)
            scale = name.endswith("norm.weight") or (".norm" in name and name.endswith("weight"))
            self[name] = numbers + 1 if scale else numbers
        return self[name]

    def conv(self, name, x, cout, size=3):
        weight = self.get(f"{name}.weight", cout, x.shape[1], size, size)
        return F.conv2d(x, weight, self.get(f"{name}.bias", cout), padding=size // 2)

    def dense(self, name, x, cout):
        return x @ self.get(f"{name}.weight", cout, x.shape[1]).T + self.get(f"{name}.bias", cout)

    def norm(self, name, x):
        groups = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
        centred = groups - groups.mean(-1, keepdim=True)
        groups = centred / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        weight, bias = (self.get(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        return groups.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]

    def attend(self, name, x):
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * x.shape[1], 1)
        q, k, v = qkv.reshape(len(x), x.shape[1], 3, -1).unbind(2)  # (B, C, pixels)
        w = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(x.shape[1])).softmax(2)
        mixed = torch.einsum("bqk,bck->bcq", w, v).reshape(x.shape)
        return (x + self.conv(f"{name}.proj", mixed, x.shape[1], 1)) * 0.5**0.5

    def block(self, name, x, emb, cout, way="", attention=False):
        def scaled(h):
            if way == "down":
                corners = [h[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
                return sum(corners) / 4
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if way == "up" else h

        h = self.conv(f"{name}.conv0", scaled(F.silu(self.norm(f"{name}.norm0", x))), cout)
        shift = self.dense(f"{name}.affine", emb, cout)[:, :, None, None]
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", h + shift)), cout)
        if way or x.shape[1] != cout:
            x = self.conv(f"{name}.skip", scaled(x), cout, 1)
        x = (h + x) * 0.5**0.5
        return self.attend(name, x) if attention else x

    def embed(self, c_noise, width):
        angle = c_noise[:, None] * 10000 ** -(torch.arange(width // 2) / (width // 2 - 1))
        emb = F.silu(self.dense("map_layer0", torch.cat([angle.sin(), angle.cos()], 1), 4 * width))
        return F.silu(self.dense("map_layer1", emb, 4 * width))

    def inside(self, x, c_noise):
        channels, size, width, mult, blocks, attention = self.plan
        emb = self.embed(c_noise, width)
        x = self.conv(f"enc.{size}x{size}_conv", x, width)
        skips = [x]
        for level, m in enumerate(mult):
            side = size >> level
            here = side in attention
            if level:
                x = self.block(f"enc.{side}x{side}_down", x, emb, x.shape[1], "down")
                skips.append(x)
            for i in range(blocks):
                x = self.block(f"enc.{side}x{side}_block{i}", x, emb, m * width, attention=here)
                skips.append(x)
        x = self.block(f"dec.{side}x{side}_in0", x, emb, x.shape[1], attention=True)
        x = self.block(f"dec.{side}x{side}_in1", x, emb, x.shape[1])
        for level, m in reversed(list(enumerate(mult))):
            side = size >> level
            if level < len(mult) - 1:
                x = self.block(f"dec.{side}x{side}_up", x, emb, x.shape[1], "up")
            for i in range(blocks + 1):
                here = i == blocks and side in attention
                both = torch.cat([x, skips.pop()], 1)
                x = self.block(f"dec.{side}x{side}_block{i}", both, emb, m * width, attention=here)
        last = F.silu(self.norm(f"dec.{size}x{size}_aux_norm", x))
        return self.conv(f"dec.{size}x{size}_aux_conv", last, channels)

    def denoise(self, y, sigma):
        "c_skip y + c_out F(c_in y, ln(sigma) / 4) with sigma_data = 1/2, table 1 of the paper."
        s = sigma[:, None, None, None]
        total = s**2 + 0.25
        inside = self.inside(y / total.sqrt(), sigma.log() / 4)
        return 0.25 / total * y + s * 0.5 / total.sqrt() * inside


def song(preset, shape, *plan):
    "An EDM network, the tensors of its checkpoint, and the lab's network for them."
    net = Song(shape[0], shape[1], *plan)
    net.inside(torch.zeros(1, *shape), torch.zeros(1))
    tensors = dict(net) | {"map_augment.weight": torch.randn(plan[0], 9)}
    for name in net:
        if ("_up" in name or "_down" in name) and name.endswith(".conv0.weight"):
            name = f"{name.removesuffix('.weight')}.resample_filter"
            tensors[name] = torch.full((1, 1, 2, 2), 0.25)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in tensors.items()}
    return net, tensors, NETS[preset](shape).eval()


def take(path, name, **params):
    return import_path(path, from_dict(ImportOptions, {"name": name} | params)).run


@pytest.fixture
def hub(moons, tmp_path):
    pytest.importorskip("huggingface_hub")
    return export_run(moons, ExportOptions(to="hub-folder", out=str(tmp_path / "hub"))).folder


@pytest.fixture
def digits():
    "A small EDM network for digits: itself, its tensors, the lab's network for them."
    return song("digits", (1, 8, 8), 32, (1, 1, 1), 1, ())


@pytest.fixture
def edm_file(digits, tmp_path):
    safetensors.torch.save_file(digits[1], tmp_path / "edm.safetensors")
    return tmp_path / "edm.safetensors"


@pytest.fixture
def moons(runs_path):
    "A run on points, trained here."
    run = create_run(Config(method="rf", data="moons", steps=5, batch=8), "import-moons")
    list(train(run))
    return Run(run.dir)


def test_a_hub_folder_comes_back_as_a_run(moons, hub, runs_path):
    back = take(hub, "back")
    assert back.dir == runs_path / "back" and Run.open("back").scores == moons.scores
    there = moons.solve(index=3, device="cpu").x
    assert torch.equal(back.solve(index=3, device="cpu").x, there)
    assert not (back.dir / "README.md").exists() and not (back.dir / "model.safetensors").exists()
    assert "exists" in error_of(take, hub, "back")
    assert "is not a folder name" in error_of(take, hub, "../out")
    assert "ships with the lab" in error_of(take, hub, "digits-rf")
    weights = next(hub.rglob("ema.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "is damaged" in error_of(take, hub, "other")
    assert not (runs_path / "other").exists()
    assert not [path for path in runs_path.iterdir() if path.name.startswith(".import-")]


def test_a_link_in_a_hub_folder_is_not_followed(hub, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (hub / "train.ipynb").symlink_to(tmp_path / "secret")
    assert not (take(hub, "without-link").dir / "train.ipynb").exists()


@pytest.mark.parametrize("file", ["config.json", "ema.safetensors"])
def test_a_run_whose_files_are_links_is_not_copied(hub, tmp_path, runs_path, file):
    place = next(hub.rglob(file))
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert "is missing" in error_of(take, hub, "linked")
    assert not (runs_path / "linked").exists() and not list(runs_path.glob(".import-*"))


def test_what_a_killed_import_left_goes_with_the_next(hub, runs_path):
    (runs_path / ".import-old" / "made").mkdir(parents=True)
    (runs_path / ".import-old" / "made" / "config.json").write_text("{}")
    take(hub, "after-a-kill")
    assert not list(runs_path.glob(".import-*"))


def test_an_import_touches_no_other_run(digits, edm_file, runs_path):
    _, tensors, _ = digits
    config = Config(method="rf", data="digits", steps=2, batch=8)
    other = create_run(config, "mine.part")
    before = {path: path.read_bytes() for path in other.dir.rglob("*") if path.is_file()}
    for file in (edm_file, other.dir / "nothing.safetensors"):
        with contextlib.suppress(ValueError):
            take(file, "mine", data="digits", steps=2, batch=8)
    assert {path: path.read_bytes() for path in other.dir.rglob("*") if path.is_file()} == before
    assert Run.open("mine").info["imported"] and "imported" not in other.info


@pytest.mark.parametrize(
    "preset, shape, plan",
    [
        ("digits", (1, 8, 8), (32, (1, 1, 1), 1, ())),
        pytest.param("mnist", (3, 16, 16), (32, (2, 2, 2), 2, (16,)), marks=pytest.mark.long),
    ],
)
def test_edm_network_maps_one_to_one(preset, shape, plan):
    theirs, tensors, net = song(preset, shape, *plan)
    assert load_foreign_weights(tensors, net) == "edm"
    D, y = edm_denoiser(net), draw_noise(0, torch.arange(3), shape)
    for sigma in (0.002, 0.3, 5.0, 80.0):
        sigmas = torch.tensor([sigma, 1.7 * sigma, sigma])
        t = sigmas / (1 + sigmas)
        with torch.no_grad():
            want = theirs.denoise(y * (1 + sigma), sigmas)
            assert (D(y * (1 + sigma), sigmas) - want).abs().max() < 2e-4 * want.abs().max(), sigma
            f = from_denoiser(theirs.denoise)(y, t)
            assert torch.allclose(from_denoiser(D)(y, t), f, atol=2e-3 * f.abs().max())
    tensors["model.map_layer0.weight"] = -tensors["model.map_layer0.weight"]
    load_foreign_weights(tensors, net)
    with torch.no_grad():
        assert (edm_denoiser(net)(y, sigmas) - theirs.denoise(y, sigmas)).abs().max() > 0.01


def test_edm_weights_begin_a_training(digits, edm_file, runs_path):
    _, tensors, net = digits
    run = take(edm_file, "edm-start", data="digits", steps=2, batch=8)
    assert run.step == 0 and run.info["imported"]["names"] == "edm" and run.verify()
    load_foreign_weights(tensors, net)
    weights = run.net(device="cpu").state_dict()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in weights.items())
    list(train(create_run(run.config, run.name)))
    assert Run.open("edm-start").step == 2
    jumps = take(edm_file, "edm-jumps", data="digits", method="shortcut")
    assert jumps.step == 0  # a network of two times
    assert "exists" in error_of(take, edm_file, "edm-start", data="digits")
    assert not list(runs_path.glob(".import-*"))


def misfits(tensors):
    "Files that do not fit: name -> (tensors, what is said)."
    filters = [name for name in tensors if "filter" in name]
    return {
        "lacks": (
            {k: v for k, v in tensors.items() if "qkv" not in k},
            "it lacks dec.2x2_in0.qkv.weight, dec.2x2_in0.qkv.bias",
        ),
        "extra": (
            tensors | {"model.enc.8x8_block7.conv0.weight": torch.zeros(1)},
            "nothing takes its enc.8x8_block7.conv0.weight",
        ),
        "shape": (
            tensors | {"model.enc.8x8_conv.weight": torch.zeros(64, 1, 3, 3)},
            "shapes differ: enc.8x8_conv.weight (64, 1, 3, 3) instead of (32, 1, 3, 3)",
        ),
        "ncsn": (tensors | dict.fromkeys(filters, torch.full((1, 1, 4, 4), 1 / 16)), "NCSN++"),
        "label": (tensors | {"model.map_label.weight": torch.zeros(32, 10)}, "class-conditional"),
        "diffusers": ({"conv_in.weight": torch.zeros(8, 1, 3, 3)}, "UNet2DModel"),
        "other": (
            {"a": torch.zeros(1)},
            "it lacks condition.map0.weight, condition.map0.bias, condition.map1.weight and ",
        ),
    }


WRAPPED = {
    "ddp": "module.{}",
    "compiled": "_orig_mod.{}",
    "both": "_orig_mod.module.{}",
    "inside": "model.{}",
    "average": "ema_model.module.{}",
    "pipeline": "unet.net.{}",
}


@pytest.mark.parametrize("pattern", WRAPPED.values(), ids=list(WRAPPED))
@pytest.mark.parametrize("kind", ["lab", "edm"])
def test_the_words_of_wrappers_are_taken_off(digits, pattern, kind):
    _, tensors, net = digits
    load_foreign_weights(tensors, net)
    names = {"lab": net.state_dict(), "edm": {k[len("model.") :]: v for k, v in tensors.items()}}
    wrapped = {pattern.format(k): v for k, v in names[kind].items()}
    fresh = NETS["digits"]((1, 8, 8))
    assert load_foreign_weights(wrapped | {"n_averaged": torch.tensor(7)}, fresh) == kind
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_a_layer_that_was_compiled_alone_is_found_too(digits):
    net = digits[2]
    names = {k.replace("down.", "down._orig_mod."): v for k, v in net.state_dict().items()}
    assert names.keys() != net.state_dict().keys() and load_foreign_weights(names, net) == "lab"


def test_a_file_of_two_networks_is_not_guessed_at(digits):
    net = digits[2]
    both = {f"{p}{k}": v for p in ("model.", "ema_model.") for k, v in net.state_dict().items()}
    said = "the file holds 2 networks, ema_model and model; keep the tensors of one"
    assert error_of(load_foreign_weights, both, net) == said
    twice = {f"{p}{k}": v for p in ("module.", "") for k, v in net.state_dict().items()}
    assert "twice, with and without a wrapper" in error_of(load_foreign_weights, twice, net)


def test_names_that_differ_are_told_apart_from_shapes_that_do(digits):
    net, own = digits[2], digits[2].state_dict()
    renamed = {k.replace("condition.", "cond."): v for k, v in own.items()}
    said = error_of(load_foreign_weights, renamed, net)
    assert (
        "it lacks condition.map0.weight, condition.map0.bias, condition.map1.weight and 1 " in said
    )
    assert "nothing takes its cond.map0.weight, cond.map0.bias, cond.map1.weight and 1 " in said
    assert "net=" not in said
    said = error_of(load_foreign_weights, own, NETS["digits"]((3, 8, 8)))
    assert "first.weight (32, 1, 3, 3) instead of (32, 3, 3, 3)" in said
    assert said.endswith("; the names fit, so another net= or data= may")


def test_weights_that_do_not_fit_change_nothing(digits, tmp_path, runs_path):
    _, tensors, net = digits
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for content, said in misfits(tensors).values():
        shown = error_of(load_foreign_weights, content, net)
        assert said in shown and "\n" not in shown
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    content, said = misfits(tensors)["lacks"]
    safetensors.torch.save_file(content, tmp_path / "lacks.safetensors")
    assert said in error_of(take, tmp_path / "lacks.safetensors", "wrong", data="digits")
    assert not list(runs_path.glob("wrong*"))


def test_diffusers_network_is_refused(digits):
    diffusers = pytest.importorskip("diffusers")
    plain = diffusers.UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    assert "UNet2DModel" in error_of(load_foreign_weights, plain.state_dict(), digits[2])


def test_what_cannot_be_imported_is_said_in_a_line(digits, edm_file, tmp_path, runs_path):
    torch.save(digits[1], tmp_path / "net.pkl")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "card.json").write_text("{}")
    data = {"data": "digits"}
    for path, name, params, said in (
        ("net.pkl", "wrong", data, "pickles"),
        ("empty.safetensors", "wrong", data, "not a safetensors file"),
        ("none.safetensors", "wrong", data, "there is no file"),
        ("onnx", "wrong", {}, "without the lab"),
        (edm_file, "", data, "name = ''"),
        (edm_file, "wrong", {}, "data = ''"),
        (edm_file, "wrong", data | {"stebs": 3}, "did you mean 'steps'?"),
        (edm_file, "wrong", {"data": "moons"}, "for points"),
        (edm_file, "wrong", data | {"method": "dode"}, "trains no network"),
        (ROOT / "checkpoints" / "digits-rf", "wrong", data, "its name alone"),
    ):
        shown = error_of(take, tmp_path / path, name, **params)
        assert said in shown and "\n" not in shown
    assert not list(runs_path.glob("wrong*"))


def test_the_command_line_imports(edm_file, capsys):
    words = ["import", str(edm_file), "--name", "edm-shell", "--data", "digits", "--steps", "3"]
    assert main(words) == 0 and "edm-shell" in capsys.readouterr().out
    assert Run.open("edm-shell").num_steps == 3
    assert main(words) == 2 and "exists" in capsys.readouterr().err


@pytest.mark.long
def test_edm_cifar_network_has_a_place():
    "The published size: 55.7 M numbers, every one of them placed."
    _, tensors, net = song("cifar10", (3, 32, 32), 128, (2, 2, 2), 4, (16,))
    assert load_foreign_weights(tensors, net) == "edm"
    assert 55e6 < sum(p.numel() for p in net.parameters()) < 57e6
