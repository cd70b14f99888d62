"""An interactive lab for few-step sampling from flow and diffusion models.

The names most people need; every notebook in nbs/ is a module with more.

    Config          everything that decides a training
    METHODS         the methods of training, by name
    SOLVERS         the solvers, by name
    Run             a run on disk: open it, sample it, look into it
    create_run      the run of a configuration
    train           train it; yields what happens
    list_runs       yours, and those that ship
    load_data       a data set by name
    make_grid       the times of a sampler's moves
    solve           a trajectory of any velocity f(x, t) with any solver
    score           a score of a run, with its protocol
    score_curve     scores over solvers and network calls
    film_strip      samples by steps as one picture
    tradeoff_chart  quality against network calls
"""

from importlib import import_module

__version__ = "0.1.0"

HOMES = {
    "Config": "config",
    "METHODS": "methods",
    "SOLVERS": "solver",
    "Run": "run",
    "create_run": "create",
    "train": "training",
    "list_runs": "catalog",
    "load_data": "data",
    "make_grid": "path",
    "solve": "solver",
    "score": "scoring",
    "score_curve": "evaluate",
    "film_strip": "plot",
    "tradeoff_chart": "tradeoff",
}
__all__ = [*HOMES]


def __getattr__(name: str):
    "A public name, whose module is imported when the name is used: plots bring more than torch."
    if name not in HOMES:
        raise AttributeError(f"module 'cudlab' has no attribute {name!r}")
    return getattr(import_module(f"cudlab.{HOMES[name]}"), name)


def __dir__() -> list:
    return sorted([*HOMES, "__version__"])


from . import multistep  # noqa: E402, F401  the solvers with a memory join the registry
