"""Render README.md from nbs/index.ipynb with nbconvert: cells marked `#| hide` go, links are
rewritten from nbs/ to the root. The list of notebooks in docs/structure.md comes from their titles.

python tools/readme.py
"""

import json
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "docs/index_files"
ROOMS = re.compile(r"(<!-- rooms: .*?-->).*(<!-- end of rooms -->)", re.S)
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#|/)([^)\"\s]+)")


def render(index: Path = ROOT / "nbs" / "index.ipynb") -> tuple[str, dict]:
    "README's text, and the pictures that its output cells hold: path from the root -> bytes."
    book = nbformat.read(index, 4)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(
                lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), cell.source
            )
    config = Config()
    config.RegexRemovePreprocessor.patterns = [r"#\|\s*hide"]
    exporter = MarkdownExporter(config=config)
    exporter.register_preprocessor("nbconvert.preprocessors.RegexRemovePreprocessor", enabled=True)
    text, resources = exporter.from_notebook_node(
        book, {"output_files_dir": FIGURES, "unique_key": "index"}
    )
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", text), resources.get("outputs", {})


def list_rooms(root: Path = ROOT) -> str:
    "A table of the notebooks: name, and the line under its title."
    rows = ["| notebook | holds |", "| --- | --- |"]
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        head = "\n".join("".join(cell["source"]) for cell in cells[:3])
        subtitle = re.search(r"^> (.+)$", head, re.M)
        if path.stem != "index":
            text = subtitle[1] if subtitle else ""
            rows.append(f"| [{path.stem}](../nbs/{path.name}) | {text} |")
    return "\n".join(rows)


def render_structure(root: Path = ROOT) -> str:
    "The text of docs/structure.md with the present list of notebooks."
    text = (root / "docs" / "structure.md").read_text()
    rooms = list_rooms(root)
    return ROOMS.sub(lambda m: f"{m[1]}\n\n{rooms}\n\n{m[2]}", text)


if __name__ == "__main__":
    text, figures = render()
    (ROOT / "README.md").write_text(text)
    (ROOT / "docs" / "structure.md").write_text(render_structure())
    for name, data in figures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
