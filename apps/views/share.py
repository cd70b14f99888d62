"Share: the whole view in the query of the address, checked when it comes back."

from dataclasses import dataclass, fields

from cudlab.config import Options, option
from cudlab.dode import NATIVE
from cudlab.path import GRIDS
from views.ask import SampleForm
from views.compare import COLUMN, LETTERS, NONE
from views.tradeoff import BUDGETS, Chart

LONGEST = 2048
VIEWS = ("trajectory", "velocity", "trade-off", "compare", "runs", "live")


@dataclass
class View(Options):
    "What the address may say beside the form: which view, and what Trade-off and Compare show."

    view: str = option("trajectory", "the open view", choices=VIEWS)
    runs: str = option("", "runs of the trade-off, with spaces")
    solvers: str = option("", "solvers of the trade-off, with spaces")
    value: str = option("fd", "see Chart")
    axis: str = option("NFE", "see Chart")
    grid2: str = option("uniform", "grid of the trade-off")
    nfe: str = option(BUDGETS, "budgets of the trade-off")
    n: int = option(2000, "samples of a score")
    seeds: str = option("0", "seeds of the trade-off")
    a: str = option("", "column of the comparison: run~solver~NFE~grid~weights~head")
    b: str = option("", "see a")
    c: str = option("", "see a")
    d: str = option("", "see a")
    seed2: int = option(0, "seed of the comparison")
    count2: int = option(16, "samples of the comparison")


def typed(text: str, kind):
    """A value of the address as the type a field wants; what cannot be read stays text, for the
    check to name.
    """
    kind = kind if isinstance(kind, str) else kind.__name__
    try:
        return {
            "int": int,
            "float": float,
            "bool": lambda t: {"true": True, "false": False}[t.lower()],
        }.get(kind, str)(text)
    except (ValueError, KeyError):
        return text


def understood(query: dict) -> tuple:
    """What an address asks for: ({field: value}, [complaints]); unknown keys are let pass, bad
    values left out.
    """
    found, wrong = {}, []
    if sum(len(str(k)) + len(str(v)) + 2 for k, v in query.items()) > LONGEST:
        return {}, [f"the address is longer than {LONGEST} characters and was not read"]
    for kind in (SampleForm, View):
        for f in fields(kind):
            if f.name in query:
                value = typed(str(query[f.name]), f.type)
                try:
                    kind(**{f.name: value})
                    if f.name in ("value", "axis", "n"):
                        Chart(**{f.name: value})
                    if f.name in ("a", "b", "c", "d") and not column(value):
                        raise ValueError(
                            f"{f.name} = {value[:60]!r} is not run~solver~NFE~grid~weights~head"
                        )
                    found[f.name] = value
                except ValueError as e:
                    wrong.append(str(e))
    return found, wrong


def column(text: str) -> dict:
    "A column of the comparison from the address: {} if it is not one."
    parts = text.split("~")
    found = {
        k: int(v) if k in ("amount", "head") and v.isdecimal() and len(v) < 9 else v
        for k, v in zip(COLUMN, parts)
    }
    fine = (
        len(parts) == len(COLUMN)
        and isinstance(found["amount"], int)
        and isinstance(found["head"], int)
        and found["grid"] in (*GRIDS, NATIVE)
        and found["weights"] in ("ema", "raw")
    )
    return found if fine else {}


def columns(found: dict) -> list:
    "All four columns the address asks for; `none` where it does not."
    return [column(found.get(letter.lower(), "")) or {"run": NONE} for letter in LETTERS]
