"""The program of test_distributed.py, on one process or on those of torchrun.

python world_program.py losses JOBS   losses, gradient norms and end weights of short trainings
python world_program.py train JOB     one training in RUNS_PATH; process 0 prints what it says
"""

import gc
import json
import sys
from pathlib import Path

import torch

from cudlab.create import create_run, open_teacher
from cudlab.distributed import init_distributed
from cudlab.fit import Diverged
from cudlab.jobs import error_message, get_exit_code, parse_parameters
from cudlab.methods import build_objective
from cudlab.training import train


def numbers(tensors: dict) -> dict:
    return {name: value.item() for name, value in tensors.items()}


def short_training(params: dict, world) -> dict:
    "Losses and norms of every step, and the size of the weights at the end."
    config, _ = parse_parameters(params)
    objective, data = build_objective(config, open_teacher(config), "cpu")
    rows = []
    try:
        for tick in objective.fit(data, config):
            norms = {f"norm of {name}": value for name, value in tick.grad_norm.items()}
            rows.append(numbers(tick.losses | norms))
    except (Diverged, ValueError) as e:
        return {"error": f"{type(e).__name__}: {e}"}
    modules = objective.players | {f"average {k}": v for k, v in objective.ema.items()}
    weights = {}
    for name, module in modules.items():
        weights[name] = sum(p.double().square().sum().item() for p in module.parameters())
    flat = [p.detach().flatten() for p in objective.net.parameters()] or [torch.zeros(0)]
    bits = int(torch.cat(flat).view(torch.int32).sum(dtype=torch.long))
    same = world.all_reduce_max(bits) == -world.all_reduce_max(-bits)
    assert same, "the processes have different weights"
    return {"losses": rows, "weights": weights}


def print_losses(jobs: list) -> None:
    with init_distributed() as world:
        for params in jobs:
            row = short_training(params, world)
            if world.rank == 0:
                print(json.dumps(row), flush=True)
    gc.collect()
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    # the threads of a world that is over may end the interpreter with an error
    assert not any("gloo" in name for name in names), names


def print_training(params: dict) -> int:
    with init_distributed() as world:
        config, options = parse_parameters(params)
        if world.rank == 0:
            create_run(config, options.name)
        world.all_reduce_max(0)
        try:
            for event in train(create_run(config, options.name), until=options.until):
                print(event, flush=True)
        except Exception as e:
            print(f"process {world.rank}: {type(e).__name__}: {error_message(e)}", flush=True)
            return get_exit_code(e)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "losses":
        print_losses(json.loads(sys.argv[2]))
    else:
        sys.exit(print_training(json.loads(sys.argv[2])))
