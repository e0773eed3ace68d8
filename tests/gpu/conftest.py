"""Skips the tests of groups where there are too few cards for their ranks."""

import pytest
import torch


@pytest.fixture(scope="session")
def tp_size(tp_size):
    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"needs {tp_size} CUDA devices")
    return tp_size
