"""What all tests share."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports kernels.py: they run on CPU tensors


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped on a machine without one; `pytest -m gpu` runs only them."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def one_thread():
    """For small tensors: threads cost more than they bring, and sums are the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """The server of test_resume.py that starts scripts as forks: one for all files, as its imports take seconds."""
    from test_resume import Forks
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()
