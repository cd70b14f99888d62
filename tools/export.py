"""Export the notebooks to cudlab/, in the lab's format: nbdev-export, then ruff at 100 columns.

python tools/export.py [ROOT]
"""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parents[1]
NAMES = re.compile(r"^__all__ = \[([^\]]*)\]$", re.M)
ABSOLUTE = re.compile(r"^( *)from cudlab\.(\w+) import \(", re.M)  # nbdev leaves these


def wrap_names(text: str) -> str:
    "The text of a module with its `__all__` in lines of 100 columns, several names a line."
    return NAMES.sub(
        lambda m: (
            fill(f"__all__ = [{' '.join(m[1].split())}]", 84, subsequent_indent=" " * 11)
            + "  # fmt: skip"
        ),
        text,
        count=1,
    )


def export(root: Path = ROOT) -> None:
    "Write every module of the package anew."
    tools = Path(sys.executable).parent
    subprocess.run([tools / "nbdev-export"], cwd=root, check=True)
    for path in (root / "cudlab").glob("[!_]*.py"):
        text = ABSOLUTE.sub(r"\1from .\2 import (", wrap_names(path.read_text()))
        path.write_text(text)
    subprocess.run([tools / "ruff", "format", "-q", "cudlab"], cwd=root, check=True)


if __name__ == "__main__":
    export(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
