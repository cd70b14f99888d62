"""Somebody's networks as runs: EDM's against their own answers, diffusers' against its schedulers,
pickles read as tensors, folders that are refused, and a run that is one like any other.
"""

import copy
import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.testing import assert_close

from cudlab.borrow import SourceOptions, import_source
from cudlab.borrowed import KINDS, rebuild_network
from cudlab.catalog import list_runs
from cudlab.cli import main
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.edm import build_edm
from cudlab.edm_files import infer_edm, read_precond
from cudlab.export import export_run
from cudlab.foreign import ForeignNetwork, Reading
from cudlab.formats import ExportOptions
from cudlab.found import BorrowOptions, find_diffusers
from cudlab.gdd import GDD
from cudlab.path import PATHS
from cudlab.pickles import husk_tensors, read_pickle
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run
from cudlab.schedule import NoiseTable, kept_variance
from cudlab.solver import SOLVERS, solve
from cudlab.training import train

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

NEAR = {"rtol": 0, "atol": 1e-4}

# EDM

SONG = dict(img_resolution=16, model_channels=32, channel_mult=[1, 2], num_blocks=1)
SONG |= dict(attn_resolutions=[8], in_channels=1, out_channels=1)
LONG_FILTER = dict(embedding_type="fourier", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
EDM_NETS = {
    "ddpmpp": ("edm", SONG | {"label_dim": 3}),
    "ncsnpp": ("ve", SONG | LONG_FILTER | {"encoder_type": "residual"}),
    "skip": ("vp", SONG | LONG_FILTER | {"encoder_type": "skip", "decoder_type": "skip"}),
    "adm": (
        "iddpm",
        SONG | {"is_adm": True, "model_channels": 64, "label_dim": 3, "out_channels": 2},
    ),
}


def fill(tensors):
    "Weights by a formula, the same wherever the names and shapes are the same."
    for k, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.endswith("resample_filter"):
            continue
        waves = torch.sin(0.7 * torch.arange(tensor.numel()).double() + k)
        usual = float("norm" in name and name.endswith("weight"))
        size = 2.0 if name.endswith("freqs") else 0.1
        tensor.copy_((usual + size * waves).view(tensor.shape))


def edm_net(name):
    net = build_edm(EDM_NETS[name][1]).eval().requires_grad_(False)
    fill(net.state_dict())
    return net


@pytest.fixture(scope="module")
def reference():
    "What EDM's own classes answered with these weights, once: x, sigma, and a row for each net."
    with np.load(ROOT / "tests" / "edm_reference.npz") as saved:
        return {name: torch.from_numpy(array) for name, array in saved.items()}


@pytest.mark.parametrize("name", EDM_NETS)
def test_networks_of_the_edm_family_answer_as_their_own_classes(name, reference):
    net, labels = edm_net(name), EDM_NETS[name][1].get("label_dim")
    y = torch.eye(3) if labels else None
    answer, truth = net(reference["x"], torch.tensor([0.5, -0.7, 2.0]), y), reference[f"{name}.net"]
    assert_close(answer, truth, rtol=0, atol=1e-5 * truth.abs().max().item())
    assert infer_edm(net.state_dict()) == infer_edm(net.state_dict()) | {
        key: value for key, value in EDM_NETS[name][1].items()
    }


@pytest.mark.parametrize("name", EDM_NETS)
def test_their_preconditionings_are_readings(name, reference):
    precond, config = EDM_NETS[name]
    labels = config.get("label_dim", 0)
    reading, spec = read_precond(precond, labels)
    table = NoiseTable(kept_variance(spec)) if spec else None
    how = reading, (1, 16, 16), labels, table
    net = ForeignNetwork(edm_net(name), KINDS["EDM"], *how)
    rho, x = reference["sigma"], reference["x"]
    t = rho / (1 + rho)
    for y, key in ((torch.arange(3), "denoiser"), (None, "free")):
        if f"{name}.{key}" in reference:
            x0 = x - t[:, None, None, None] * net(x, t, y if labels else None)
            truth = reference[f"{name}.{key}"]
            assert_close(x0, truth, rtol=0, atol=3e-5 * truth.abs().max().item())


# pickles


class Persistent:
    "How classes of the family are pickled: by a function that is told their source."

    def __init__(self, name, state):
        self.meta = dict(type="class", version=6, module_src="raise SystemExit", class_name=name)
        self.meta["state"] = state

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def family(monkeypatch):
    "A module of the name that pickles of the family ask for."
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("run")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def persist(module, name="Layer", **more):
    "A module whose class, and those of all modules in it, carry their source."
    inside = {key: persist(child) for key, child in module._modules.items() if child is not None}
    kept = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    state = {key: getattr(module, key) for key in kept}
    return Persistent(name, state | {"_modules": inside} | more)


def as_checkpoint(net, precond="EDMPrecond"):
    outer = nn.Module()
    outer.model = net
    ema = persist(outer, precond, sigma_data=0.5)
    return {"ema": ema, "loss_fn": None, "epoch": np.float64(3.0), "kinds": {"a"}}


def test_a_checkpoint_is_read_as_tensors_and_nothing_of_it_is_run(family, tmp_path):
    net = edm_net("ddpmpp")
    file = tmp_path / "edm.pkl"
    file.write_bytes(pickle.dumps(as_checkpoint(net)))
    found = read_pickle(file)
    assert found["epoch"] == 3.0 and found["ema"].name == "EDMPrecond"
    tensors = husk_tensors(found["ema"])
    assert len(tensors) == len(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensors[f"model.{name}"], tensor)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil(folder):
    mark = str(folder / "was-here")
    row = torch.arange(4.0)
    return {
        "system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, f"open({mark!r}, 'w')"),
        "open": Call(open, mark, "w"),
        "getattr": Call(getattr, row, "tolist"),
        "import": Call(__import__, "os"),
        "beyond": Call(torch._utils._rebuild_tensor_v2, row.storage(), 2, (3,), (1,), False, {}),
    }


@pytest.mark.parametrize("name", ["system", "eval", "open", "getattr", "import", "beyond"])
def test_an_evil_pickle_is_refused_and_does_nothing(name, tmp_path):
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps({"ema": evil(tmp_path)[name]}))
    why = error_of(read_pickle, file)
    asked = {"system": "posix.system", "beyond": "reaches beyond its 4 numbers"}
    assert asked.get(name, f".{name}'" if name != "import" else "__import__") in why
    assert not (tmp_path / "was-here").exists()


def test_pickles_that_are_cut_or_ask_for_another_file_are_a_sentence(tmp_path):
    file = tmp_path / "cut.pkl"
    file.write_bytes(pickle.dumps(nn.Linear(9, 9))[:-40])
    assert "file = 'cut.pkl'" in error_of(read_pickle, file)

    class Outside(pickle.Pickler):
        def persistent_id(self, thing):
            return "elsewhere" if thing == 7 else None

    buffer = io.BytesIO()
    Outside(buffer).dump([7])
    file.write_bytes(buffer.getvalue())
    assert "asks for something outside the file" in error_of(read_pickle, file)


# diffusers

UNET = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=8,
)
LINEAR, COSINE = {}, {"beta_schedule": "squaredcos_cap_v2"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet(**more):
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**UNET | more).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return net


def borrow_unet(net, config, output):
    table = NoiseTable(kept_variance(config))
    low, top = table.ends
    reading = Reading(output=output, low=low, top=top)
    return ForeignNetwork(net, KINDS["UNet2DModel"], reading, (1, 8, 8), 0, table)


WAYS = {
    "DDIM": ("euler", "DDIMScheduler", dict(clip_sample=False)),
    "DDIM from the last row": (
        "euler",
        "DDIMScheduler",
        dict(clip_sample=False, timestep_spacing="trailing"),
    ),
    "Euler": ("euler", "EulerDiscreteScheduler", dict(timestep_spacing="leading")),
    "DPM++ 2": ("dpmpp-2m", "DPMSolverMultistepScheduler", dict(solver_order=2)),
    "DPM++ 3": ("dpmpp-3m", "DPMSolverMultistepScheduler", dict(solver_order=3)),
    "UniPC 2": ("unipc2-bh2", "UniPCMultistepScheduler", dict(solver_order=2)),
    "UniPC 3": ("unipc3-bh2", "UniPCMultistepScheduler", dict(solver_order=3)),
}
TRAINED = [(LINEAR, "epsilon"), (SD, "epsilon"), (LINEAR, "sample"), (COSINE, "v_prediction")]
TRAINED.append((SD | {"rescale_betas_zero_snr": True}, "v_prediction"))


@pytest.mark.parametrize("config, output", TRAINED, ids=lambda v: v if type(v) is str else "")
@pytest.mark.parametrize("way", WAYS)
def test_samples_are_those_of_diffusers_own_loop(way, config, output):
    solver, name, options = WAYS[way]
    scheduler = getattr(diffusers, name)(**config, **options, prediction_type=output)
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in scheduler.config:
        pytest.skip("this scheduler ignores the key")
    scheduler.set_timesteps(10)
    net = unet()
    rows = scheduler.timesteps.round().long()
    mine = borrow_unet(net, config, output)
    ts = torch.cat([mine.table.t[rows], torch.zeros(1)])
    x_lab = draw_noise(0, 2, (1, 8, 8))
    n = (ts[0] ** 2 + (1 - ts[0]) ** 2).sqrt()
    if ts[0] == 1 and SOLVERS[solver].needs_finite_logsnr:
        pytest.skip("at pure noise diffusers starts this one from a noise level of its own")
    # diffusers starts at deviation one in the scale of its own states
    x = x_lab * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(out, t, x).prev_sample
    walk = solve(mine, (x_lab * n).float(), ts, solver)
    assert walk.nfe == 10
    assert_close(walk.x, x, rtol=0, atol=2e-5 * x.abs().max().item())


def test_clip_is_ddim_that_clips_and_says_so_to_its_noise():
    scheduler = diffusers.DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(10)
    net = unet()
    mine = borrow_unet(net, LINEAR, "epsilon")
    mine.reading.clip = 1.0
    ts = torch.cat([mine.table.t[scheduler.timesteps], torch.zeros(1)])
    x = draw_noise(0, 2, (1, 8, 8))
    start = x * (ts[0] ** 2 + (1 - ts[0]) ** 2).sqrt()
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    assert_close(solve(mine, start.float(), ts, "euler").x, x, rtol=0, atol=2e-5)


def test_the_maps_and_roles_of_a_unet_are_those_of_its_way_down():
    net = borrow_unet(unet(), LINEAR, "epsilon")
    _, maps = net.encode(torch.randn(2, 1, 8, 8), torch.full((2,), 0.3))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8)] * 2 + [(2, 16, 4, 4), (2, 32, 4, 4)]
    roles = net.roles()
    assert set(roles.values()) == {"", "conv0", "conv1", "proj", "qkv", "skip"}
    assert set(roles) == {name for name, _ in net.named_parameters()}


# folders


def save(folder, scheduler=None, **more):
    net = unet(**more)
    diffusers.DDPMPipeline(net, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    "A folder as diffusers saves it; random weights."
    return save(tmp_path_factory.mktemp("models") / "ddpm-tiny")


def change(folder, name, **keys):
    file = folder / name
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | keys))


SCHEDULER, NETWORK = "scheduler/scheduler_config.json", "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: (f / WEIGHTS).rename((f / WEIGHTS).with_suffix(".bin")), "only pickled weights"),
        (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
        (lambda f: change(f, NETWORK, _class_name="FluxTransformer2DModel"), "FluxTransformer2D"),
        (lambda f: change(f, NETWORK, in_channels=9), "9 input channels"),
        (lambda f: change(f, NETWORK, sample_size=None), "does not say sample_size"),
        (lambda f: change(f, NETWORK, quantization_config={}), "quantised weights"),
        (lambda f: change(f, NETWORK, time_cond_proj_dim=9), "guidance is an input"),
        (lambda f: change(f, SCHEDULER, _class_name="LCMScheduler"), "a distilled network"),
        (
            lambda f: change(f, SCHEDULER, rescale_betas_zero_snr=True),
            "says nothing about the data",
        ),
        (lambda f: change(f, SCHEDULER, prediction_type="noise"), "'noise'"),
        (lambda f: change(f, SCHEDULER, beta_schedule="cosine"), "beta_schedule = 'cosine'"),
        (lambda f: (f / SCHEDULER).unlink(), "has no scheduler/scheduler_config.json"),
        (lambda f: (f / SCHEDULER).write_text("[]"), "holds no configuration"),
        (lambda f: (f / "unet" / "adapter_config.json").write_text("{}"), "an adapter"),
    ],
)
def test_folders_that_cannot_be_borrowed_are_refused_in_a_line(ddpm, tmp_path, lab, spoil, text):
    folder = tmp_path / "copy"
    shutil.copytree(ddpm, folder)
    spoil(folder)
    why = error_of(import_source, folder, SourceOptions(name="x"))
    assert text in why and "\n" not in why and len(why) < 400
    assert not [*lab.glob("*")]


def test_what_schedulers_say_is_what_a_reading_holds(tmp_path):
    folder = save(tmp_path / "v", diffusers.DDIMScheduler(prediction_type="v_prediction"))
    found = find_diffusers(folder, BorrowOptions())
    assert (found.reading.output, found.reading.clip) == ("v_prediction", 1.0)
    found = find_diffusers(folder, BorrowOptions(clip_sample=0, prediction="sample"))
    assert (found.reading.output, found.reading.clip) == ("sample", 0.0)
    for scheduler, state, solver in (
        (diffusers.EDMEulerScheduler(), "edm", "edm-heun"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "flow", "euler"),
    ):
        scheduler.save_pretrained(folder / "scheduler")
        found = find_diffusers(folder, BorrowOptions())
        assert found.reading.state == state and found.sampling["solver"] == solver


# a run


@pytest.fixture(scope="module")
def theirs(ddpm, tmp_path_factory):
    "A borrowed run, in a folder of runs of its own."
    runs = tmp_path_factory.mktemp("borrowed") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDLAB_RUNS_PATH", str(runs))
        patch.setenv("CUDLAB_DEVICE", "cpu")
        taken = import_source(ddpm, SourceOptions(name="theirs", clip_sample=1.0))
        text = str(taken).splitlines()
        assert len(text) == 5 and "UNet2DModel" in text[0] and "not checked" in text[1]
        yield taken.run


def test_it_is_a_run_like_any_other(theirs, ddpm):
    assert theirs.verify() == len(theirs.files)
    info = next(info for info in list_runs() if info.name == "theirs")
    assert (info.method, info.status) == ("borrowed", "done")
    own = theirs.sampling_defaults
    assert (own["solver"], own["steps"], own["grid"]) == ("dpmpp-2m", 10, "logsnr")
    walk = theirs.solve(index=8)
    assert walk.ts[0] == pytest.approx(80 / 81) and walk.ts[0] < theirs.top and walk.nfe == 10
    assert theirs.solve(index=1, grid="uniform").ts[0] == pytest.approx(theirs.top)
    assert walk.x.abs().max() <= 1 + 1e-5  # it clips
    alone = torch.cat([theirs.sample(index=torch.tensor([k])).x for k in range(8)])
    assert_close(alone, walk.x, rtol=0, atol=1e-4)
    inner = diffusers.UNet2DModel.from_pretrained(ddpm / "unet").state_dict()
    mine = theirs.net(device="cpu").inner.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in inner.items())


def test_the_hash_of_its_samples_is_that_of_the_import(theirs):
    from cudlab.disk import hash_bytes

    x = theirs.sample(index=8, device="cpu").x.contiguous()
    assert hash_bytes(x.numpy().tobytes()) == theirs.info["foreign"]["checked"]["samples"]


@pytest.mark.parametrize("solver", [n for n in SOLVERS if n not in ("rk45", "flow-map")])
def test_every_solver_spends_what_it_promises(theirs, solver):
    entry = SOLVERS[solver]
    walk = theirs.solve(index=1, solver=solver, steps=5, grid="logsnr")
    assert walk.nfe == entry.nfe(5)
    assert torch.isfinite(walk.x).all()


def test_what_it_cannot_do_is_a_sentence(theirs, ddpm):
    assert "this network knows one time only" in error_of(theirs.solve, solver="flow-map")
    assert "without labels" in error_of(theirs.solve, guidance=2.0)
    assert "exists" in error_of(import_source, ddpm, SourceOptions(name="theirs"))
    assert "trains nothing" in error_of(create_run, Config(method="borrowed"), "mine")
    why = error_of(import_source, ddpm, SourceOptions(name="other", data="digits"))
    assert "explains" in why


def test_a_learned_solver_is_fitted_to_it_and_sampled(theirs):
    args = dict(teacher="theirs", base="ddim", moves=4, samples=16, batches=1)
    config = Config(method="dode", data="none", args=args | {"grid": "uniform"})
    run = create_run(config, "theirs-4")
    list(train(run))
    walk = theirs.solve(index=2, solver="theirs-4")
    assert walk.nfe == 4 and walk.ts[0] == pytest.approx(theirs.top)


def test_an_edm_checkpoint_is_imported_from_the_command_line(family, tmp_path, lab, capsys):
    file = tmp_path / "edm.pkl"
    file.write_bytes(pickle.dumps(as_checkpoint(edm_net("ddpmpp"))))
    words = ["import", str(file), "--name", "edm", "--license", "CC-BY-NC-SA-4.0"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "EDM from" in text and "3 classes" in text and "CC-BY-NC-SA-4.0" in text
    run = Run.open("edm")
    assert run.solve(index=2, y=1, guidance=2.0, steps=3).nfe == 2 * 5
    assert main(["sample", "edm", "--n", "4", "--steps", "2", "--out", f"{tmp_path}/a.png"]) == 0
    assert main(["verify", "edm"]) == 0 and main(["show", "edm"]) == 0
    evil_file = tmp_path / "evil.pkl"
    evil_file.write_bytes(pickle.dumps({"ema": Call(os.system, "true")}))
    assert main(["import", str(evil_file), "--name", "y"]) == 2
    assert "asks for 'posix.system'" in capsys.readouterr().err


def test_a_forged_description_is_damage(theirs, tmp_path):
    told = theirs.info["foreign"]
    for key, value in (
        ("class", "Evil"),
        ("reading", {"output": 3}),
        ("network", {"layers_per_block": "two"}),
    ):
        with pytest.raises((ValueError, TypeError)):
            rebuild_network(told | {key: value}, (1, 8, 8))


# the way back


def scheduler_in(folder):
    spec = importlib.util.spec_from_file_location("theirs", folder / "scheduling_cudlab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CudlabScheduler.from_pretrained(folder)


@pytest.mark.parametrize(
    "choices",
    [
        {"solver": "ab2", "steps": 5, "grid": "uniform"},
        {"solver": "dpmpp-2m", "steps": 6},
        {"solver": "edm-heun", "steps": 4, "grid": "edm"},
        {"solver": "euler", "steps": 1, "grid": "uniform"},
    ],
    ids=lambda c: c["solver"],
)
def test_a_sampler_leaves_as_a_scheduler_of_diffusers(theirs, ddpm, tmp_path, choices):
    options = ExportOptions(to="diffusers-scheduler", out=str(tmp_path / "out"), **choices)
    done = export_run(theirs, options)
    scheduler = scheduler_in(tmp_path / "out")
    net = diffusers.UNet2DModel.from_pretrained(ddpm / "unet")
    pipe = diffusers.DDPMPipeline(net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    drawn = pipe(
        2,
        generator=generator.manual_seed(0),
        num_inference_steps=done.nfe,
        output_type="np",
        return_dict=False,
    )[0]
    walk = theirs.solve(index=2, device="cpu", **choices)
    start = noise / scheduler.init_noise_sigma * walk.ts[0]  # this pipeline starts at deviation one
    mine = solve(theirs.velocity(device="cpu"), start, walk.ts, choices["solver"]).x
    assert_close(torch.from_numpy(drawn)[..., 0], (mine[:, 0] / 2 + 0.5).clamp(0, 1), **NEAR)
    with pytest.raises(ValueError, match="this table has"):
        scheduler.set_timesteps(99)
    with pytest.raises(ValueError, match="cannot begin with a picture"):
        scheduler.set_begin_index(1)


# students

STUDENTS = {
    "boot": {},
    "reflow": {"pairs": 16, "moves": 4},
    "distill": {"pairs": 16, "moves": 4, "targets": "2 4"},
    "pd": {"first": 1},
    "consistency": {},
}


@pytest.fixture(scope="module")
def teacher(theirs, ddpm):
    "The same network as one of the digits, which its random weights do not explain."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cudlab.borrow.check_reading", lambda found, data: {})
        return import_source(ddpm, SourceOptions(name="teacher", data="digits")).run


def train_student(theirs, method, name, **more):
    args = dict(teacher=theirs.name) | more
    short = dict(steps=3, batch=4, warmup=1, save_every=3, net="teacher", data="digits")
    run = create_run(Config(method=method, args=args, **short), name)
    first = run.net(device="cpu").inner.state_dict()
    same = theirs.net(device="cpu").inner.state_dict()
    assert all(torch.equal(first[key], same[key]) for key in same)
    list(train(run))
    return Run.open(name)


@pytest.mark.parametrize("method", STUDENTS)
def test_students_with_its_network_start_as_it_and_are_trained(teacher, method):
    student = train_student(teacher, method, f"student-{method}", **STUDENTS[method])
    assert student.step == 3 and student.verify()
    assert student.info["foreign"]["reading"]["clip"] == 0
    before = teacher.net(device="cpu").inner.conv_in.weight
    assert not torch.equal(student.net(device="cpu").inner.conv_in.weight, before)
    walk = student.solve(index=2, device="cpu")
    assert torch.isfinite(walk.x).all() and walk.x.shape == (2, 1, 8, 8)
    assert student.top == teacher.top
    assert student.info["teacher"]["name"] == teacher.name


@pytest.mark.parametrize(
    ("method", "args", "text"),
    [
        ("meanflow", {"teacher": "teacher"}, "needs a network of 2 times: that of 'teacher' has"),
        ("shortcut", {"teacher": "teacher"}, "needs a network of 2 times"),
        ("rf", {}, "net = 'teacher' needs a teacher"),
    ],
)
def test_methods_that_need_another_network_refuse_it_in_a_line(teacher, method, args, text):
    config = Config(method=method, args=args, net="teacher", data="digits", steps=3)
    assert text in error_of(create_run, config, "never")


def test_gdd_looks_through_its_encoder_and_freezes_its_layers(theirs):
    net = theirs.net(device="cpu")
    method = GDD(teacher="theirs", width=4)
    twin = copy.deepcopy(net).requires_grad_(True)
    method.bind(twin, PATHS["linear"], 3)
    frozen = {name for name, p in twin.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith("inner.") for name in frozen)
    assert {net.roles()[name] for name in frozen} == {"conv0", "conv1", "proj"}
    x0 = torch.rand(4, 1, 8, 8) * 2 - 1
    losses = method(x0, None, Rng(0))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_copy_of_a_lab_network_needs_no_preset(lab):
    args = {"teacher": "digits-rf"}
    short = dict(steps=2, batch=4, warmup=1, save_every=2)
    run = create_run(Config(method="boot", args=args, net="teacher", **short), "copied")
    list(train(run))
    assert Run.open("copied").info["net"] == "auto"
    assert torch.isfinite(Run.open("copied").sample(index=2).x).all()
