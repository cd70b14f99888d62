"""Losses, gradient norms and end weights of some short trainings, printed by process 0; started alone
or by torchrun (test_team.py).
"""

import gc
import json
import sys
from pathlib import Path

import torch

from cudlab.distributed import init_distributed
from cudlab.training import build_objective, parse_parameters

torch.set_num_threads(1)
with init_distributed() as team:
    for job in json.loads(sys.argv[1]):
        config, _ = parse_parameters(job)
        objective, data = build_objective(config, "cpu")
        ticks = list(objective.fit(data, config))
        weights = {
            name: sum(p.double().square().sum().item() for p in m.parameters())
            for name, m in (
                objective.players | {f"average {k}": v for k, v in objective.ema.items()}
            ).items()
        }
        bits = (
            torch.cat(
                [p.detach().flatten() for p in objective.net.parameters()] or [torch.zeros(0)]
            )
            .view(torch.int32)
            .sum(dtype=torch.long)
        )
        assert team.most(int(bits)) == -team.most(-int(bits)), (
            "the processes have different weights"
        )
        if team.rank == 0:
            rows = [
                {
                    k: v.item()
                    for k, v in (
                        t.losses | {f"norm of {n}": g for n, g in t.grad_norm.items()}
                    ).items()
                }
                for t in ticks
            ]
            print(json.dumps({"losses": rows, "weights": weights}), flush=True)
del objective, ticks
gc.collect()
threads = [
    name for task in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := task.read_text())
]
assert not threads, (
    f"the team is over and its threads are not: {threads}; at the interpreter's end they may "
    "abort the process"
)
