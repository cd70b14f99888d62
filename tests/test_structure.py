"""The structure of the house: generated files are up to date, notebooks are lean, imports go
downhill, and the code keeps the rules of CONTRIBUTING.md, read from its syntax trees.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted((ROOT / "cudlab").glob("[!_]*.py"))
APPS = sorted((ROOT / "apps").rglob("*.py"))
CODE = [*MODULES, *APPS, *sorted((ROOT / "tools").rglob("*.py"))]
OTHERS = [p for folder in ("tests", "bench") for p in sorted((ROOT / folder).glob("*.py"))]
LIGHT = {"torch", "numpy", "safetensors", "filelock", "cudlab"} | set(sys.stdlib_module_names)
LAST_LIGHT = 37  # the last notebook whose module needs nothing else
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@cache
def tree_of(path):
    return ast.parse(path.read_text())


@cache
def cells_of(path):
    return json.loads(path.read_text())["cells"]


def source_of(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [(i, source_of(c)) for i, c in enumerate(cells_of(path)) if c["cell_type"] == "code"]


@cache
def numbers():
    "Module name -> number of the notebook it comes from."
    table = {}
    for path in NOTEBOOKS:
        number = re.match(r"\d+", path.name)
        for _, source in code_cells(path):
            if found := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M):
                table[found[1]] = int(number[0]) if number else None
    return table


# Generated files


def generated_files(root):
    files = [*(root / "cudlab").glob("*.py"), *(root / "nbs").glob("*.ipynb")]
    return {p.relative_to(root): p.read_bytes() for p in files}


def test_export_and_clean_change_nothing(tmp_path):
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("cudlab", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    export = [sys.executable, ROOT / "tools" / "export.py", tmp_path]
    for command in (export, [Path(sys.executable).with_name("nbdev-clean")]):
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    here, there = generated_files(ROOT), generated_files(tmp_path)
    stale = [str(name) for name in sorted(here | there) if here.get(name) != there.get(name)]
    assert not stale, f"run `make prepare`: {', '.join(stale)}"


def test_readme_is_the_index(monkeypatch):
    pytest.importorskip("nbconvert")
    monkeypatch.syspath_prepend(ROOT / "tools")
    from readme import render

    text, figures = render()
    assert text == (ROOT / "README.md").read_text(), "run `make prepare`"
    for name, data in figures.items():
        assert (ROOT / name).read_bytes() == data, f"{name}: run `make prepare`"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"(?:\]\(|(?:src|href)=\")(?![a-z]+:|#)([^)\s\"]+)", text)
    broken = [link for link in links if not (ROOT / link.split("#")[0]).exists()]
    assert not broken, str(broken)


# Modules


def test_module_names_are_unique_and_numbered():
    assert set(numbers()) == {p.stem for p in MODULES}
    assert None not in numbers().values()


def imported_modules(node):
    "Names of the package's modules that an import statement names."
    if isinstance(node, ast.Import):
        return [a.name.split(".")[1] for a in node.names if a.name.startswith("cudlab.")]
    if not isinstance(node, ast.ImportFrom):
        return []
    package, _, module = (node.module or "").partition(".")
    if node.level:
        package, module = "cudlab", node.module
    if package != "cudlab":
        return []
    names = [module.split(".")[0]] if module else [a.name for a in node.names]
    return [name for name in names if name != "templates"]  # which import nothing of the package


def test_imports_go_downhill():
    uphill = []
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            for name in imported_modules(node):
                if not name.startswith("_") and numbers()[name] >= numbers()[path.stem]:
                    uphill.append(f"{path.name}:{node.lineno} imports {name}")
            if isinstance(node, ast.ImportFrom):
                assert node.names[0].name != "*", f"{path.name}:{node.lineno}: star import"
    assert not uphill, str(uphill)


def test_core_is_light():
    "A bare machine trains and samples; anything else is imported where it is used."
    heavy = []
    for path in MODULES:
        for node in tree_of(path).body if (numbers()[path.stem] or 0) <= LAST_LIGHT else ():
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            heavy += [f"{path.name}: {name}" for name in names if name.split(".")[0] not in LIGHT]
    assert not heavy, str(heavy)


def is_unsafe(node):
    "Whether a statement unpickles, evaluates or runs what it has read."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
        return bool(UNSAFE & {m.split(".")[0] for m in modules})
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    return (
        name in ("eval", "exec", "yaml.load", "os.system", "numpy.loads")
        or (name == "torch.load" and given.get("weights_only") != "True")
        or given.get("weights_only") == "False"
        or given.get("allow_pickle") == "True"
        or given.get("shell") == "True"
    )


def test_nothing_runs_code_from_files():
    for path in MODULES + APPS:
        if path.name == "pickles.py":
            continue  # the reader that has nothing to call; tests/test_borrowed.py attacks it
        assert not [n.lineno for n in ast.walk(tree_of(path)) if is_unsafe(n)], path


# Rules of the house: each test lists all that break one


def longer_on_purpose():
    "Functions that CONTRIBUTING.md excepts: `module.function` on lines of their own."
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^Longer on purpose: (.+)$", text, re.M)
    return {name.strip(" `.") for line in listed for name in line.split(",")}


def test_modules_have_at_most_450_lines():
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in CODE}
    found = {name: size for name, size in sizes.items() if size > 450}
    assert not found, str(found)


def test_functions_have_at_most_60_lines():
    sizes = {}
    for path in CODE:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, FUNCTIONS):
                sizes[f"{path.stem}.{node.name}"] = node.end_lineno - node.lineno + 1
    excepted = longer_on_purpose()
    found = {k: size for k, size in sizes.items() if size > 60 and k not in excepted}
    assert not found, str(found)


def test_cells_have_at_most_60_lines():
    found = {}
    for path in NOTEBOOKS:
        sizes = {i: len(source.splitlines()) for i, source in code_cells(path)}
        found |= {f"{path.stem} cell {i}": size for i, size in sizes.items() if size > 60}
    assert not found, str(found)


def test_lines_have_at_most_100_columns():
    found = []
    for path in CODE + OTHERS:
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{path.name}:{i}" for i, line in lines if len(line) > 100]
    for path in NOTEBOOKS:
        for i, source in code_cells(path):
            if max(map(len, source.splitlines()), default=0) > 100:
                found.append(f"{path.name} cell {i}")
    assert not found, str(found)


def test_no_conditional_expression_is_nested():
    found = []
    for path in CODE + OTHERS:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.IfExp):
                parts = (node.test, node.body, node.orelse)
                if any(isinstance(part, ast.IfExp) for part in parts):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found, str(found)


def test_no_lambda_has_a_name():
    found = []
    for path in CODE + OTHERS:
        for node in ast.walk(tree_of(path)):
            named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if named and isinstance(node.value, ast.Lambda):
                found.append(f"{path.name}:{node.lineno}")
    assert not found, str(found)


def bound_names(scope):
    "Names that a function or lambda binds, those of the functions inside it included."
    bound, shared = set(), set()
    for node in ast.walk(scope):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, (*FUNCTIONS, ast.ExceptHandler)) and node is not scope:
            bound.add(node.name)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            shared |= set(node.names)
    return bound - shared


def local_names(tree):
    "Every name that a function, lambda or comprehension of a module binds."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            found |= bound_names(node)
        elif isinstance(node, ast.comprehension):
            found |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    return found


def test_no_local_hides_a_function_of_the_package():
    functions = {n.name for p in MODULES for n in tree_of(p).body if isinstance(n, FUNCTIONS)}
    hidden = {path.stem: functions & local_names(tree_of(path)) for path in MODULES}
    found = {module: names for module, names in hidden.items() if names}
    assert not found, str(found)


def public_names(tree):
    "What a module defines at its top: functions, classes and values."
    found = set()
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_no_two_modules_share_a_public_name():
    homes = defaultdict(list)
    for path in MODULES:
        for name in public_names(tree_of(path)):
            homes[name].append(path.stem)
    found = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not found, str(found)


# Notebooks


def test_notebooks_are_lean():
    for path in NOTEBOOKS:
        assert path.stat().st_size < 300_000, f"{path.name}: {path.stat().st_size:,} bytes"
        book = json.loads(path.read_text())
        nbformat.validate(nbformat.from_dict(book))
        assert "widgets" not in book["metadata"], f"{path.name}: widget state"
        for i, cell in enumerate(book["cells"]):
            where = f"{path.name} cell {i}"
            assert cell.get("execution_count") is None, f"{where}: run nbdev-clean"
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error", f"{where}: a saved error"
                alone = list(output.get("data", {})) == ["application/vnd.jupyter.widget-view+json"]
                assert not alone, f"{where}: a widget without a static picture"


def test_notebooks_open_with_title_and_subtitle():
    for path in NOTEBOOKS:
        if path.name[0].isdigit():
            first = cells_of(path)[0]
            assert first["cell_type"] == "markdown", path
            assert re.match(r"# .+\n\n> .+", source_of(first)), path


def test_jobs_keep_their_parameters_tag():
    for name in ("train", "evaluate"):
        cells = cells_of(ROOT / "nbs" / f"{name}.ipynb")
        (tagged,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        kinds = [type(node) for node in ast.parse(source_of(tagged)).body]
        assert ast.Assign in kinds or ast.AnnAssign in kinds, name


# Packaging


@cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins():
    "The tested version of each package."
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and line[0] != "#")


def test_version_has_one_home():
    text = (ROOT / "cudlab" / "__init__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', text)[1]
    assert "version" in project()["dynamic"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_requirement():
    extras = {k: v for k, v in project()["optional-dependencies"].items() if k != "all"}
    asked = sum(extras.values(), project()["dependencies"])
    missing = {re.match(r"[\w.-]+", r)[0].lower() for r in asked} - set(pins())
    assert not missing
    assert pins()["torch"] == "2.13.0" and not any("+" in v for v in pins().values())


def test_every_pinned_package_runs_on_the_oldest_python():
    from packaging.specifiers import SpecifierSet

    oldest = project()["requires-python"].removeprefix(">=") + ".0"
    for name in pins():
        try:
            asks = metadata(name).get("Requires-Python")
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        assert not asks or SpecifierSet(asks).contains(oldest), f"{name} asks for Python {asks}"
