"""The checks of the allocator run in a process of their own: free memory of earlier tests would serve their tensors."""

import subprocess
import sys
from pathlib import Path


def test_in_a_fresh_process():
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "allocator_checks.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
