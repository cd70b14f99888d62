"""The README says what is so: its Python runs, its numbers come from a study, its links lead
somewhere, and it is short.
"""

import importlib.util
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def readme():
    "tools/readme.py as a module."
    pytest.importorskip("nbconvert")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_table(text, head):
    "The rows under a table's head: lists of texts, bold marks removed."
    lines = text[text.index(head) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("**", "") for cell in line.strip("|").split("|")])
    return rows


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 9000


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("plotly")
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "with 4 network calls" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"film.png", "tradeoff.html"}


def test_the_numbers_of_the_readme_come_from_the_study():
    names = {
        "rectified flow": "rectified flow",
        "CUD": "CUD w1 = w2",
        "CUD aimed at 8 steps": "CUD aim 8",
    }
    head = "| solver | training | NFE 1 |"
    study = {
        tuple(row[:2]): row[2:] for row in read_table((ROOT / "docs/aim.md").read_text(), head)
    }
    rows = read_table(README, "| training | solver | 1 |")
    assert len(rows) == 6
    for training, solver, *values in rows:
        all_values = study[solver.lower(), names[training]]
        assert values == [all_values[k].split(" ±")[0] for k in (0, 1, 3, 5, 6)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)", page.read_text())
    broken = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not broken


def test_the_list_of_notebooks_is_up_to_date(readme):
    text = (ROOT / "docs" / "structure.md").read_text()
    assert readme.render_structure() == text, "run `make prepare`"
