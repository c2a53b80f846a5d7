"""Moments into a checkpoint and back: by hand in float32, and with bitsandbytes' own optimizer in 8 bits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ssgen_ds.checkpoint.fragments import Fragment
from ssgen_ds.checkpoint.moments import is_8bit, load_8bit, load_float, saved_states
from ssgen_ds.checkpoint.shard_file import BLOCK, ShardPart, ShardReader, write_shard
from ssgen_ds.errors import UserError

SIZE = 5000  # values of a parameter: 19 blocks and a part of one; smaller ones than 4096 keep their moments in float32


def shards(folder: Path, *parts: ShardPart) -> ShardReader:
    """Of ranks that hold a part each."""
    files = [folder / f"shard-{rank}" for rank in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_shard(file, [part])
    return ShardReader(files)


def fragment(owner: torch.Tensor, start: int, numel: int, offset: int = 0) -> Fragment:
    """Of a parameter `p` of SIZE values."""
    return Fragment("p", (SIZE,), start, numel, owner, offset)


def optimizer_of(owner: torch.Tensor) -> Any:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit([torch.nn.Parameter(owner)], lr=0.1)


@pytest.fixture(scope="module")
def stepped() -> tuple[torch.Tensor, dict[str, Any]]:
    """A parameter and its state after two steps; its gradients grow tenfold with each block."""
    owner = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = optimizer_of(owner.data)
    (parameter,) = optimizer.param_groups[0]["params"]
    sizes = 10.0 ** (torch.arange(SIZE) // BLOCK % 5)
    for seed in range(2):
        parameter.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * sizes
        optimizer.step()
    return parameter, optimizer.state[parameter]


def part_of(parameter: torch.Tensor, state: dict[str, Any], low: int, high: int) -> ShardPart:
    tensors = {"weight": parameter.detach()[low:high]} | saved_states(state, parameter, low, high - low)
    return ShardPart("p", low, (SIZE,), float(state["step"]), tensors, low % BLOCK)


def values_of(state: dict[str, Any], number: int) -> torch.Tensor:
    """What the codes of a moment stand for."""
    codes = state[f"state{number}"].view(-1)
    return state[f"qmap{number}"][codes.long()] * state[f"absmax{number}"].repeat_interleave(BLOCK)[: len(codes)]


def test_states_of_a_part_are_views_of_it() -> None:
    owner, step = torch.zeros(2, 3), torch.tensor(4.0)
    state = {"step": step, "exp_avg": torch.arange(6.0).view(2, 3), "exp_avg_sq": torch.arange(6.0).view(2, 3) * 10}
    saved = saved_states(state, owner, offset=1, numel=3)
    assert {kind: value.tolist() for kind, value in saved.items()} == {"exp_avg": [1, 2, 3], "exp_avg_sq": [10, 20, 30]}
    saved["exp_avg"][0] = 7.0
    assert state["exp_avg"][0, 1] == 7.0


@pytest.mark.parametrize(
    ("offset", "numel", "scales"),
    [(0, 256, [0]), (0, 257, [0, 1]), (255, 1, [0]), (256, 256, [1]), (250, 263, [0, 1, 2]), (512, 88, [2])],
)
def test_scales_of_all_blocks_that_a_part_touches_are_saved(offset: int, numel: int, scales: list[float]) -> None:
    state = {
        "step": 1,
        "state1": torch.arange(600) % 256,
        "absmax1": torch.tensor([0.0, 1, 2]),
        "qmap1": torch.ones(256),
    }
    saved = saved_states(state, torch.zeros(600), offset, numel)
    assert saved.keys() == {"state1", "absmax1"}
    assert saved["absmax1"].tolist() == scales
    assert saved["state1"].tolist() == [place % 256 for place in range(offset, offset + numel)]


@pytest.mark.parametrize("value", [torch.zeros(2), 3, None])
def test_a_state_of_another_shape_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"train\.optimizer: its state row cannot be saved in parts"):
        saved_states({"row": value}, torch.zeros(3), 0, 3)


def test_moments_in_float32_are_read_into_their_places(tmp_path: Path) -> None:
    """An owner holds values 2 to 4 of the parameter behind a value of another one; its state has the owner's shape."""
    tensors = {"weight": torch.zeros(5), "exp_avg": torch.arange(5.0), "exp_avg_sq": torch.arange(5.0) * 10}
    owner, state = torch.zeros(2, 2), {"step": 3, "exp_avg_sq": torch.full((2, 2), -1.0)}
    with shards(tmp_path, ShardPart("p", 0, (5,), 3.0, tensors)) as reader:
        load_float(state, owner, fragment(owner, start=2, numel=3, offset=1), reader)
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].tolist() == [[0, 2], [3, 4]]
    assert state["exp_avg_sq"].tolist() == [[-1, 20], [30, 40]], "what was there of the other one stays"


def test_which_optimizers_keep_8_bits() -> None:
    assert is_8bit(optimizer_of(torch.zeros(2)))
    assert not is_8bit(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]))


@pytest.mark.parametrize("cuts", [[0, SIZE], [0, 1000, 1001, SIZE]])
def test_codes_and_scales_of_the_same_blocks_come_back_to_the_bit(stepped, tmp_path: Path, cuts: list[int]) -> None:
    parameter, state = stepped
    owner = torch.zeros(SIZE)
    with shards(tmp_path, *(part_of(parameter, state, *cut) for cut in pairwise(cuts))) as reader:
        loaded = load_8bit(optimizer_of(owner), owner, [fragment(owner, 0, SIZE)], reader)
    assert loaded.keys() == state.keys() and loaded["step"] == 2
    for kind in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
        assert torch.equal(loaded[kind], state[kind]) and loaded[kind].dtype == state[kind].dtype, kind


def test_padding_behind_the_last_value_changes_no_block(stepped, tmp_path: Path) -> None:
    """The last block holds 136 values and padding, and one behind it nothing else."""
    parameter, state = stepped
    owner = torch.zeros(21 * BLOCK)
    with shards(tmp_path, part_of(parameter, state, 0, SIZE)) as reader:
        loaded = load_8bit(optimizer_of(owner), owner, [fragment(owner, 0, SIZE)], reader)
    for number in (1, 2):
        assert torch.equal(loaded[f"absmax{number}"], torch.cat([state[f"absmax{number}"], torch.zeros(1)]))
        assert torch.equal(values_of(loaded, number)[:SIZE], values_of(state, number))
        assert not values_of(loaded, number)[SIZE:].any()


def test_other_blocks_are_encoded_again(stepped, tmp_path: Path) -> None:
    """The owner begins 100 values later: each value is off by the distance of two codes of its new block at most."""
    parameter, state = stepped
    owner = torch.zeros(SIZE - 100)
    with shards(tmp_path, part_of(parameter, state, 0, SIZE)) as reader:
        loaded = load_8bit(optimizer_of(owner), owner, [fragment(owner, 100, SIZE - 100)], reader)
    for number in (1, 2):
        before, after = values_of(state, number)[100:], values_of(loaded, number)
        widest = loaded[f"qmap{number}"].diff().max()
        scales = loaded[f"absmax{number}"].repeat_interleave(BLOCK)[: SIZE - 100]
        assert ((after - before).abs() <= widest * scales).all()
        assert torch.equal(loaded[f"absmax{number}"][0], before[:BLOCK].abs().max())


def test_a_small_parameter_has_its_moments_in_float32(stepped, tmp_path: Path) -> None:
    """Also where they were saved in 8 bits, in a greater owner."""
    parameter, state = stepped
    owner = torch.zeros(2, 150)
    with shards(tmp_path, part_of(parameter, state, 0, SIZE)) as reader:
        loaded = load_8bit(optimizer_of(owner), owner, [fragment(owner, 200, 300)], reader)
    assert loaded.keys() == {"step", "state1", "state2"}
    for number in (1, 2):
        assert torch.equal(loaded[f"state{number}"], values_of(state, number)[200:500].view(2, 150))
