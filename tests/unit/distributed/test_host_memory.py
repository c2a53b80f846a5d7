"""What is free of the host's memory, and what glibc gives back."""

import platform
import subprocess
import sys

import pytest

from ssgen_ds.distributed.host_memory import _control_group_headroom
from tests.support.launch import ROOT

KEPT = """
import torch
from ssgen_ds.distributed.host_memory import return_freed_memory
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
torch.ones(2**22 * 7 // 4)  # 28 MiB: when it is freed, glibc raises its threshold
return_freed_memory()
before = resident()
tensors = [torch.ones(2**20) for _ in range(64)]
last = torch.ones(2**20)  # on top of the heap
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_tensors_go_back_to_the_system():
    """65 tensors of 4 MiB, 64 of which are freed; without the setting 256 MiB stay."""
    done = subprocess.run(
        [sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT
    )
    assert float(done.stdout) < 30


def test_control_group(tmp_path):
    """The lowest limit from this process's group upwards; pages of read files do not count as used."""
    root, job = tmp_path / "cgroup", tmp_path / "cgroup" / "slurm" / "job_7"
    own = tmp_path / "own"
    own.write_text("1:cpu:/elsewhere\n0::/slurm/job_7\n")
    assert _control_group_headroom(root, own) == float("inf")
    job.mkdir(parents=True)
    for folder, most, used, cached in ((job, "max", 300, 100), (job.parent, "1000", 500, 50)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\nfile {cached}\n")
    assert _control_group_headroom(root, own) == 550
    (job / "memory.max").write_text("600\n")
    assert _control_group_headroom(root, own) == 400
    assert _control_group_headroom(root, tmp_path / "missing") == float("inf")
