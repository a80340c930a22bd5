"""Memory that a step leaves is that of the next one."""

import platform
import subprocess
import sys

import pytest

_STEPS = """
import resource
import sys
import torch
from trainers.allocator import keep_freed_memory

kept = sys.argv[1] == "kept" and keep_freed_memory()
assert kept == (sys.argv[1] == "kept")
for step in range(30):
    if step == 20:  # aligned pieces make the heap grow a few times before all of them find room in it
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25).add(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_pages_are_fetched_once():
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", _STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("given back", "kept")
    )
    assert kept < 100 and given_back > 10 * 65536 - 100  # pages of 4 KiB for two tensors of 128 MiB, ten times
