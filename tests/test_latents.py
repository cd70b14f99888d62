"""Networks of texts and latents as runs: Stable Diffusion, SDXL, SD3 and DiT, as small as they
come, against the pipelines of diffusers; prompts as classes; latents shown as pictures.
"""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401
from PIL import Image
from torch.testing import assert_close

from cudlab.borrow import SourceOptions, import_source
from cudlab.catalog import strip_run
from cudlab.cli import main
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.latents import preview_latents
from cudlab.panels import ComparePanel
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.sample import read_samples
from cudlab.scrub import ExplorePanel
from cudlab.solver import solve
from cudlab.training import train

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipelines  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a cat", "a dog, red"]
NEGATIVE = "blurry"


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    "The pipelines by name, and the folders they were saved in."
    room = tmp_path_factory.mktemp("pipes")
    made = {}
    for name in ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "dit"):
        pipe = getattr(tiny_pipelines, name)(room)
        pipe.save_pretrained(room / name)
        pipe.set_progress_bar_config(disable=True)
        made[name] = pipe, room / name
    pipe = tiny_pipelines.stable_diffusion(room, prediction_type="v_prediction")
    pipe.save_pretrained(room / "sd_v")
    pipe.set_progress_bar_config(disable=True)
    return made | {"sd_v": (pipe, room / "sd_v")}


@pytest.fixture(scope="module")
def runs(pipes, tmp_path_factory):
    "All of them as runs."
    room = tmp_path_factory.mktemp("latents")
    (room / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDLAB_RUNS_PATH", str(room / "runs"))
        patch.setenv("CUDLAB_DEVICE", "cpu")
        found = {}
        for name, (_, folder) in pipes.items():
            said = {} if name == "dit" else {"prompts": str(room / "prompts.txt")}
            said |= {"negative": NEGATIVE} if name == "sd_v" else {}
            options = SourceOptions(name=name.replace("_", "-"), **said)
            found[name] = import_source(folder, options).run
        yield found


# samples

WAYS = {
    "DDIM": ("euler", "DDIMScheduler", dict(set_alpha_to_one=True, clip_sample=False)),
    "Euler": ("euler", "EulerDiscreteScheduler", dict(timestep_spacing="leading")),
    "DPM++": ("dpmpp-2m", "DPMSolverMultistepScheduler", dict(solver_order=2)),
    "UniPC": ("unipc2-bh2", "UniPCMultistepScheduler", dict(solver_order=2)),
}


def draw(run, scheduler, solver, y, guidance, eps):
    "Samples of a run at the times of a scheduler of diffusers, (B, C, h, w)."
    net = run.net(device="cpu")
    rows = scheduler.timesteps.round().long()
    ts = torch.cat([net.table.t[rows], torch.zeros(1)])
    n = (ts[0] ** 2 + (1 - ts[0]) ** 2).sqrt()
    f = run.velocity(y=y, guidance=guidance, device="cpu")
    return solve(f, (eps * n).float(), ts, solver)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["stable_diffusion", "sd_v", "stable_diffusion_xl"])
def test_samples_are_those_of_the_pipeline(name, way, pipes, runs):
    solver, scheduler, options = WAYS[way]
    pipe, run = pipes[name][0], runs[name]
    config = {k: v for k, v in pipe.scheduler.config.items() if k in tiny_pipelines.SD_TABLE}
    config |= {"prediction_type": pipe.scheduler.config.prediction_type, "steps_offset": 1}
    pipe.scheduler = getattr(diffusers, scheduler)(**config | options)
    eps = draw_noise(0, 2, run.shape)
    said = dict(negative_prompt=2 * [NEGATIVE]) if name == "sd_v" else {}
    made = dict(num_inference_steps=10, output_type="latent", latents=eps.clone(), **said)
    for guidance, nfe in ((7.5, 20), (1.0, 10)):
        x = pipe(PROMPTS, guidance_scale=guidance, **made).images
        walk = draw(run, pipe.scheduler, solver, torch.arange(2), guidance, eps)
        assert walk.nfe == nfe
        assert_close(walk.x, x, rtol=0, atol=2e-5 * x.abs().max().item())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_are_those_of_the_flow_pipeline(shift, pipes, runs):
    pipe, run = pipes["stable_diffusion_3"][0], runs["stable_diffusion_3"]
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    eps = draw_noise(0, 2, run.shape)
    made = dict(num_inference_steps=10, output_type="latent", latents=eps.clone())
    x = pipe(PROMPTS, guidance_scale=5.0, **made).images
    f = run.velocity(y=torch.arange(2), guidance=5.0, device="cpu")
    walk = solve(f, eps, pipe.scheduler.sigmas, "euler")
    assert walk.nfe == 20
    assert_close(walk.x, x, rtol=0, atol=1e-5 * x.abs().max().item())


def test_a_flow_is_sampled_on_its_own_bend(pipes, runs, tmp_path):
    assert runs["stable_diffusion_3"].own_shift == 3 and runs["sd_v"].own_shift == 0
    folder = tmp_path / "five"
    shutil.copytree(pipes["stable_diffusion_3"][1], folder)
    (tmp_path / "p.txt").write_text("a cat")
    dynamic = dict(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.2)
    even = torch.linspace(1, 0.1, 10)
    for config in (dict(shift=5.0), dynamic):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        scheduler.save_pretrained(folder / "scheduler")
        name = f"bent-{len(config)}"
        run = import_source(folder, SourceOptions(name=name, prompts=str(tmp_path / "p.txt"))).run
        assert run.sampling_defaults["grid"] == "shifted"
        mu = 0.4 + 0.8 * (64 - 256) / (4096 - 256)  # of 64 patches
        scheduler.set_timesteps(sigmas=even.tolist(), mu=mu if len(config) > 1 else None)
        walk = run.solve(index=1, y=0, device="cpu")
        assert_close(walk.ts, scheduler.sigmas, rtol=0, atol=1e-6)
        args = dict(teacher=name, base="euler", moves=4, grid="shifted", batches=1, samples=16)
        fitted = create_run(Config(method="dode", args=args, data="none", classes=True), f"d{name}")
        list(train(fitted))
        ts = Run.open(f"d{name}").solve(index=1, y=0, device="cpu").ts
        assert_close(ts, run.solve(index=1, y=0, steps=4, device="cpu").ts)


def test_a_flow_has_a_velocity_at_both_ends(runs):
    run = runs["stable_diffusion_3"]
    f, x = run.velocity(y=torch.tensor([0]), device="cpu"), draw_noise(0, 1, run.shape)
    for t in (0.0, 1e-7, 0.5, 1.0):
        assert torch.isfinite(f(x, torch.tensor([t]))).all(), t
    assert run.sample(index=1, y=0, solver="heun", steps=3, device="cpu").nfe == 12


def test_classes_with_a_learned_variance_are_those_of_the_pipeline(pipes, runs):
    pipe, run = pipes["dit"][0], runs["dit"]
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    found = []
    pipe.vae.register_forward_hook(lambda *a: None)
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **more: (found.append(z), decode(z, **more))[1]
    torch.manual_seed(0)
    eps = draw_noise(0, 2, run.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *a, **k: eps)
        pipe(class_labels=[7, 999], guidance_scale=4.0, num_inference_steps=10, output_type="np")
    pipe.vae.decode = decode
    x = found[0] * pipe.vae.config.scaling_factor
    walk = draw(run, pipe.scheduler, "euler", torch.tensor([7, 999]), 4.0, eps)
    assert_close(walk.x, x, rtol=0, atol=2e-5 * x.abs().max().item())


def test_a_label_is_told_as_the_pipeline_tells_its_prompt(pipes, runs):
    pipe, run = pipes["sd_v"][0], runs["sd_v"]
    table = run.net(device="cpu").given.encoder_hidden_states
    asked = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    for k, prompt in enumerate(PROMPTS):
        yes, no = pipe.encode_prompt(prompt, negative_prompt=NEGATIVE, **asked)
        assert torch.equal(table[k], yes[0]) and torch.equal(table[-1], no[0])
    assert run.classes == PROMPTS and not torch.equal(table[0], table[1])
    frame = runs["stable_diffusion_xl"].net(device="cpu").given.time_ids
    assert frame.tolist() == 3 * [[16, 16, 0, 0, 16, 16]]
    assert not runs["stable_diffusion_xl"].net(device="cpu").given.text_embeds[-1].any()


@pytest.mark.parametrize("name", ["sd_v", "stable_diffusion_xl", "stable_diffusion_3", "dit"])
def test_a_sample_is_the_same_alone_and_among_others(name, runs):
    run = runs[name]
    many = run.sample(index=3, y=torch.tensor([1, 0, 1]), steps=4, device="cpu").x
    one = run.sample(index=torch.tensor([1]), y=0, steps=4, device="cpu").x
    assert_close(one[0], many[1], rtol=0, atol=1e-5 * many.abs().max().item())
    free = run.sample(index=1, steps=4, device="cpu")
    assert free.nfe == 4 and torch.isfinite(free.x).all()


def test_their_own_way_has_the_guidance_of_their_pipeline(runs):
    said = {name: run.sampling_defaults for name, run in runs.items()}
    guidance = {name: own["guidance"] for name, own in said.items()}
    assert guidance == {
        "stable_diffusion": 7.5,
        "sd_v": 7.5,
        "stable_diffusion_xl": 5.0,
        "stable_diffusion_3": 7.0,
        "dit": 4.0,
    }
    assert said["stable_diffusion_3"]["grid"] == "shifted"
    assert runs["sd_v"].sample(index=1, y=1, device="cpu").nfe == 20


# pictures


@pytest.mark.parametrize("name", ["sd_v", "stable_diffusion_3"])
def test_pictures_are_those_of_the_pipelines_decoder(name, pipes, runs):
    pipe, run = pipes[name][0], runs[name]
    x = 0.5 * draw_noise(1, 3, run.shape)
    config = pipe.vae.config
    with torch.no_grad():
        truth = pipe.vae.decode(x / config.scaling_factor + (config.shift_factor or 0)).sample
    assert_close(run.pictures(x), truth, rtol=0, atol=1e-5)
    assert run.picture_shape == truth.shape[1:] == (3, 16, 16)
    assert "encoder" not in "".join(run.decoder().state_dict())


def test_the_preview_is_a_linear_map_and_shows_states_of_a_whole_walk(runs):
    run = runs["sd_v"]
    walk = run.solve(index=2, steps=3, device="cpu")
    frames = run.preview(walk.xs)
    assert frames.shape == (4, 2, 3, 8, 8)
    moved = run.preview(walk.xs[1:] - walk.xs[:-1], signed=True)
    assert_close(frames[1:] - frames[:-1], moved, rtol=0, atol=1e-4)
    assert not preview_latents(torch.zeros(1, 4, 8, 8), run.latents["preview"], signed=True).any()


def test_samples_are_kept_as_pictures(runs, tmp_path):
    run = runs["sd_v"]
    assert main(["sample", run.name, "--n", "4", "--out", str(tmp_path / "four.png")]) == 0
    assert Image.open(tmp_path / "four.png").size == (2 * 64 + 2, 2 * 64 + 2)
    out = str(tmp_path / "four")
    assert main(["sample", run.name, "--n", "4", "--out", out]) == 0
    x, labels, about = read_samples(out)
    assert x.shape == (4, 3, 16, 16) and x.dtype == torch.uint8
    assert about["shape"] == [3, 16, 16] and len(labels) == 4
    truth = run.pictures(run.sample(index=4, y=labels, device="cpu").x).clamp(-1, 1)
    assert (x.float() - 127.5 - 127.5 * truth).abs().max() <= 0.51


@pytest.fixture
def folder_of_pictures(tmp_path):
    "Small pictures in colour."
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (240, 16, 16, 3), dtype=np.uint8)
    for k, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def test_scores_are_those_of_the_pictures(pipes, runs, folder_of_pictures, monkeypatch):
    data = f"folder:{folder_of_pictures}@16"
    options = SourceOptions(name="asked", data=data)
    why = error_of(import_source, pipes["dit"][1], options)
    assert "explains 48 pictures" in why or "explains nothing of 48 pictures" in why
    monkeypatch.setattr("cudlab.borrow.check_reading", lambda found, data: {})
    run = import_source(pipes["dit"][1], options).run
    ways = ["--n", "200", "--solvers", "euler", "--nfes", "1", "--extractor", "pixels-8-rgb"]
    assert main(["evaluate", run.name, *ways]) == 0
    score = Run.open("asked").scores[-1]
    assert score["n"] == 200 and score["extractor"] == "pixels-8-rgb" and np.isfinite(score["fd"])


def test_widgets_show_latents_as_pictures(runs):
    panel = ExplorePanel(runs["sd_v"], count=4)
    assert panel.line.value.startswith("10 steps = 10 NFE")
    sheet = Image.open(io.BytesIO(panel.shown.state.value))
    assert sheet.mode == "RGBA" and sheet.width > 200
    for name in panel.shown.choose.options[:2]:
        panel.shown.choose.value = name
        assert panel.shown.choose.value == name
    pair = ComparePanel([dict(run=runs["sd_v"], steps=k, y=1) for k in (2, 4)], count=4)
    pair.choose.value = "difference from column 1"
    assert pair.line.value.startswith("blue and red at ±")


# a run like any other


def test_it_is_shared_in_memory_and_stripped_with_its_decoder(runs, tmp_path):
    run = runs["sd_v"]
    assert run.net(device="cpu") is Run.open(run.name).net(device="cpu")
    assert run.decoder("cpu") is Run.open(run.name).decoder("cpu")
    half = strip_run(run, tmp_path / "half", "float16", most=200_000)
    assert len(half.weight_files("ema.safetensors")) > 2 and half.verify()
    x, y = (r.sample(index=2, y=1, steps=4, device="cpu").x for r in (run, half))
    assert_close(y, x, rtol=0, atol=2e-2 * x.abs().max().item())
    assert torch.equal(half.pictures(x), run.pictures(x))
    assert half.network_hash() == run.network_hash()


def student(teacher, method, name, **more):
    config = Config(method=method, args=dict(teacher=teacher.name), data="none", net="teacher")
    config.steps, config.batch, config.warmup, config.classes = 3, 4, 1, True
    for key, value in more.items():
        config.args[key] = value
    run = create_run(config, name)
    list(train(run))
    return Run.open(name)


def test_a_student_learns_from_prompts_without_pictures(runs):
    teacher = runs["sd_v"]
    run = student(teacher, "boot", "texts-boot", guidance=3.0)
    assert run.step == 3 and run.classes == PROMPTS and run.verify()
    mine, theirs = (r.net(device="cpu") for r in (run, teacher))
    assert torch.equal(mine.given.encoder_hidden_states, theirs.given.encoder_hidden_states)
    assert not torch.equal(mine.inner.conv_in.weight, theirs.inner.conv_in.weight)
    last = run.sample(index=2, y=1, device="cpu")
    pictures = run.pictures(last.x)
    assert pictures.shape == (2, 3, 16, 16)
    assert torch.equal(pictures, teacher.pictures(last.x))


def test_a_learned_solver_is_fitted_with_a_prompt(runs):
    args = dict(teacher=runs["sd_v"].name, base="euler", moves=3, grid="logsnr", guidance=2.0)
    args |= dict(batches=1, samples=4)
    config = Config(method="dode", args=args, data="none", classes=True)
    run = create_run(config, "texts-dode")
    list(train(run))
    x = Run.open("texts-dode").sample(index=2, y=0, device="cpu").x
    assert runs["sd_v"].pictures(x).shape == Run.open("texts-dode").pictures(x).shape


def test_what_cannot_be_done_with_them_is_a_sentence(runs):
    why = error_of(runs["sd_v"].sample, y=2)
    assert "class = '2'" in why and "0 to 1" in why
    config = Config(method="gdd", args=dict(teacher="dit"), data="none", classes=True)
    config.net = "teacher"
    assert "none" in error_of(create_run, config, "never")


# folders that are refused


def change(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


SPOILT = [
    ("sd_v", lambda f: (f / "model_index.json").unlink(), "without the model_index.json"),
    ("sd_v", lambda f: change(f / "model_index.json", _class_name="X"), "pipeline of folder"),
    (
        "sd_v",
        lambda f: change(f / "model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "StableDiffusionInpaintPipeline",
    ),
    (
        "sd_v",
        lambda f: change(f / "model_index.json", text_encoder=["evil", "Encoder"]),
        "text_encoder of class 'evil.Encoder'",
    ),
    (
        "sd_v",
        lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/model.bin"),
        "the text encoders of 'copy' do not load",
    ),
    ("sd_v", lambda f: shutil.rmtree(f / "vae"), "has no vae/"),
    ("sd_v", lambda f: change(f / "vae/config.json", _class_name="VQModel"), "'VQModel'"),
    ("dit", lambda f: change(f / "vae/config.json", latent_channels=16), "16 channels"),
    ("dit", lambda f: change(f / "vae/config.json", _class_name="VQModel"), "'VQModel'"),
    ("sd_v", lambda f: change(f / "unet/config.json", in_channels=9), "9 input channels"),
]


@pytest.mark.parametrize(("name", "spoil", "text"), SPOILT)
def test_folders_of_pipelines_are_refused_in_a_line(name, spoil, text, pipes, tmp_path, lab):
    folder = tmp_path / "copy"
    shutil.copytree(pipes[name][1], folder)
    spoil(folder)
    (tmp_path / "p.txt").write_text("a cat")
    said = {} if name == "dit" else {"prompts": str(tmp_path / "p.txt")}
    why = error_of(import_source, folder, SourceOptions(name="x", **said))
    assert text in why and "\n" not in why and len(why) < 400
    assert not [*lab.glob("*")]


@pytest.mark.parametrize(
    ("name", "lines", "text"),
    [
        ("sd_v", None, "name prompts=FILE"),
        ("sd_v", "", "has 0 prompts; 1 to 1,000"),
        ("sd_v", "a cat\na cat", "has 'a cat' twice"),
        ("sd_v", 80 * "a " + "cat", "has 85 tokens; the encoder takes 77"),
        ("dit", "a cat", "mean nothing to a DiTTransformer2DModel"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(name, lines, text, pipes, tmp_path, lab):
    options = SourceOptions(name="x")
    if lines is not None:
        (tmp_path / "p.txt").write_text(lines)
        options.prompts = str(tmp_path / "p.txt")
    assert text in error_of(import_source, pipes[name][1], options)
    options.prompts = "missing.txt"
    assert "missing.txt" in error_of(import_source, pipes[name][1], options)


# the explorer


def test_every_view_shows_latents_as_pictures(runs):
    import base64

    from request import SampleForm, make_request
    from views.compare import Column
    from views.film import encode_gif, encode_png, start_film
    from views.live import draw_samples_of

    run = runs["sd_v"]
    label, other = PROMPTS[1], PROMPTS[0]
    form = SampleForm(run=run.name, solver="ddim", amount=3, count=4, label=label, guidance=2.0)
    request = make_request(form)
    walk = request.solve()
    assert walk.nfe == 6 and walk.x.shape == (4, 4, 8, 8)
    film = start_film(request).replay(walk)
    film.add_signed("gap", [x - walk.x for x in walk.xs], walk.ts, 0)
    head, *lines = (json.loads(line) for line in film.text.splitlines())
    assert (head["c"], head["h"], head["w"]) == (3, 8, 8)
    sizes = {}
    for line in lines:
        if "src" in line:
            picture = Image.open(io.BytesIO(base64.b64decode(line["src"].partition(",")[2])))
            assert picture.mode == "RGB"
            sizes[line["k"], line["i"]] = picture.size
    assert sizes["x", 0] == sizes["v", 0] == sizes["gap", 1] == (8, 4 * 8)
    assert sizes["x", 3] == sizes["hat", 3] == (16, 4 * 16)
    assert Image.open(io.BytesIO(encode_gif(walk, request.run))).n_frames == 4
    assert Image.open(io.BytesIO(encode_png(walk, request.run))).width > 4 * 8
    column = Column("A", make_request(SampleForm(run=run.name, count=4, amount=2, label=other)))
    list(column.sample())
    sheet = json.loads(column.picture())["src"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(sheet))).size == (2 * 16 + 1, 2 * 16 + 1)
    assert "<img" in draw_samples_of(str(run.dir), run.step, ())


# a large one


@pytest.mark.long
def test_two_gigabytes_are_taken_in_part_by_part(tmp_path):
    folder, runs = tmp_path / "large", tmp_path / "runs"
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(1024, 1536),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=2,
    )
    size = sum(p.nbytes for p in net.parameters())
    assert size > 1.9e9
    net.save_pretrained(folder / "unet", max_shard_size="500MB")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    del net
    program = (
        "import resource, sys; from cudlab.borrow import SourceOptions, import_source; "
        "from cudlab.run import Run; import diffusers, torch; diffusers.UNet2DModel; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; first = peak(); "
        "import_source(sys.argv[1], SourceOptions(name='large')); print(peak() - first); "
        "x = Run.open('large').sample(index=1, steps=1, solver='euler').x; print(peak() - first)"
    )
    env = os.environ | {"CUDLAB_RUNS_PATH": str(runs), "CUDLAB_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported, sampled = map(int, done.stdout.split()[-2:])
    print([f"{n / 2**20:.0f} MB" for n in (size, imported, sampled)])
    assert imported < size + 500e6 + 300e6 and sampled < size + 500e6 + 300e6
