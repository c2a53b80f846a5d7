"""The process group's end when something hangs, and its device where each rank sees its own GPUs."""

import socket
import subprocess
import sys

import pytest
import torch

from ssgen_ds.distributed import process_group as distributed
from ssgen_ds.errors import RankError, UserError
from tests.support.launch import environment as process_environment


def test_a_group_that_does_not_end_does_not_keep_the_process() -> None:
    """NCCL's destroy_process_group blocks after a failure; gloo's never does."""
    program = (
        "import sys, time\n"
        "from ssgen_ds.distributed import process_group as distributed\n"
        "distributed._END_SECONDS = 1.0\n"
        "distributed.dist.destroy_process_group = lambda: time.sleep(600)\n"
        "distributed._leave_group()\n"
        "print('says what it has to say', flush=True)\n"
        "time.sleep(600)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=process_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "says what it has to say\n" and done.returncode == 1


FAILING_RANK = """
import sys, time, torch
from ssgen_ds.distributed import process_group as distributed
from ssgen_ds.distributed.launch import guarded
distributed._END_SECONDS = 3.0

def leave():
    print("leaves the group", file=sys.stderr, flush=True)
    time.sleep(600)  # as NCCL, whose peer has left a collective

distributed.dist.destroy_process_group = leave

def main(arguments):
    with distributed.process_group() as world, world.phase("train", 1):
        if world.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB.")
        world.sum(1.0)

guarded(main, [])
"""


def test_a_rank_that_fails_ends_though_leaving_the_group_would_block() -> None:
    """As srun starts them: nobody kills the other rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING_RANK],
            env=process_environment() | {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 2]
    assert "out of memory in train" in said[0] and "out of memory in train" in said[1]
    assert "leaves the group" not in said[1] and "Timeout" not in said[1], "it ended by itself, and waited for nobody"


SRUN_RANK = """
import os, sys, torch
from ssgen_ds.distributed import process_group as distributed
from deepspeed.accelerator import get_accelerator
import deepspeed
kind = type(get_accelerator())
asked = []

def set_device(self, index):
    index = index if isinstance(index, int) or index is None else index.index
    asked.append(index)
    if index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")  # as CUDA says where one GPU is visible

kind.set_device = set_device
kind.device_name = lambda self, index=None: "cpu"
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
distributed._gpu_id = lambda index: f"GPU-{index}"
visible = distributed._place
def place():
    os.environ.pop("DS_ACCELERATOR")
    found, _ = visible()
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.cuda.is_available = lambda: False
    return found, False
distributed._place = place
with distributed.process_group() as world:
    assert world.local_rank == 3
    for stage in (0, 3):
        model = torch.nn.Linear(4, 4)
        config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        if stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
print("devices", sorted({index for index in asked if index is not None}))
"""


def test_deepspeed_takes_the_one_gpu_that_srun_shows_this_rank() -> None:
    """`srun --gpus-per-task=1`: local rank 3 sees one GPU, number 0. DeepSpeed takes LOCAL_RANK for the device."""
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SRUN_RANK],
        env=process_environment() | given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "devices [0]"


def test_a_launcher_that_shows_all_gpus_keeps_the_local_rank(monkeypatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "_gpu_id", lambda index: f"GPU-{index}")
    for gpus, local_rank in ((2, "1"), (8, "1"), (1, "0")):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        place, on_gpu = distributed._place()
        assert on_gpu and place.local_rank == 1
        assert distributed.os.environ["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' shows no GPU: unset it, name some"),
        ({"CUDA_VISIBLE_DEVICES": "9"}, "CUDA_VISIBLE_DEVICES='9' shows no GPU: unset it, name some"),
        ({}, "there is an NVIDIA driver, but torch (no CUDA: the CPU build) sees no GPU"),
        ({"DS_ACCELERATOR": "cpu"}, None),
    ],
)
def test_a_gpu_that_is_hidden_is_not_replaced_by_the_cpu(environment, told, monkeypatch, tmp_path) -> None:
    """A run would go on there, a hundred times slower, and say nothing."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_DRIVER", tmp_path)  # it exists
    place, _ = distributed._place()
    if told is None:
        assert place.problem == ""
        return
    assert place.problem.startswith(told) and place.problem.endswith("or set DS_ACCELERATOR=cpu to train on the CPU")
    with pytest.raises(UserError, match="DS_ACCELERATOR=cpu"), distributed.process_group():
        pass


def test_a_gpu_that_cannot_be_used_is_one_message(monkeypatch) -> None:
    """Of a GPU in exclusive mode CUDA says so at its first use."""

    def busy(device: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might ...")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(RankError, match=r"^GPU 1 of \S+ cannot be used: CUDA error: all .* unavailable; `nvidia-smi`"):
        distributed._device(True, 1, 2)
