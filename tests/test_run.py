"""A run is a network that every solver can sample: cut ones, learned solvers, refusals."""

import shutil

import pytest
import safetensors.torch
import torch
from conftest import copy_of

from cudlab.catalog import list_runs, strip_run
from cudlab.checkpoint import checkpoint_dir, prune_checkpoints, save_checkpoint
from cudlab.config import CorruptData, error_of
from cudlab.run import Run, find_solver
from cudlab.sample import write_samples
from cudlab.scoring import score

SOLVER = "digits-dode-euler5"


def test_a_cut_run_is_the_same_network(lab, good, tmp_path):
    run = Run(copy_of(good, lab, "whole"))
    small_copy = strip_run(run, tmp_path / "small")
    half = strip_run(run, tmp_path / "half", "float16", most=100_000)
    x = run.solve(index=4, steps=2).x
    assert torch.equal(small_copy.solve(index=4, steps=2).x, x) and small_copy.verify() == 4
    assert (half.solve(index=4, steps=2).x - x).abs().max() < 0.01
    assert half.weights == ("ema",) and set(half.files) >= {"ema.safetensors", "ema-2.safetensors"}
    assert all(size < 110_000 for size in half.metadata["bytes"].values())
    assert half.network_hash() == small_copy.network_hash() == run.network_hash()
    assert half.metrics == run.metrics and half.training_cost == run.training_cost
    with pytest.raises(ValueError, match="was cut to its ema weights; use weights=ema"):
        half.net("raw")
    for target, dtype, why in (("half", "", "exists"), ("new", "int8", "is not one of")):
        with pytest.raises(ValueError, match=why):
            strip_run(run, tmp_path / target, dtype)
    shutil.rmtree(checkpoint_dir(run.dir, 2))
    with pytest.raises(ValueError, match="could never be finished"):
        strip_run(run, tmp_path / "unfinished")


def test_weights_that_half_precision_cannot_hold_are_refused(lab, good, tmp_path):
    run = Run(copy_of(good, lab, "large"))
    weights = {key: value + 1e5 for key, value in run.tensors("ema.safetensors").items()}
    shutil.rmtree(run.checkpoint)
    save_checkpoint(run.dir, 2, {"ema.safetensors": safetensors.torch.save(weights)}, {})
    with pytest.raises(ValueError, match="cannot hold the weights of run 'large'"):
        strip_run(run, tmp_path / "new", "float16")


def test_samples_that_are_not_finite_are_said_and_not_kept(lab, good, tmp_path):
    run = Run(copy_of(good, lab, "huge"))
    weights = {k: v.sign() * 3e38 for k, v in run.tensors("ema.safetensors").items()}
    shutil.rmtree(run.checkpoint)
    files = {name: safetensors.torch.save(weights) for name in ("ema.safetensors",)}
    save_checkpoint(run.dir, 2, files, {})
    run = Run.open("huge")
    words = "32 of 32 samples of run 'huge' are NaN or infinite; its weights are too large"
    assert words in error_of(run.solve, index=32, steps=2)
    assert words in error_of(run.sample, index=32, steps=2)
    assert words in error_of(score, run, n=32, steps=2)
    out = tmp_path / "samples"
    assert words in error_of(list, write_samples(run, out, n=32, per_part=32, steps=2))
    assert [file.name for file in out.iterdir()] == ["index.json"]
    assert [state.x.shape for state in run.iterate(index=2, steps=1)]  # can be looked at


def test_a_learned_solver_knows_its_network():
    run = Run.open(SOLVER)
    assert run.network_run.name == "digits-rf" and run.network_run.weights == ("ema",)
    assert run.info["teacher"]["network"] == run.network_run.network_hash()
    assert find_solver(SOLVER).made_for["name"] == "digits-rf"
    for choice, why in (
        (dict(steps=4), "was fitted for steps = 5 on grid = 'uniform', not for 4"),
        (dict(guidance=2), "means nothing to run 'digits-dode-euler5'"),
        (dict(denoise=False), "denoise = True, not for False"),
    ):
        with pytest.raises(ValueError, match=why):
            run.iterate(**choice)
    with pytest.raises(ValueError, match="as they were at the time, not for these"):
        Run.open("digits-cud").iterate(solver=SOLVER)


def test_what_cannot_be_sampled_is_said_at_once():
    student, plain = Run.open("digits-boot"), Run.open("digits-rf")
    student.check_sampling(solver=None, steps=1, grid=None, guidance=1.0, denoise=True)
    plain.check_sampling(solver="heun", steps=9)
    for run, choices, why in (
        (student, dict(steps=4), "use steps=1"),
        (student, dict(guidance=2.0), "use guidance=1.0"),
        (plain, dict(solver="flow-map"), "use solver=euler"),
        (plain, dict(guidance=2.0), "trained without labels; use guidance=1"),
        (plain, dict(guidance=0), "trained without labels; use guidance=1"),
        (plain, dict(guidance=float("nan")), "is not a number from 0 to 100"),
    ):
        with pytest.raises(ValueError, match=why):
            run.check_sampling(**choices)
        with pytest.raises(ValueError, match=why):
            run.iterate(**choices)


def test_a_checkpoint_is_opened_by_its_step(lab, good):
    copy_of(good, lab, "kept")
    one, two = Run.open("kept@1"), Run.open("kept@2")
    assert (one.name, one.step, two.step, one.dir) == ("kept@1", 1, 2, lab / "kept")
    assert len(one.metrics) == 1 and len(two.metrics) == 2
    assert one.verify() == 5 and one.solve(index=2, steps=2).nfe == 2
    assert [r.name for r in list_runs() if not r.shipped] == ["kept"]
    assert Run(one.checkpoint).name == Run.open(str(one.checkpoint)).name == "kept@1"
    for name in ("kept@3", "kept@", "kept@../kept/1", "kept@01", "@1", "nobody@1"):
        with pytest.raises(ValueError, match="keeps no step|unknown run"):
            Run.open(name)


def test_a_run_follows_its_job_to_the_newest_checkpoint(lab, good):
    folder = copy_of(good, lab, "moving")
    shutil.rmtree(checkpoint_dir(folder, 2))
    run, pinned = Run.open("moving"), Run.open("moving@1")
    files = {name: (run.checkpoint / name).read_bytes() for name in run.files}
    files = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    save_checkpoint(folder, 2, files, {})
    prune_checkpoints(folder, 1, 0)
    assert run.net("raw") is not None and run.step == 2 and run.verify() == 5
    with pytest.raises(CorruptData, match="moving.*is missing"):
        pinned.net()
