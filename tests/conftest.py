"""What all tests share."""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes at once: with more threads each waits for the other's
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, and by its children

import pytest
import torch

import kernels
from nanolab import run as experiment

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports fused/: kernels run on CPU tensors


# Files that take longest, longest first: with two processes none should be alone at the end.
LONG = ("resume", "killed", "limits", "facts_resume", "dvae", "steps", "kernels", "variants", "kernels_scripts", "mult",
        "dvae_resume", "worldmodel_resume", "scripts", "kernels_model", "kernels_step", "grid",
        "parallel")


def pytest_configure(config):
    """pytest-xdist starts files in the order of LONG, not those with the most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files first. Tests marked gpu are skipped on a machine without one; `pytest -m gpu` runs only them."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def bfloat16_sdpa():
    """Skips where torch refuses its own attention in bfloat16: on a processor with AMX that is told to be one of AVX2.
    """
    try:
        torch.nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 4, 64, 32, dtype=torch.bfloat16))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def torch_again():
    """After a test that went by "triton", a script's run say, the next begins as every process does."""
    yield
    kernels.use("torch")


@pytest.fixture
def by_triton():
    """kernels "triton": on a CPU operations are their references, inside `interpreted()` the kernels themselves."""
    with kernels.using("triton"):
        yield


@pytest.fixture
def put(request, monkeypatch):
    """Sets settings of the script that a test file imports as `w`, for one test."""
    def put(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(request.module.w, name, value)
    return put


@pytest.fixture
def in_process(capsys, monkeypatch):
    """in_process(tool, *words): (exit status, stdout, stderr) of `python TOOL WORDS`, in this process: the main() of a
    module, whose settings are put back."""
    def in_process(tool, *words):
        before, status = dict(vars(tool)), 0
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [Path(tool.__file__).name, *map(str, words)])
            try:
                tool.main()
            except SystemExit as end:
                status = end.code or 0
            finally:
                vars(tool).update(before)
        return (status, *capsys.readouterr())
    return in_process


@pytest.fixture
def undrawn(monkeypatch):
    """Runs in this process without curves: drawing them takes longer than all the rest of a small one."""
    monkeypatch.setattr(experiment, "draw_curves", lambda directory: None)


@pytest.fixture
def one_thread():
    """For small tensors: threads cost more than they bring, and sums are the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """The server of forks.py that starts scripts as forks: one for all files, as its imports take seconds."""
    from forks import Forks
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """2,500 lines that a tokenizer of pairs can be trained on."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(f"line {i % 17} of the {word} has a {word[::-1]}" for i in range(500) for word in
                              "river mountain valley forest lake".split()))
    return path
