"""The way back to diffusers: students as plain networks, pipelines, stock schedulers told the
times, and programs of somebody's network. Random weights; loops written out here.
"""

import importlib.util
import json
import math
import runpy
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close

from cudlab.borrow import SourceOptions, import_source
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.edm import build_edm
from cudlab.export import export_run
from cudlab.formats import ExportOptions
from cudlab.recipe import ExportModule, trace_module
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.solver import solve
from cudlab.training import train

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

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


def save_folder(folder, scheduler, **more):
    "A folder as diffusers saves it."
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**UNET | more).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.02 * torch.randn_like(p))
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Runs of borrowed networks and their students, made once."
    folder = tmp_path_factory.mktemp("back")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDLAB_RUNS_PATH", str(folder / "runs"))
        patch.setenv("CUDLAB_DEVICE", "cpu")
        patch.setattr("cudlab.borrow.check_reading", lambda found, data: {})
        yield folder


def borrow(home, name, scheduler=None, clip_sample=0.0, net=None, **said):
    "A borrowed run of that name; made where it is not there yet."
    if not (home / "runs" / name).exists():
        scheduler = scheduler or diffusers.DDPMScheduler(prediction_type="v_prediction")
        folder = save_folder(home / f"{name}-from", scheduler, **net or {})
        import_source(folder, SourceOptions(name=name, clip_sample=clip_sample, **said))
    return Run.open(name)


@pytest.fixture(scope="module")
def teacher(home):
    return borrow(home, "teacher", data="digits", license="apache-2.0")


STUDENTS = {"boot": {}, "reflow": {"pairs": 16, "moves": 4}, "consistency": {}}


@pytest.fixture(scope="module")
def students(teacher):
    made = {}

    def get(method):
        if method not in made:
            args = {"teacher": "teacher"} | STUDENTS[method]
            short = dict(steps=3, batch=4, warmup=1, save_every=3, net="teacher", data="digits")
            run = create_run(Config(method=method, args=args, **short), f"student-{method}")
            list(train(run))
            made[method] = Run.open(run.name)
        return made[method]

    return get


def write(run, to, out, **options):
    return export_run(run, ExportOptions(to=to, out=str(out), **options))


def read_card(folder):
    return json.loads((folder / "card.json").read_text())


def read_table(folder):
    spec = importlib.util.spec_from_file_location("back", folder / "scheduling_cudlab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CudlabScheduler.from_pretrained(folder)


@torch.no_grad()
def draw(net, scheduler, noise, y=None):
    "The loop of a pipeline of diffusers."
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t, class_labels=y).sample
        x = scheduler.step(out, t, x).prev_sample
    return x


# a pipeline folder


@pytest.mark.parametrize("method", STUDENTS)
def test_a_student_goes_back_as_a_plain_network_and_a_table(method, students, tmp_path):
    student = students(method)
    done = write(student, "diffusers-folder", tmp_path / "out")
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet", use_safetensors=True)
    assert not [*(tmp_path / "out").rglob("*.bin")]
    mine = student.net(device="cpu").inner.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in net.state_dict().items())
    scheduler = read_table(tmp_path / "out" / "scheduler")
    truth = student.solve(seed=3, index=5, device="cpu")
    assert len(scheduler) == done.nfe == truth.nfe == (4 if method == "reflow" else 1)
    drawn = draw(net, scheduler, draw_noise(3, torch.arange(5), student.shape))
    assert_close(drawn, truth.x, rtol=0, atol=1e-5 * truth.x.abs().max().item())
    stock = read_card(tmp_path / "out")["stock"]  # one step is no solver's
    assert len(stock.get("sigmas", [])) == (5 if method == "reflow" else 0)


def test_its_card_names_licence_teacher_and_what_to_type(students, teacher, tmp_path):
    write(students("boot"), "diffusers-folder", tmp_path / "out")
    card, text = read_card(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert (card["license"], card["teacher"]) == ("apache-2.0", "teacher")
    assert card["from"] == teacher.info["foreign"]["from"]
    assert text.startswith("---\nlicense: apache-2.0\n") and "`teacher`" in text
    assert "trust_remote_code=True" in text and "num_inference_steps=1)" in text
    assert "$" not in text


def test_a_borrowed_run_and_a_learned_solver_go_back_too(teacher, tmp_path):
    args = dict(teacher="teacher", base="ddim", moves=3, scale=2, samples=4, batches=1)
    list(train(create_run(Config(method="dode", data="digits", args=args), "teacher-3")))
    for name, choices in (("teacher-3", {}), ("teacher", {"solver": "unipc3-bh2", "steps": 4})):
        run = Run.open(name)
        write(run, "diffusers-folder", tmp_path / name, **choices)
        net = diffusers.UNet2DModel.from_pretrained(tmp_path / name / "unet")
        scheduler = read_table(tmp_path / name / "scheduler")
        truth = run.solve(seed=3, index=2, device="cpu", **choices).x
        drawn = draw(net, scheduler, draw_noise(3, torch.arange(2), run.shape))
        assert_close(drawn, truth, rtol=0, atol=2e-5 * truth.abs().max().item())
        assert read_card(tmp_path / name)["stock"] == {}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    "Where diffusers copies code that comes with a folder."
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    (tmp_path / "modules").mkdir()


def test_diffusers_opens_the_folder_as_a_pipeline_and_asks_for_the_flag(
    students, modules, tmp_path
):
    student, folder = students("reflow"), tmp_path / "out"
    write(student, "diffusers-folder", folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "CudlabScheduler"
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    images = pipe(3, num_inference_steps=4, generator=seed, output_type="np").images
    noise = torch.randn(3, 1, 8, 8, generator=seed.manual_seed(0))
    drawn = draw(pipe.unet, read_table(folder / "scheduler"), noise)
    assert drawn.std() > 0.1  # a blank picture would agree with anything that is clipped
    truth = (drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert_close(images, truth, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="this table has 4"):
        pipe(3, num_inference_steps=5)


def test_a_pipeline_of_labels_draws_each_class(home, modules, tmp_path):
    run = borrow(home, "labels", net={"num_class_embeds": 4}, null=3)
    write(run, "diffusers-folder", tmp_path / "out", solver="ab2", steps=3)
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    y, noise = torch.tensor([2, 0]), draw_noise(0, torch.arange(2), run.shape)
    drawn = draw(net, read_table(tmp_path / "out" / "scheduler"), noise, y)
    truth = run.solve(index=2, y=y, device="cpu", solver="ab2", steps=3).x
    assert_close(drawn, truth, rtol=0, atol=1e-5 * truth.abs().max().item())
    assert (truth - run.solve(index=2, device="cpu", solver="ab2", steps=3).x).abs().max() > 1e-3
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    how = dict(num_inference_steps=3, output_type="np", class_labels=[2, 0])
    images = pipe(2, generator=seed, **how).images
    noise = torch.randn(2, 1, 8, 8, generator=seed.manual_seed(0))
    drawn = draw(net, read_table(tmp_path / "out" / "scheduler"), noise, y)
    assert_close(images[..., 0], (drawn / 2 + 0.5).clamp(0, 1)[:, 0].numpy(), rtol=0, atol=1e-6)
    said = error_of(write, run, "diffusers-folder", tmp_path / "b", guidance=2.0)
    assert "use guidance=1" in said and not (tmp_path / "b").exists()


def test_pictures_that_are_no_squares_get_a_pipeline_that_takes_them(home, modules, tmp_path):
    run = borrow(home, "wide", net={"sample_size": [8, 16]})
    write(run, "diffusers-folder", tmp_path / "out", solver="euler", steps=2)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    images = pipe(2, num_inference_steps=2, generator=seed, output_type="np").images
    noise = torch.randn(2, 1, 8, 16, generator=seed.manual_seed(0))
    drawn = draw(pipe.unet, read_table(tmp_path / "out" / "scheduler"), noise)
    truth = (drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert_close(images, truth, rtol=0, atol=1e-3)  # it starts at deviation one, not at 0.9999


def test_an_export_with_other_weights_is_not_kept(students, tmp_path, monkeypatch):
    def read_other(inner, folder):
        found = type(inner).from_pretrained(folder)
        found.conv_out.bias.data += 0.01
        return found

    monkeypatch.setattr("cudlab.formats.read_back", read_other)
    said = error_of(write, students("boot"), "diffusers-folder", tmp_path / "out")
    assert "draws other samples than the run" in said and not [*tmp_path.iterdir()]


def test_a_folder_that_went_back_is_not_taken_for_a_network_to_borrow(students, home, tmp_path):
    folder = tmp_path / "out"
    write(students("boot"), "diffusers-folder", folder)
    said = error_of(import_source, folder, SourceOptions(name="again"))
    assert "an export for people without the lab" in said
    (folder / "card.json").unlink()
    said = error_of(import_source, folder, SourceOptions(name="again"))
    assert "one sampler as a table" in said and "\n" not in said
    assert not (home / "runs" / "again").exists()


# stock schedulers, told the times

V, SD = (
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
)
TRAINED = {
    "linear": diffusers.DDPMScheduler(),
    "data": diffusers.DDPMScheduler(prediction_type="sample"),
    "cosine": diffusers.DDPMScheduler(**V),
    "sd": diffusers.DDPMScheduler(**SD),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
STOCK = [
    ("linear", "euler", "edm", "EulerDiscreteScheduler"),
    ("cosine", "ddim", "logsnr", "EulerDiscreteScheduler"),
    ("data", "euler", "logsnr", "EulerDiscreteScheduler"),
    ("flow", "euler", "shifted", "FlowMatchEulerDiscreteScheduler"),
    ("linear", "dpmpp-2m", "edm", "DPMSolverMultistepScheduler"),
    ("sd", "dpmpp-3m", "logsnr", "DPMSolverMultistepScheduler"),
    ("sd", "edm-heun", "edm", "HeunDiscreteScheduler"),
    ("cosine", "edm-heun", "logsnr", "HeunDiscreteScheduler"),
]


@pytest.mark.parametrize(("trained", "solver", "grid", "name"), STOCK)
def test_the_times_of_a_solver_make_a_stock_scheduler_draw_its_samples(
    home, tmp_path, trained, solver, grid, name
):
    run = borrow(home, f"stock-{trained}", TRAINED[trained])
    choices = {"solver": solver, "steps": 6, "grid": grid}
    write(run, "diffusers-scheduler", tmp_path / "out", **choices)
    told = read_card(tmp_path / "out")["stock"]
    assert told["scheduler"] == name
    scheduler = getattr(diffusers, name)(**told["config"])
    key = "sigmas" if "sigmas" in told else "timesteps"
    scheduler.set_timesteps(**{key: told[key]})
    net, noise = run.net(device="cpu"), draw_noise(0, torch.arange(8), run.shape)
    if trained == "flow":
        scheduler.init_noise_sigma, scheduler.scale_model_input = 1.0, lambda x, t: x
    drawn = draw(net.inner, scheduler, noise * told["start"])
    walk = run.solve(index=8, device="cpu", **choices)
    size, first = walk.x.abs().max().item(), walk.ts[0].item()
    noise_share = first / math.hypot(first, 1 - first)  # the others multiply the noise themselves
    assert told["start"] == pytest.approx(noise_share if name.startswith("DPM") else 1, rel=1e-6)
    gap = (drawn - walk.x).abs().max().item()
    assert gap == pytest.approx(told["largest_difference"], abs=1e-5 * size)
    if key == "sigmas":
        assert gap < 1e-4 * size
        return
    assert all(isinstance(row, int) for row in told[key]) and gap < 0.05 * size
    # the solver itself from whole rows on, started where the scheduler starts
    ts = torch.cat([net.table.t[told[key]], torch.zeros(1)]).float()
    share = (ts[0] ** 2 + (1 - ts[0]) ** 2).sqrt() if solver != "edm-heun" else 1 - ts[0]
    same = solve(net, noise * told["start"] * scheduler.init_noise_sigma * share, ts, solver)
    assert_close(drawn, same.x, rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize(
    ("name", "scheduler", "clip", "solver"),
    [
        ("clips", diffusers.DDPMScheduler(), 1.0, "dpmpp-2m"),
        ("stock-linear", TRAINED["linear"], 0.0, "unipc3-bh2"),
        ("stock-flow", TRAINED["flow"], 0.0, "dpmpp-2m"),
        ("stock-data", TRAINED["data"], 0.0, "edm-heun"),
        ("stock-data", TRAINED["data"], 0.0, "dpmpp-3m"),  # whole rows are too far from its own
        ("zero", diffusers.DDIMScheduler(**V, rescale_betas_zero_snr=True), 0.0, "dpmpp-2m"),
        ("edm", diffusers.EDMEulerScheduler(), 0.0, "edm-heun"),
    ],
)
def test_where_no_stock_scheduler_does_the_same_there_is_no_list(
    home, tmp_path, name, scheduler, clip, solver
):
    run = borrow(home, name, scheduler, clip)
    write(run, "diffusers-scheduler", tmp_path / "out", solver=solver, steps=6)
    assert read_card(tmp_path / "out")["stock"] == {}


# programs


@pytest.fixture(scope="module")
def edm(home):
    "A borrowed network of EDM's, with classes."
    from safetensors.torch import save_file

    config = dict(img_resolution=8, model_channels=16, channel_mult=[1, 2], num_blocks=1)
    config |= dict(attn_resolutions=[4], in_channels=1, out_channels=1, label_dim=3)
    torch.manual_seed(0)
    net = build_edm(config)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    save_file(net.state_dict(), home / "edm.safetensors")
    import_source(home / "edm.safetensors", SourceOptions(name="edm-net", precond="edm"))
    return Run.open("edm-net")


def test_a_network_without_a_class_of_diffusers_stays(edm, tmp_path):
    said = error_of(write, edm, "diffusers-folder", tmp_path / "out")
    assert "is of class EDM; use to=torch-export or to=onnx" in said
    assert "\n" not in said and not [*tmp_path.iterdir()]


def test_a_borrowed_network_is_traced_for_up_to_63_samples(home):
    "Tracing takes some seconds."
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    run = borrow(home, "plain", net=blocks | {"add_attention": False})
    net = run.net(device="cpu")
    program = trace_module(ExportModule(net, [], "net")).module()
    for count in (1, 63):
        x, t = draw_noise(1, torch.arange(count), run.shape), torch.linspace(0, 1, count)
        assert_close(program(x, t), net(x, t), rtol=0, atol=1e-4)
    with pytest.raises((AssertionError, RuntimeError), match="63"):
        program(torch.zeros(64, 1, 8, 8), torch.zeros(64))


def test_a_program_is_given_no_more_samples_than_it_takes(tmp_path, monkeypatch):
    class Program:
        def module(self):
            return lambda x, t: asked.append(len(x)) or x + t[:, None]

    asked = []
    card = {"inputs": ["x", "t"], "largest_batch": 63}
    (tmp_path / "card.json").write_text(json.dumps(card))
    shutil.copy(ROOT / "cudlab" / "templates" / "sample.py", tmp_path)
    space = runpy.run_path(str(tmp_path / "sample.py"))
    monkeypatch.setattr(torch.export, "load", lambda file: Program())
    x, t = np.random.rand(130, 2).astype("f"), np.random.rand(130).astype("f")
    assert_close(space["open_torch"]()(x=x, t=t, y=None), x + t[:, None])
    assert asked == [63, 63, 4]


@pytest.mark.long
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
@pytest.mark.parametrize("name", ["teacher", "boot", "edm", "whole"])
def test_programs_of_borrowed_networks_and_students_draw_their_samples(
    teacher, students, edm, tmp_path, to, name
):
    "Tracing, and a process without the lab."
    if to == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    run = {"teacher": teacher, "whole": teacher, "edm": edm}.get(name) or students("boot")
    choices = {} if name == "boot" else {"solver": "dpmpp-2m", "steps": 3}
    choices |= {"what": "sampler"} if name == "whole" else {}
    done = write(run, to, tmp_path / "out", **choices)
    choices.pop("what", None)
    size = run.solve(index=8, device="cpu", **choices).x.abs().max().item()
    assert done.difference < 1e-5 * max(1, size)
    count = 70 if name == "boot" else 5
    noise = draw_noise(4, torch.arange(count), run.shape)
    space = runpy.run_path(str(tmp_path / "out" / "sample.py"))
    y = torch.arange(count) % 3 if run.classes else None
    net = space["open_onnx" if to == "onnx" else "open_torch"]()
    drawn = space["sample"](net, noise.numpy(), None if y is None else y.numpy())
    truth = run.solve(seed=4, index=count, y=y, device="cpu", **choices).x
    assert_close(torch.from_numpy(drawn), truth, rtol=0, atol=1e-5 * max(1, truth.abs().max()))
