"""Parity with diffusers: the same noise through the same network at the same noise levels is the
same walk to 1e-4.
"""

import functools

import pytest
import torch
from conftest import ROOT

from cudlab.path import (
    PATHS,
    append_dims,
    change_path,
    linear,
    make_grid,
    to_denoiser,
    to_noise_predictor,
)
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.solver import SOLVERS, solve

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE, STEPS, COUNT = 1e-4, (5, 8, 12), 6
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@functools.cache
def unet():
    return Run(ROOT / "checkpoints/digits-rf").net(device="cpu")


def net(x, t):
    """The rectified flow that ships, in float32; states and coefficients of both sides are float64
    where diffusers lets them.
    """
    return unet()(x.float(), t.float()).double()


def velocity(x, a, b):
    "What a v_prediction model says about x = a x0 + b eps, a^2 + b^2 = 1."
    noise = to_noise_predictor(net)(x, a, b)
    data = to_denoiser(net)(x / append_dims(a, x), b / a)
    return append_dims(a, x) * noise - append_dims(b, x) * data


def preconditioned(x, a, b):
    "The raw network inside EDM's denoiser, sigma_data = 1/2."
    b2 = append_dims(b, x) ** 2
    return (to_denoiser(net)(x, b) - x / (1 + 4 * b2)) * (1 + 4 * b2).sqrt() / b2.sqrt()


def flow(sigma):
    "Shares (a, b) of data and noise in a flow matching state, (N, 2)."
    return torch.stack([1 - sigma, sigma], 1)


def ve(sigma):
    "Shares in an EDM state."
    return torch.stack([torch.ones_like(sigma), sigma], 1)


def vp(sigma):
    "Shares in a DDPM state whose noise-to-data ratio is sigma."
    return ve(sigma) / (1 + sigma[:, None] ** 2).sqrt()


ASK = {  # what each scheduler asks the network
    flow: lambda x, a, b: net(x, b),
    ve: to_noise_predictor(net),
    vp: to_noise_predictor(net),
}


def scheduler_of(name, steps, **options):
    "A diffusers scheduler with its time steps set and its tables in float64."
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    for key, table in vars(scheduler).items():
        if isinstance(table, torch.Tensor) and table.dtype == torch.float32:
            setattr(scheduler, key, table.double())
    return scheduler


def walked(scheduler, shares, ask, before=None, **options):
    """Every state of a scheduler's loop, scaled to the linear path; shares (a, b) are those before
    each call and at the end.
    """
    states = [draw_noise(0, COUNT, (1, 8, 8)).double()]
    for i, (t, (a, b), end) in enumerate(zip(scheduler.timesteps, shares, shares.sum(1)[1:])):
        if before:
            before(i)
        x = states[-1] * (a + b)
        said = ask(x, a.expand(COUNT), b.expand(COUNT))
        states.append(scheduler.step(said, t, x, **options).prev_sample / end)
    return torch.stack(states)


def gap(states, shares, solver, nodes=slice(None), **options):
    "The largest difference of our walk over the same noise levels, at each node of the grid."
    ts = (shares[:, 1] / shares.sum(1))[nodes]
    ours = solve(net, states[0], ts, solver, **options).xs
    return (ours - states[nodes]).abs().flatten(1).amax(1)


def parity(
    solver, name, steps, shares, nodes=slice(None), *, ask=None, ours=None, step=None, **how
):
    "The gap between a solver and a scheduler with these options."
    scheduler = scheduler_of(name, steps, **how)
    at = shares(scheduler.sigmas)
    states = walked(scheduler, at, ask or ASK[shares], **step or {})
    return gap(states, at, solver, nodes, **ours or {})


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_flow_matching_euler(steps, shift):
    found = parity("euler", "FlowMatchEulerDiscreteScheduler", steps, flow, shift=shift)
    assert found.max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
def test_heun_is_flow_matching_heun_whose_last_move_is_euler(steps):
    scheduler = scheduler_of("FlowMatchHeunDiscreteScheduler", steps)
    at = flow(scheduler.sigmas)
    states, nodes = walked(scheduler, at, ASK[flow]), [*range(0, 2 * steps - 1, 2), 2 * steps - 1]
    assert gap(states, at, "heun-final-euler", nodes).max() < TOLERANCE
    assert gap(states, at, "heun", nodes[:-1]).max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "shares, options",
    [
        (flow, FLOW),
        (vp, {}),
        (vp, {"use_karras_sigmas": True}),
        (vp, {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_dpmpp_multistep(order, shares, options, steps):
    how = {"solver_order": order, **options}
    found = parity(f"dpmpp-{order}m", "DPMSolverMultistepScheduler", steps, shares, **how)
    assert found.max() < TOLERANCE


def test_dpmpp_3m_of_diffusers_lowers_no_order_but_the_last_from_fifteen_steps_on():
    how = {"solver_order": 3, "ours": {"lower_order_final": False}}
    found = parity("dpmpp-3m", "DPMSolverMultistepScheduler", 16, vp, **how)
    assert found.max() < TOLERANCE


@pytest.mark.parametrize("steps", [5, 9, 13])
def test_dpmpp_2s_is_singlestep_where_the_middle_is_the_middle(steps):
    nodes = [*range(0, steps, 2), steps]
    how = {"use_exponential_sigmas": True}
    found = parity("dpmpp-2s", "DPMSolverSinglestepScheduler", steps, vp, nodes, **how)
    assert found.max() < TOLERANCE


@pytest.mark.parametrize("steps", [5, 9, 13])
def test_dpm_2s_is_singlestep_in_eps(steps):
    "Its last sigma is there twice."
    options = {
        "algorithm_type": "dpmsolver",
        "final_sigmas_type": "sigma_min",
        "use_exponential_sigmas": True,
    }
    nodes = slice(0, steps, 2)
    found = parity("dpm-2s", "DPMSolverSinglestepScheduler", steps, vp, nodes, **options)
    assert found.max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True])
def test_dpm_2s_is_k_dpm_2(steps, karras):
    scheduler = scheduler_of("KDPM2DiscreteScheduler", steps, use_karras_sigmas=karras)
    even = torch.arange(2 * steps) % 2 == 0
    levels = scheduler.sigmas[: 2 * steps], scheduler.sigmas_interpol[: 2 * steps]
    sigmas = torch.where(even, *levels)
    at, nodes = ve(sigmas), [*range(0, 2 * steps - 1, 2), 2 * steps - 1]
    assert gap(walked(scheduler, at, ASK[ve]), at, "dpm-2s", nodes).max() < TOLERANCE


@pytest.mark.parametrize("steps", [7, 10, 13])
def test_dpm_3s_is_singlestep_with_the_stages_of_the_paper(steps):
    """Its second stage is what diffusers calls heun, its third what it calls midpoint; the last
    sigma is there twice.
    """
    scheduler = scheduler_of(
        "DPMSolverSinglestepScheduler",
        steps,
        solver_order=3,
        lower_order_final=True,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        use_exponential_sigmas=True,
    )
    kinds, at = {1: "midpoint", 2: "heun", 3: "midpoint"}, vp(scheduler.sigmas)
    states = walked(
        scheduler,
        at,
        ASK[vp],
        before=lambda i: scheduler.register_to_config(solver_type=kinds[scheduler.order_list[i]]),
    )
    assert gap(states, at, "dpm-3s", slice(0, steps, 3)).max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("bh", [1, 2])
@pytest.mark.parametrize("name", ["unipc", "unip"])
@pytest.mark.parametrize("shares", [flow, vp])
def test_unipc_and_its_predictor(name, order, bh, shares, steps):
    """bh1 of diffusers is not a number at sigma = 0: there the last move, one call in ours, is left
    out.
    """
    options = {
        "solver_order": order,
        "solver_type": f"bh{bh}",
        "disable_corrector": [] if name == "unipc" else list(range(steps)),
    }
    options |= FLOW if shares is flow else {"final_sigmas_type": "sigma_min"}
    scheduler = scheduler_of("UniPCMultistepScheduler", steps, **options)
    at = shares(scheduler.sigmas)
    states = walked(scheduler, at, ASK[shares])
    gaps = gap(states, at, f"{name}{order}-bh{bh}")
    if bh == 1 and shares is flow:
        assert states[-1].isnan().all()
        gaps = gaps[:-1]
    assert gaps.max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("lower", [False, True])
def test_deis_in_log_rho(order, lower, steps):
    how = {"lower_order_final": lower}
    options = {"solver_order": order, "ours": how, **how}
    found = parity(f"deis-log{order}", "DEISMultistepScheduler", steps, vp, **options)
    assert found.max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [2, 3])
def test_deis_on_flow_sigmas(order, steps):
    "Its last sigma is there twice."
    options = {"solver_order": order, "lower_order_final": False, **FLOW}
    nodes = slice(0, steps)
    found = parity(f"deis-log{order}", "DEISMultistepScheduler", steps, flow, nodes, **options)
    assert found.max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [2, 3])
def test_deis_in_rho_is_lms_up_to_its_last_move(order, steps):
    "Its move to sigma = 0 keeps the order, ours is one call."
    how = {"step": {"order": order}}
    found = parity(f"deis-rhoab{order}", "LMSDiscreteScheduler", steps, ve, **how)
    assert found[:-1].max() < TOLERANCE


@pytest.mark.parametrize(
    "spacing, steps",
    [("leading", 5), ("leading", 8), ("leading", 12), ("trailing", 5), ("trailing", 8)],
)
def test_ddim(spacing, steps):
    scheduler = scheduler_of("DDIMScheduler", steps, clip_sample=False, timestep_spacing=spacing)
    bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)])
    at = torch.stack([bars.sqrt(), (1 - bars).sqrt()], 1)
    assert gap(walked(scheduler, at, ASK[vp]), at, "ddim").max() < TOLERANCE


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_pndm_with_its_runge_kutta_start(steps):
    """In the time of the VP path: the middle of a move is the middle of two time steps, whose
    distance, 1000 // steps, must be even.
    """
    path = PATHS["vp"]
    bars = path.alpha(torch.arange(1001, dtype=torch.float64) / 1000) ** 2
    scheduler = scheduler_of(
        "PNDMScheduler", steps, trained_betas=(1 - bars[1:] / bars[:-1]).tolist(), steps_offset=1
    )
    bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.alphas_cumprod[:1]])
    at = torch.stack([bars.sqrt(), (1 - bars).sqrt()], 1)
    nodes = [0, 4, 8, *range(12, steps + 10)]
    states = (walked(scheduler, at, ASK[vp]) * at.sum(1)[:, None, None, None, None])[nodes]
    ts = path.time(at[:, 0].log() - at[:, 1].log())[nodes]
    ours = solve(change_path(net, linear, path), states[0], ts, "pndm", path)
    assert ours.nfe == len(scheduler.timesteps) == steps + 9
    assert (ours.xs - states).abs().max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
def test_ipndm(steps):
    """On levels of our own: its default ones begin without any data, and end at sigma = 0, where it
    keeps the order and ours is one call.
    """
    sigmas = PATHS["vp"].sigma(torch.linspace(1, 0.01, steps + 1, dtype=torch.float64))
    scheduler = scheduler_of("IPNDMScheduler", steps, trained_betas=sigmas.tolist())
    at = torch.stack([scheduler.alphas, scheduler.betas], 1)
    assert gap(walked(scheduler, at, velocity), at, "ipndm").max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "solver, name, options",
    [
        ("ddim", "EDMEulerScheduler", {}),
        ("dpmpp-2m", "EDMDPMSolverMultistepScheduler", {"solver_order": 2}),
        ("dpmpp-3m", "EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_edm_schedulers_on_the_edm_grid(solver, name, options, steps):
    at = ve(scheduler_of(name, steps).sigmas)
    torch.testing.assert_close(
        at[:, 1] / at.sum(1), make_grid("edm", steps).double(), rtol=0, atol=1e-6
    )
    assert parity(solver, name, steps, ve, ask=preconditioned, **options).max() < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True])
def test_edm_heun(steps, karras):
    nodes = [*range(0, 2 * steps - 1, 2), 2 * steps - 1]
    how = {"use_karras_sigmas": karras}
    found = parity("edm-heun", "HeunDiscreteScheduler", steps, ve, nodes, **how)
    assert found.max() < TOLERANCE


def test_the_tolerance_tells_every_solver_from_every_other():
    options = {"solver_order": 3, "solver_type": "bh2", "final_sigmas_type": "sigma_min"}
    scheduler = scheduler_of("UniPCMultistepScheduler", 8, **options)
    at = vp(scheduler.sigmas)
    states = walked(scheduler, at, ASK[vp])
    gaps = {name: gap(states, at, name).max() for name, entry in SOLVERS.items() if entry.nfe}
    assert [name for name, g in gaps.items() if g < 10 * TOLERANCE] == ["unipc3-bh2"]
