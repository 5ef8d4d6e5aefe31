"""What holds for every test: one thread, a fresh seed, NaN in uninitialised memory, and the folder of real data."""

import os
from pathlib import Path

import pytest
import torch

from house import ROOT, find_data


def pytest_configure() -> None:
    # xdist already keeps the cores busy; more threads in each worker only fight for them.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # With deterministic algorithms torch fills what torch.empty and its relatives return, in C++ too, with NaN or with
    # the largest integer, so a value that is read before it is written cannot pass as a lucky zero. On an accelerator
    # the mode forbids operations that users do use, so tests marked gpu run without it.
    torch.use_deterministic_algorithms(item.get_closest_marker("gpu") is None)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # The result of a test does not depend on which tests its worker ran before.
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets. Skips the test where there is none, fails it under CI=true."""
    return find_data(os.environ, ROOT)
