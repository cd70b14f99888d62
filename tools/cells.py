"""Edit a notebook as plain text: `unpack` writes its cells to stdout, `pack` writes a text file
back into the notebook.

    python tools/cells.py unpack nbs/11_cud.ipynb > cud.txt
    python tools/cells.py pack cud.txt nbs/11_cud.ipynb

A line `#%% md`, `#%% py` or `#%% py tags=parameters` starts a cell. Packing keeps the id and the
outputs of every cell whose
source did not change, so a diff shows only what was edited.
"""

import hashlib
import re
import sys
from pathlib import Path

import nbformat

HEAD = re.compile(r"^#%% (md|py)(?: tags=(\S+))?$")


def unpack(notebook: Path) -> str:
    "The cells of a notebook as text."
    parts = []
    for cell in nbformat.read(notebook, 4).cells:
        tags = ",".join(cell.metadata.get("tags", []))
        kind = "md" if cell.cell_type == "markdown" else "py"
        parts.append(f"#%% {kind}{' tags=' + tags if tags else ''}\n{cell.source.strip()}\n")
    return "\n".join(parts)


def pack(text: str, notebook: Path) -> None:
    "Write text cells into a notebook, keeping ids and outputs of unchanged cells."
    old = {}
    if notebook.exists():
        for cell in nbformat.read(notebook, 4).cells:
            old.setdefault((cell.cell_type, cell.source), cell)
    cells, seen = [], set()
    kind, tags, lines = None, None, []

    def flush():
        source = "\n".join(lines).strip()
        if kind is None or not source:
            return
        cell_type = "markdown" if kind == "md" else "code"
        cell = old.get((cell_type, source))
        if cell is None:
            named = re.search(r"^(?:def|class) (\w+)", source, re.M)
            key = named.group(0) if named and kind == "py" else source
            digest = hashlib.sha1(f"{notebook.stem}:{kind}:{key}".encode()).hexdigest()[:8]
            new = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
            cell = new(source, id=digest)
        while cell.id in seen:
            cell = nbformat.from_dict(
                {**cell, "id": hashlib.sha1((cell.id + "+").encode()).hexdigest()[:8]}
            )
        seen.add(cell.id)
        cell.metadata = nbformat.from_dict({"tags": tags.split(",")} if tags else {})
        cells.append(cell)

    for line in text.splitlines():
        if match := HEAD.match(line):
            flush()
            kind, tags, lines = match.group(1), match.group(2), []
        else:
            lines.append(line)
    flush()
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    book = nbformat.v4.new_notebook(cells=cells, metadata=meta)
    nbformat.validate(book)
    notebook.write_text(nbformat.writes(book, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["unpack", notebook]:
            print(unpack(Path(notebook)), end="")
        case ["pack", text, notebook]:
            pack(Path(text).read_text(), Path(notebook))
        case _:
            sys.exit(__doc__)
