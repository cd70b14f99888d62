"""Networks from elsewhere, held against closed forms: whatever a network answers and is asked, as a
velocity it is the same; tables of noise levels are those of diffusers, bit for bit.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.testing import assert_close

from cudlab.foreign import ForeignNetwork, Kind, Reading, vp_time
from cudlab.path import GRIDS, GaussianMixture, linear, make_grid
from cudlab.rng import draw_noise
from cudlab.schedule import NoiseTable, kept_variance
from cudlab.solver import solve

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLES = {
    "linear": {},
    "scaled_linear": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "trained": {"trained_betas": [0.0004 * k for k in range(1, 201)], "num_train_timesteps": 200},
}
DATA = GaussianMixture(
    torch.tensor([[-1.0, 0.2], [0.6, -0.5]]).double(), torch.tensor([0.2, 0.3]).double()
)
EDGE = {"low": 0.002 / 1.002, "top": 80 / 81}


class Oracle(nn.Module):
    "A mixture that answers as a network trained elsewhere would; by formulas of its own."

    def __init__(self, told: str, fed: str, output: str, table: NoiseTable = None, sd: float = 0.5):
        super().__init__()
        self.told, self.fed, self.output, self.table, self.sd = told, fed, output, table, sd

    def noise_level(self, asked):
        if self.told == "table":
            low = asked.floor().long().clamp(max=len(self.table.t) - 2)
            logs = self.table.log_rho
            return (logs[low] + (asked - low) * (logs[low + 1] - logs[low])).exp()
        return {
            "edm": lambda: (4 * asked).exp(),
            "ve": lambda: 2 * asked.exp(),
            "vp": lambda: torch.expm1(0.5 * 19.9 * (asked / 999) ** 2 + 0.1 * asked / 999).sqrt(),
            "ratio": lambda: 2 * asked,
            "time": lambda: asked / 1000 / (1 - asked / 1000),
            "from-noise": lambda: (1 - asked) / asked,
        }[self.told]()

    def forward(self, x, asked):
        rho = self.noise_level(asked)[:, None]
        if self.output == "unit score":
            x = 2 * x - 1
        scale = {"vp": (1 + rho**2).sqrt(), "ve": 1.0, "flow": 1 + rho}
        state = x * scale.get(self.fed, (self.sd**2 + rho**2).sqrt())
        x0, eps = DATA.posterior(state / (1 + rho), (rho / (1 + rho))[:, 0])
        skip = self.sd**2 / (rho**2 + self.sd**2)
        return {
            "epsilon": lambda: eps,
            "-epsilon": lambda: -eps,
            "sample": lambda: x0,
            "v_prediction": lambda: (eps - rho * x0) / (1 + rho**2).sqrt(),
            "edm": lambda: (x0 - skip * state) / (rho * self.sd / (rho**2 + self.sd**2).sqrt()),
            "flow": lambda: eps - x0,
            "-flow": lambda: x0 - eps,
            "score": lambda: -eps / rho,
            "unit score": lambda: -2 * eps / rho,
        }[self.output]()


ORACLE = Kind(build=None, call=lambda net, x, asked, y, given: net(x, asked))
READINGS = {
    "ddpm": (Reading(output="epsilon", rounding="real", top=0.99), "epsilon"),
    "sample": (Reading(output="sample", rounding="real", low=0.01, top=0.99), "sample"),
    "v": (Reading(output="v_prediction", rounding="real", top=0.99), "v_prediction"),
    "edm": (Reading(state="edm", output="edm", ask="edm", **EDGE), "edm"),
    "edm vp": (Reading(ask="vp", **EDGE), "epsilon"),
    "edm ve": (Reading(state="ve", ask="ve", sign=-1.0, **EDGE), "-epsilon"),
    "score": (Reading(state="ve", output="score", ask="edm", **EDGE), "score"),
    "unit score": (
        Reading(state="ve", output="score", ask="ratio", scale=0.5, unit=True, **EDGE),
        "unit score",
    ),
    "flow": (Reading(state="flow", output="flow", ask="time"), "flow"),
    "backwards": (
        Reading(state="flow", output="flow", ask="from-noise", scale=1.0, sign=-1.0),
        "-flow",
    ),
}


def borrow(name, table="linear"):
    reading, output = READINGS[name]
    rows = NoiseTable(kept_variance(TABLES[table])) if reading.ask == "table" else None
    if rows:
        reading = replace(reading, low=rows.ends[0], top=min(rows.ends[1], 0.999))
    oracle = Oracle(reading.ask, reading.state, output, rows)
    return ForeignNetwork(oracle, ORACLE, reading, (2,), 0, rows)


STATES = draw_noise(0, 64, (2,)).double() * 1.5


@pytest.mark.parametrize("name", READINGS)
def test_every_kind_of_answer_is_the_velocity_of_the_data(name):
    net = borrow(name)
    low, top = max(net.reading.low, 0.02), min(net.top, 0.97)
    t = torch.linspace(low, top, 64).double()
    assert_close(net(STATES, t), DATA(STATES, t), rtol=0, atol=1e-12)
    single = net(STATES.float(), t.float())
    assert_close(single.double(), DATA(STATES, t), rtol=0, atol=1e-3)


@pytest.mark.parametrize("table", [t for t in TABLES if t != "trained"])
@pytest.mark.parametrize("name", ["ddpm", "v"])
def test_samples_through_any_table_are_those_of_the_data(name, table):
    net = borrow(name, table)
    low = net.reading.low + 1e-3
    ts = make_grid("logsnr", 10, top=net.top, denoise=False, sigma_min=low / (1 - low)).double()
    here, there = (solve(f, STATES, ts, "dpmpp-2m").x for f in (net, DATA))
    assert_close(here, there, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["edm", "edm vp", "edm ve", "score", "unit score"])
def test_above_its_largest_time_a_network_goes_on_without_a_jump(name):
    net = borrow(name)
    at, above = (torch.full((64,), net.top + gap).double() for gap in (0, 1e-10))
    assert_close(net(STATES, above), net(STATES, at), rtol=0, atol=1e-6)
    # from pure noise it points at the mean of the data, as the data's own velocity does
    end = torch.ones(64).double()
    assert_close(net(STATES, end), DATA(STATES, end), rtol=0, atol=5e-2)


def test_clipping_bounds_the_data_that_a_velocity_points_at():
    reading, output = READINGS["ddpm"]
    rows = NoiseTable(kept_variance({}))
    clipped = Reading(output="epsilon", rounding="real", top=0.99, clip=0.3)
    net = ForeignNetwork(Oracle("table", "vp", output, rows), ORACLE, clipped, (2,), 0, rows)
    t = torch.linspace(0.05, 0.98, 64).double()
    x0 = linear.x0(STATES, net(STATES, t), t)
    plain = linear.x0(STATES, borrow("ddpm")(STATES, t), t)
    assert_close(x0, plain.clamp(-0.3, 0.3), rtol=0, atol=1e-12)


def test_a_copy_is_a_network_of_its_own():
    inner = nn.Linear(2, 2)
    kind = Kind(build=None, call=lambda net, x, asked, y, given: net(x))
    net = ForeignNetwork(inner, kind, READINGS["flow"][0], (2,))
    twin = copy.deepcopy(net)
    x, t = torch.ones(3, 2), torch.full((3,), 0.5)
    before = net(x, t)
    with torch.no_grad():
        twin.inner.weight.zero_()
    assert torch.equal(net(x, t), before) and not torch.equal(twin(x, t), before)
    assert list(net.state_dict()) == ["inner.weight", "inner.bias"]


def test_a_learned_variance_is_left_out_and_states_keep_their_precision():
    class Half(nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.bfloat16
            return super().forward(x)

    inner = Half(2, 4).bfloat16()
    kind = Kind(build=None, call=lambda net, x, asked, y, given: net(x))
    net = ForeignNetwork(inner, kind, READINGS["flow"][0], (2,))
    v = net(torch.ones(3, 2), torch.full((3,), 0.5))
    assert v.shape == (3, 2) and v.dtype == torch.float32


# tables


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_diffusers(name, zero):
    config = TABLES[name] | {"rescale_betas_zero_snr": zero}
    kept = kept_variance(config)
    assert torch.equal(kept, DDPMScheduler(**config).alphas_cumprod)
    table = NoiseTable(kept)
    rows = torch.arange(len(kept), dtype=torch.float64)
    assert_close(table.row(table.t), rows, rtol=0, atol=1e-9)
    assert (table.row(table.t.float()) - rows).abs().max() < 5e-4
    between = table.row(torch.linspace(0.001, 1, 4001).double())
    assert (between[1:] >= between[:-1]).all()
    assert between[-1] == len(kept) - 1 and between[0] == 0


def test_rows_are_snapped_rounded_or_left_as_they_are():
    table = NoiseTable(kept_variance({}))
    near, far = table.t[500], (table.t[500] * 0.7 + table.t[501] * 0.3)
    t = torch.stack([near.float().double(), far])
    net = {
        rule: ForeignNetwork(
            nn.Identity(), ORACLE, Reading(rounding=rule, top=0.99), (2,), 0, table
        ).ask(t)
        for rule in ("snap", "round", "real")
    }
    assert net["snap"][0] == 500 and net["real"][0] != 500 and abs(net["real"][0] - 500) < 5e-4
    assert net["round"].tolist() == [500, 500] and net["snap"][1] == net["real"][1]


def test_the_time_of_the_vp_sde_inverts_its_noise():
    t = torch.linspace(0.001, 1, 100).double()
    rho = torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t).sqrt()
    assert_close(vp_time(rho), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_start_where_the_network_does(name):
    for steps in (1, 5, 40):
        for top in (0.936, 0.5):
            ts = make_grid(name, steps, top=top)
            assert ts[0] <= top + 1e-6 and ts[-1] == 0 and len(ts) == steps + 1
            if name != "leading":
                assert ts[0] == pytest.approx(top, abs=1e-6)
        assert torch.equal(make_grid(name, steps, top=1.0), make_grid(name, steps))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({}, "at pure noise such an answer says nothing"),
        ({"output": "sample", "low": 0.5, "top": 0.4}, "low = 0.5 is not below top = 0.4"),
        ({"output": "noise"}, "is not one of epsilon, sample"),
        ({"output": "sample", "unit": True}, "unit = True goes with"),
        ({"top": math.nan}, "top = nan"),
    ],
)
def test_readings_that_make_no_sense_are_refused(words, text):
    with pytest.raises(ValueError, match=text):
        Reading(**words)
