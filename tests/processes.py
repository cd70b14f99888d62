"""Several processes for a test. They are forked from one server that has imported the lab already,
so that each costs a tenth of a second; the server is started by the first test that needs it.
"""

import math
import multiprocessing
import os
import socket
import sys

import torch

from cudlab.distributed import init_distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cudlab.evaluate", "cudlab.sample"])


def call_in_world(environment: dict, action, args: tuple) -> None:
    "What a process does: join the others as torchrun would have it, and act."
    os.environ.update(environment)
    torch.set_num_threads(1)
    with init_distributed(60):
        action(*args)


def start_processes(size: int, action, *args) -> list:
    "So many processes that run `action(*args)`, a function of a module."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = dict(os.environ) | {key: str(value) for key, value in world.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "CUDLAB_DEVICE": "cpu"}
        started.append(CONTEXT.Process(target=call_in_world, args=(environment, action, args)))
        started[-1].start()
    return started


def end_processes(started: list, timeout: float = 120) -> list:
    "Wait for processes, end those that hang, and give their exit codes."
    for process in started:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def run_processes(size: int, action, *args) -> None:
    "Run `action(*args)` in so many processes; all must end well."
    assert end_processes(start_processes(size, action, *args)) == [0] * size


def evaluate_run(folder: str, params: dict) -> None:
    "The evaluation job on one run."
    from cudlab.evaluate import evaluate, parse_evaluation
    from cudlab.run import Run

    for event in evaluate(Run(folder), parse_evaluation(params)):
        assert os.environ["RANK"] == "0" and event.run.dir


def sample_run(name: str, out: str, params: dict) -> None:
    "Samples of a run as files."
    from cudlab.run import Run
    from cudlab.sample import write_samples

    list(write_samples(Run.open(name), out, **params))


def run_main(words: list) -> None:
    "The command line; the process ends with its exit code."
    from cudlab.cli import main

    sys.exit(main(words))


def train_poisoned(words: list, victim: int) -> None:
    "A training in which one process's weights are infinite when they are saved a second time."
    from cudlab import training

    saves, check = [], training.check_weights

    def poison(leg) -> None:
        saves.append(1)
        if len(saves) == 2 and leg.world.rank == victim:
            next(leg.objective.net.parameters()).data.fill_(math.inf)
        check(leg)

    training.check_weights = poison
    run_main(words)
