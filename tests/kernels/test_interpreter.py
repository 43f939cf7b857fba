"""Triton decides at a kernel's definition whether to interpret it: the interpreter gets its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmu_kernels.backend import INTERPRETED, TRITON_INSTALLED


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpret and not slow"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*command, str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
