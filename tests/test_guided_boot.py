"""BOOT's students that are told the guidance: their first weights, their targets, one call for any
strength of the range, and the road through a run and out of the lab.
"""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cudlab.boot import bootstrap_target
from cudlab.borrow import SourceOptions, import_source
from cudlab.borrowed import KINDS
from cudlab.catalog import strip_run
from cudlab.cli import main
from cudlab.condition import GuidanceInput, GuidedLayer, add_guidance, tell_guidance
from cudlab.config import Config, error_of
from cudlab.create import create_run, open_teacher
from cudlab.data import load_data
from cudlab.edm import build_edm
from cudlab.export import export_run
from cudlab.foreign import ForeignNetwork, Reading, explain_gain
from cudlab.formats import ExportOptions
from cudlab.jobs import TrainingStopped
from cudlab.methods import build_objective
from cudlab.net import Velocity
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run
from cudlab.scoring import Sampling, reference_samples, score
from cudlab.solver import midpoint
from cudlab.training import train

TEACHER = "digits-cud-aim8-classes"
SHORT = dict(method="boot", data="digits", classes=True, batch=8, warmup=1, save_every=100, lr=1e-3)
RANGE = {"teacher": TEACHER, "guidance_high": 8.0}
LABELS = torch.arange(8) % 10
NEAR = dict(rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_THREADS", "1")
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    (tmp_path / "runs").mkdir()


def config(args=None, **changes) -> Config:
    return Config(**SHORT | {"args": RANGE | (args or {}), "steps": 3} | changes)


def trained(name="student", args=None, **changes) -> Run:
    run = create_run(config(args, **changes), name)
    list(train(run, device="cpu"))
    return Run.open(name)


def borrow(folder, name="theirs", null=10, data="digits") -> Run:
    "A small UNet of diffusers that knows ten classes and none, with random weights."
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=11 if null >= 0 else 10,
    )
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cudlab.borrow.check_reading", lambda found, data: {})
        options = SourceOptions(name=name, data=data, null=null, clip_sample=0.0)
        return import_source(folder, options).run


def states(n=8, shape=(1, 8, 8)) -> tuple:
    return draw_noise(3, n, shape), Rng(1).uniform("t", n) * 0.9 + 0.05


# The network


@pytest.mark.parametrize("kind", ["lab", "fresh", "diffusers"])
def test_the_first_weights_are_the_teachers_at_every_strength(kind, tmp_path):
    teacher = borrow(tmp_path / "model") if kind == "diffusers" else Run.open(TEACHER)
    settings = config({"teacher": teacher.name}, net="auto" if kind == "fresh" else "teacher")
    student = create_run(settings, "student").net(device="cpu")
    own, (x, t) = teacher.net(device="cpu"), states()
    assert student.guidance == (1, 8)
    with torch.no_grad():
        for w in (1.0, 3.3, 8.0):
            assert torch.equal(student(x, t, LABELS, torch.full((8,), w)), own(x, t, LABELS))
        assert torch.equal(student(x, t), own(x, t))


def loosen(net):
    "The same network, as if it had learned something about the guidance."
    for module in net.modules():
        if hasattr(module, "features") and hasattr(module, "last"):
            torch.nn.init.normal_(module.last.weight, std=0.1)
    return net


@pytest.mark.parametrize("style", ["ddpmpp", "adm"])
def test_networks_of_the_edm_family_are_told_it_too(style):
    more = {"is_adm": True, "model_channels": 64} if style == "adm" else {"model_channels": 32}
    words = dict(img_resolution=8, in_channels=1, out_channels=1, channel_mult=[1], num_blocks=1)
    inner = build_edm(words | {"attn_resolutions": [], "label_dim": 3} | more).eval()
    reading = Reading(state="edm", output="edm", ask="edm", null=3, top=80 / 81)
    net = ForeignNetwork(inner, KINDS["EDM"], reading, (1, 8, 8), 3).requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    (x, t), y, w = states(), LABELS % 3, torch.linspace(1, 4, 8)
    plain = net(x, t, y)
    add_guidance(net, (1, 4))
    assert torch.equal(net(x, t, y, w), plain)
    loosen(net)
    parts = zip(*(a.split(1) for a in (x, t, y, w)))
    alone = torch.cat([net(*part) for part in parts])
    assert_close(net(x, t, y, w), alone, rtol=0, atol=1e-5)
    assert (net(x, t, y, w) - plain).abs().max() > 1e-3


def test_threads_that_ask_one_network_at_once_get_their_own_answers(tmp_path):
    settings = config({"teacher": borrow(tmp_path / "model").name}, net="teacher")
    net = loosen(create_run(settings, "student").net(device="cpu"))
    x, t = states()
    want = {w: net(x, t, LABELS, torch.full((8,), w)) for w in (1.0, 2.0, 5.0, 8.0)}
    assert (want[1.0] - want[8.0]).abs().max() > 1e-3
    twin, wrong = copy.deepcopy(net), []

    def ask(w):
        for _ in range(10):
            with torch.no_grad():
                if not torch.equal(net(x, t, LABELS, torch.full((8,), w)), want[w]):
                    wrong.append(w)

    threads = [threading.Thread(target=ask, args=(w,)) for w in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(twin(x, t, LABELS, torch.full((8,), 5.0)), want[5.0])
    assert twin.inner.time_embedding is not net.inner.time_embedding


def test_nothing_is_left_after_an_error():
    layer = loosen(GuidedLayer(nn.Linear(3, 8), GuidanceInput(8, 1, 8)))
    x = torch.ones(2, 3)
    before = layer(x)
    with pytest.raises(RuntimeError), tell_guidance(torch.full((2,), 8.0)):
        assert not torch.equal(layer(x), before)
        raise RuntimeError
    assert torch.equal(layer(x), before)


def test_other_networks_from_elsewhere_are_refused_in_a_line():
    net = nn.Module()
    net.inner = nn.Linear(1, 1)
    assert "guidance cannot be an input of a Linear; it can of UNet2D" in error_of(
        add_guidance, net, (1, 8)
    )


# The training


def build(settings: Config) -> tuple:
    return build_objective(settings, open_teacher(settings), "cpu")


def test_each_sample_is_held_against_the_teacher_at_its_own_strength(monkeypatch):
    objective, data = build(config())
    x1, y = data.batch(0, 0, 8)
    y[3] = 10  # a label that is hidden
    rng, teacher = Rng(0, 2), Run.open(TEACHER)
    t, s = objective.times_of(rng, 8)
    (w,) = objective.draw_guidance(rng, 8)
    assert w.min() >= 1 and w.max() <= 8 and len(w.unique()) == 8
    with torch.no_grad():
        goal = objective.targets(x1, t, s, y, w)
        ut = objective.net(x1, t, y, w)
        for k in range(8):
            one = slice(k, k + 1)
            flow = teacher.velocity(y=y[one], guidance=w[k].item(), device="cpu")
            mine = bootstrap_target(flow, x1[one], ut[one], t[one], s[one], midpoint)
            assert_close(goal[one], mine, **NEAR)
        free = teacher.velocity(y=y, device="cpu")
        unguided = bootstrap_target(free, x1, ut, t, s, midpoint)
    far = (goal - unguided).flatten(1).norm(dim=1)
    assert far[3] < 1e-4 and (far[torch.arange(8) != 3] > 1e-3).all()


def test_the_network_and_the_teacher_are_told_the_same_numbers(monkeypatch):
    objective, data = build(config())
    x1, y = data.batch(0, 0, 8)
    (w,), flow, net, asked = objective.draw_guidance(Rng(0), 8), objective.flow, [], []
    objective.flow = lambda y, w: asked.append(w) or flow(y, w)
    forward = objective.net.forward
    objective.net.forward = lambda x, t, y, r: net.append(r) or forward(x, t, y, r)
    assert torch.isfinite(objective(x1, y, Rng(0))["net"])
    assert torch.equal(asked[0], w) and torch.equal(asked[1], w[:2])
    assert torch.equal(net[0], w) and torch.equal(net[1], torch.cat([w, w[:2]]))


def answers(run, w, n=8):
    return run.solve(index=n, y=torch.arange(n) % 10, guidance=w, device="cpu").x


def test_three_steps_make_the_answer_move_with_the_strength():
    run = trained(steps=3, lr=1e-2)
    assert (answers(run, 1.0) - answers(run, 8.0)).abs().max() > 1e-3
    assert run.solve(index=4, guidance=2.0).x.equal(run.solve(index=4, guidance=2.0).x)


@pytest.mark.parametrize("kind", ["lab", "diffusers"])
def test_a_training_in_two_legs_equals_one(kind, tmp_path):
    name = borrow(tmp_path / "model").name if kind == "diffusers" else TEACHER
    settings = config({"teacher": name}, steps=4, net="teacher")
    whole, legs = create_run(settings, "whole"), create_run(settings, "legs")
    list(train(whole, device="cpu"))
    with pytest.raises(TrainingStopped):
        list(train(legs, until=2, device="cpu"))
    list(train(Run.open("legs"), device="cpu"))
    whole, legs = Run.open("whole"), Run.open("legs")
    assert whole.step == legs.step == 4 and whole.metrics == legs.metrics
    for file in ("net.safetensors", "ema.safetensors", "train_state.safetensors"):
        assert whole.files[file] == legs.files[file], file


def test_what_does_not_go_together_is_refused_in_a_line(tmp_path):
    borrow(tmp_path / "model", "nameless", null=-1)
    for args, changes, words in (
        ({}, {"classes": False}, "guidance_high = 8 means nothing without labels"),
        ({"guidance": 9.0}, {}, "guidance_high = 8 is not above guidance = 9"),
        ({"guidance_high": 101.0}, {}, "guidance_high = 101.0 is out of range"),
        ({"teacher": "nameless"}, {"net": "teacher"}, "needs a label for none, and the teacher"),
    ):
        why = error_of(create_run, config(args, **changes), "never")
        assert words in why and "\n" not in why, why
    for method in ("reflow", "distill", "pd", "consistency", "gdd"):
        why = error_of(create_run, config(method=method), "never")
        assert "unknown argument" in why and "'guidance_high'" in why


# The run


def test_one_call_answers_at_every_strength_of_the_range():
    run = trained(args={"guidance": 2.0}, steps=1)
    assert run.sampling_defaults["guidance"] == 2.0  # what is nearest to none
    assert "guidance" not in run.sampling_fixed
    for w in (None, 2, 5.5, 8.0):
        for y in (None, 3):
            assert run.solve(index=2, y=y, guidance=w).nfe == 1
    assert run.velocity(y=torch.tensor([1]), guidance=5.0).cost == 1
    for w in (1.0, 1.999, 8.001, 100):
        why = error_of(run.solve, index=2, y=3, guidance=w)
        assert why == f"guidance = {w:g} is out of range: run 'student' was trained for 2 to 8"
    assert "is not a number" in error_of(run.solve, index=2, guidance="much")
    assert trained("other", {"guidance": 0.0}, steps=1).sampling_defaults["guidance"] == 1.0


@pytest.mark.parametrize("kind", ["lab", "diffusers"])
def test_a_run_keeps_its_input(kind, tmp_path):
    name = borrow(tmp_path / "model").name if kind == "diffusers" else TEACHER
    run = trained(args={"teacher": name}, net="teacher", lr=1e-2)
    net, (x, t), w = run.net(device="cpu"), states(), torch.linspace(1, 8, 8)
    assert net.guidance == (1, 8) and run.verify()
    keys = [key for key in net.state_dict() if "guide." in key]
    assert len(keys) == 4
    answer = net(x, t, LABELS, w)
    assert (answer - net(x, t, LABELS, w.flip(0))).abs().max() > 1e-4
    velocity = Velocity(net, LABELS, guidance=w)
    assert_close(velocity(x, t), answer, **NEAR)
    assert_close(velocity.at(torch.tensor([5]))(x[5:6], t[5:6]), answer[5:6], **NEAR)
    strip_run(run, tmp_path / "slim", "float16")
    slim = Run(tmp_path / "slim")
    assert_close(answers(slim, 6.0), answers(run, 6.0), rtol=0, atol=2e-2)
    half = copy.deepcopy(net).half()
    assert_close(half(x.half(), t, LABELS, w).float(), answer, rtol=0, atol=5e-2)


def test_it_is_held_against_its_teacher_guided_as_it_was_asked():
    run = trained(steps=1)
    how = Sampling(n=16, solver="euler", steps=1, guidance=6.0)
    name, goal = reference_samples(run, how, 4)
    y = torch.arange(4)
    truth = Run.open(TEACHER).solve(index=4, y=y, guidance=6.0, steps=64, solver="heun").x
    assert name == TEACHER
    assert_close(goal, truth, rtol=0, atol=1e-4)


@pytest.mark.long
def test_a_score_says_one_call_and_the_strength():
    entry = score(trained(steps=1), n=80, steps=1, guidance=6.0)
    assert entry["nfe"] == 1 and entry["guidance"] == 6.0 and entry["endpoint"] > 0


def test_the_command_line_trains_and_samples_one(tmp_path, capsys):
    words = "train --method boot --data digits --classes true --net teacher --steps 2 --batch 8"
    more = ["--args.teacher", TEACHER, "--args.guidance_high", "8", "--name", "told"]
    assert main([*words.split(), *more]) == 0
    sample = ["sample", "told", "--n", "4", "--out", f"{tmp_path}/a.png", "--guidance"]
    assert main([*sample, "5"]) == 0
    assert "NFE 1," in capsys.readouterr().out
    assert main([*sample, "9"]) == 2
    assert "was trained for 1 to 8" in capsys.readouterr().err


# Out of the lab


LONG = pytest.mark.long  # tracing takes 20 seconds


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("lab", "net"),
        pytest.param("lab", "sampler", marks=LONG),
        pytest.param("diffusers", "net", marks=LONG),
        pytest.param("diffusers", "sampler", marks=LONG),
    ],
)
def test_an_export_is_told_it_too(kind, what, tmp_path):
    name = borrow(tmp_path / "model").name if kind == "diffusers" else TEACHER
    run = trained(args={"teacher": name}, net="teacher", lr=1e-2)
    options = ExportOptions(to="torch-export", out=f"{tmp_path}/out", guidance=6.0, what=what)
    done = export_run(run, options)  # which compares eight samples
    assert done.nfe == 1 and done.difference < 1e-4
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    if what == "net":
        (x, t), w = states(), torch.linspace(1, 8, 8)
        assert_close(program(x, t, LABELS, w), run.net(device="cpu")(x, t, LABELS, w), **NEAR)
    for to in ("diffusers-folder", "diffusers-scheduler"):
        why = error_of(export_run, run, ExportOptions(to=to, out=f"{tmp_path}/never"))
        assert why.startswith(f"to = {to!r}") and "\n" not in why


@pytest.mark.long
def test_an_onnx_export_is_told_it_too(tmp_path):
    pytest.importorskip("onnxruntime")
    run = trained(lr=1e-2)
    done = export_run(run, ExportOptions(to="onnx", out=f"{tmp_path}/out", guidance=6.0))
    assert done.nfe == 1 and done.difference < 1e-4


# A note, and a sentence


def test_a_student_whose_loss_is_enlarged_is_told_so_before_its_first_step(tmp_path):
    borrow(tmp_path / "model")
    settings = config({"teacher": "theirs"}, net="teacher", steps=1)
    events = list(train(create_run(settings, "student"), device="cpu"))
    (note,) = [str(event) for event in events if event.kind == "note"]
    assert "0.9937" in note and "158 times" in note and "epsilon" in note and "\n" not in note
    net = Run.open("theirs").net(device="cpu")
    for reading in (Reading(output="v_prediction"), Reading(top=0.94), Reading(clip=1.0, top=0.99)):
        twin = copy.copy(net)
        twin.reading = reading
        assert not explain_gain(twin)
    assert not explain_gain(Run.open(TEACHER).net(device="cpu"))


def test_scores_of_a_run_without_data_say_what_to_do(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    run = borrow(tmp_path / "model", data="")
    assert run.config.data == "none" and diffusers
    for action in (lambda: score(run, n=80, steps=1), lambda: load_data("none")):
        why = error_of(action)
        assert why.startswith("data = 'none' holds no pictures") and "--data NAME" in why
    assert main(["evaluate", run.name, "--n", "80", "--nfes", "1"]) == 2
    assert "import it again with --data NAME" in capsys.readouterr().err


# What it learns


@pytest.mark.long
def test_a_student_differs_with_the_strength_as_its_guided_teacher_does():
    "300 steps of 64 on the digits, 100 CPU seconds: cosine 0.39 when this was written."
    run = trained(args={"guidance_high": 4.0}, net="teacher", steps=300, batch=64)
    how = dict(index=128, y=torch.arange(128) % 10, device="cpu")
    made = [run.solve(guidance=w, **how).x for w in (1.0, 4.0)]
    flow = dict(steps=32, solver="heun", **how)
    truth = [Run.open(TEACHER).solve(guidance=w, **flow).x for w in (1.0, 4.0)]
    mine, theirs = (strong - plain for plain, strong in (made, truth))

    def cosine(a, b):
        return torch.cosine_similarity(a.flatten(), b.flatten(), 0)

    assert cosine(mine, theirs) > 0.25
    assert cosine(mine, theirs) > 2 * cosine(mine, theirs.roll(1, 0))  # those of another class
