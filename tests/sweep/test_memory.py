"""Freed memory goes back to the system."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from compress.sweep.memory import return_large_at_once

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

if {first}:
    return_large_at_once()
for size in (24, 28, 30, 31):  # each freed one raises glibc's threshold to its own size
    torch.zeros(size * 2**18)
before = resident()
large = [torch.ones(4 * 2**18) for _ in range(50)]
keep = [torch.ones(3 * 2**18)]  # lies above them in the heap, so that a heap can't shrink
del large
print(resident() - before)
"""


def held(first: bool) -> float:
    """MiB that a process still holds after freeing 200 MiB of tensors."""
    command = [sys.executable, "-c", SCRIPT.format(first=first)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_large_tensors_are_given_back_when_freed() -> None:
    assert held(first=True) < 10
