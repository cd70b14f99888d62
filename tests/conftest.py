"""One thread a process, no telemetry, and nothing a test trains lands in the checkout."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"  # tests talk to this machine alone

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    # nohup and the background of a script leave them ignored, here and in every process of a test
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "long: of the long suite, `make test-all`")
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped where there is none")
    config.addinivalue_line(
        "markers", "browser: needs Chromium; a missing one fails in CI and skips elsewhere"
    )


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA here"))


@pytest.fixture(scope="session", autouse=True)
def runs_path():
    "What tests train goes to a temporary folder, also from the processes they start."
    with tempfile.TemporaryDirectory(prefix="cudlab-runs-") as folder:
        os.environ["CUDLAB_RUNS_PATH"] = folder
        yield Path(folder)
        os.environ.pop("CUDLAB_RUNS_PATH", None)


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return ROOT


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    "An empty folder of data sets, beside an empty cache."
    monkeypatch.setenv("CUDLAB_DATA_PATH", str(tmp_path / "data"))
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A finished run of two steps, to be copied and forged."
    from cudlab.config import Config
    from cudlab.create import create_run
    from cudlab.training import train

    tiny = dict(method="rf", data="moons", batch=8, steps=2, log_every=1, save_every=1, warmup=1)
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDLAB_RUNS_PATH", str(folder))
        list(train(create_run(Config(**tiny), "run")))
    return folder / "run"


def copy_of(good: Path, lab: Path, name: str = "forged") -> Path:
    "A copy of a run in a folder of runs."
    return Path(shutil.copytree(good, lab / name))


@pytest.fixture(scope="session")
def chromium():
    "Chromium's path; without one the test fails in CI and is skipped, visibly, elsewhere."
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if os.access(path, os.X_OK):
        return path
    message = f"no browser at {path}: apt-get install chromium, or set CHROMIUM"
    pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
