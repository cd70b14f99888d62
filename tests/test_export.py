"""The notebooks are the source: what is generated from them is up to date, and what is committed of
them is lean.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "cudlab").glob("*.py") if not p.name.startswith("_"))
JOBS = ["train.ipynb", "evaluate.ipynb"]
LIGHT = {"torch", "numpy", "safetensors", "cudlab"}


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.name)


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def number(path):
    found = re.match(r"\d+", path.name)
    return int(found[0]) if found else None


def exports():
    "Module name -> number of the notebook it comes from."
    table = {}
    for path in NOTEBOOKS:
        for cell in cells(path):
            if found := re.search(r"^#\|\s*default_exp\s+(\S+)", source(cell), re.M):
                table[found[1]] = number(path)
    return table


def test_export_and_clean_change_nothing(tmp_path):
    for name in ("cudlab", "nbs"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    for command in ("export", "clean"):
        done = subprocess.run(
            [Path(sys.executable).with_name(f"nbdev-{command}")],
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    files = {
        p.relative_to(r)
        for r in (ROOT, tmp_path)
        for d in ("cudlab", "nbs")
        for p in (r / d).rglob("*")
        if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts
    }
    stale = [
        str(f)
        for f in sorted(files)
        if not all((r / f).exists() for r in (ROOT, tmp_path))
        or (ROOT / f).read_bytes() != (tmp_path / f).read_bytes()
    ]
    assert not stale, f"run `make prepare`: {', '.join(stale)}"


def test_readme_is_the_index():
    pytest.importorskip("nbconvert")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from readme import render
    finally:
        sys.path.pop(0)
    text, figures = render()
    assert text == (ROOT / "README.md").read_text(), "run `make prepare`"
    for name, data in figures.items():
        assert (ROOT / name).read_bytes() == data, f"{name}: run `make prepare`"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)", text) + re.findall(
        r"(?:src|href)=\"(?![a-z]+:|#)([^\"]+)", text
    )
    broken = [link for link in links if not (ROOT / link.split("#")[0]).exists()]
    assert not broken


def test_module_names_are_unique_and_numbered():
    table = exports()
    assert set(table) == {p.stem for p in MODULES}
    assert None not in table.values()


@each(MODULES)
def test_imports_go_downhill(path):
    table = exports()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "cudlab":
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cudlab."):
            names = [node.module.split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("cudlab.")]
        for name in names:
            if not name.startswith("_"):
                assert table[name] < table[path.stem], (
                    f"{path.name}:{node.lineno} imports {name}, which comes later"
                )
        assert not any(a.name == "*" for a in getattr(node, "names", [])), (
            f"{path.name}:{node.lineno}: star import"
        )


@each([p for p in MODULES if (exports().get(p.stem) or 0) <= 20])
def test_core_is_light(path):
    """A bare machine trains and samples with torch, numpy and safetensors; anything else is
    imported where it is used.
    """
    for node in ast.parse(path.read_text()).body:
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        heavy = [n for n in names if n.split(".")[0] not in LIGHT | set(sys.stdlib_module_names)]
        assert not heavy, f"{path.name}:{node.lineno} imports {heavy[0]} at module level"


@each([p for folder in ("cudlab", "apps") for p in sorted((ROOT / folder).rglob("*.py"))])
def test_nothing_runs_code_from_files(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & {
                m.split(".")[0] for m in modules
            }, where
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec", "yaml.load", "os.system", "numpy.loads"), where
            assert (
                given.get("weights_only") != "False"
                and given.get("allow_pickle") != "True"
                and given.get("shell") != "True"
            ), where
            assert name != "torch.load" or given.get("weights_only") == "True", (
                f"{where}: torch.load without weights_only=True"
            )


@each(NOTEBOOKS)
def test_notebook_is_lean(path):
    assert path.stat().st_size < 300_000, f"{path.stat().st_size:,} bytes"
    book = json.loads(path.read_text())
    assert "widgets" not in book["metadata"], "widget state: clear it before saving"
    for i, cell in enumerate(book["cells"]):
        assert cell.get("execution_count") is None, f"cell {i}: execution count; run nbdev-clean"
        assert not any(o.get("output_type") == "error" for o in cell.get("outputs", [])), (
            f"cell {i}: a saved error"
        )
        assert not any(
            "application/vnd.jupyter.widget-view+json" in o.get("data", {}) and len(o["data"]) == 1
            for o in cell.get("outputs", [])
        ), f"cell {i}: a widget without a static picture"
    nbformat.validate(nbformat.read(path, 4))


@each([p for p in NOTEBOOKS if number(p) is not None])
def test_notebook_opens_with_title_and_subtitle(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n\n> .+", source(first))


@pytest.mark.parametrize("name", JOBS)
def test_jobs_keep_their_parameters_tag(name):
    path = ROOT / "nbs" / name
    if not path.exists():
        pytest.skip(f"nbs/{name} is not written yet")
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = [
        n for n in ast.parse(source(tagged[0])).body if isinstance(n, (ast.Assign, ast.AnnAssign))
    ]
    assert names, "the parameters cell assigns nothing"


def test_version_has_one_home():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "cudlab" / "__init__.py").read_text())[1]
    assert (
        "version" in project["dynamic"] and f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_constraints_pin_every_requirement():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    asked = project["dependencies"] + [
        r for k, v in project["optional-dependencies"].items() if k != "all" for r in v
    ]
    missing = {re.match(r"[\w.-]+", r)[0].lower() for r in asked} - set(pins)
    assert not missing and pins["torch"] == "2.13.0" and not any("+" in v for v in pins.values())


def test_every_pinned_package_runs_on_the_oldest_python():
    import tomllib
    from importlib.metadata import PackageNotFoundError, metadata

    from packaging.specifiers import SpecifierSet

    oldest = (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "requires-python"
        ].removeprefix(">=")
        + ".0"
    )
    refused = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" not in line or line[0] == "#":
            continue
        try:
            asks = metadata(line.split("==")[0])["Requires-Python"]
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        if asks and not SpecifierSet(asks).contains(oldest):
            refused.append(f"{line} asks for Python {asks}")
    assert not refused
