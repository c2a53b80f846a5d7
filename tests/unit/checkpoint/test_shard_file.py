"""Shards: any cut of the parameters is read back by any other cut; damage is told."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ssgen_ds.checkpoint.shard_file import FileEntry, ShardPart, ShardReader, write_shard


def write(folder: Path, cuts: dict[str, list[int]], ranks: int) -> tuple[list[Path], dict[str, torch.Tensor]]:
    """Parameters `a`, `b`, ... cut at `cuts` and dealt to the ranks; returns the files and the whole parameters."""
    whole = {name: torch.arange(points[-1]).float() + 1000 * i for i, (name, points) in enumerate(cuts.items())}
    files = []
    for rank in range(ranks):
        parts = []
        for name, points in cuts.items():
            for number, (low, high) in enumerate(pairwise(points)):
                if number == rank and low < high:
                    weight = whole[name][low:high]
                    tensors = {"weight": weight, "exp_avg": -weight}
                    parts.append(ShardPart(name, low, (points[-1],), 7.0 + rank, tensors))
        files.append(folder / f"shard-{rank}.safetensors")
        write_shard(files[-1], parts)
    return files, whole


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), readers=st.integers(1, 4))
def test_any_cut_is_read_by_any_other(tmp_path_factory, data, ranks, readers):
    folder = tmp_path_factory.mktemp("shards")
    cuts = {}
    for name in "ab":
        size = data.draw(st.integers(1, 30))
        inner = sorted(data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)))
        cuts[name] = [0, *inner, size]
    files, whole = write(folder, cuts, ranks)
    with ShardReader(files) as reader:
        for name, value in whole.items():
            for reader_rank in range(readers):
                low, high = (k * len(value) // readers for k in (reader_rank, reader_rank + 1))
                for kind, sign in (("weight", 1), ("exp_avg", -1)):
                    out = torch.full((high - low,), float("nan"))
                    reader.read(kind, name, low, out)
                    assert torch.equal(out, sign * value[low:high])
            assert torch.equal(reader.whole(name), value)
            assert sorted(reader.kinds(name)) == ["exp_avg", "weight"]


def test_a_shard_is_a_safetensors_file(tmp_path):
    files, whole = write(tmp_path, {"layer.0": [0, 2, 5]}, 2)
    assert torch.equal(load_file(files[1])["weight:layer.0"], whole["layer.0"][2:])
    assert (int.from_bytes(files[0].read_bytes()[:8], "little") + 8) % 8 == 0


def test_lower_precision_and_nothing_at_all(tmp_path):
    part = ShardPart("x", 0, (2, 2), 0.0, {"weight": torch.tensor([1.5, -2, 3, 4], dtype=torch.bfloat16)})
    entry = write_shard(tmp_path / "one", [part])
    assert entry == FileEntry.of(tmp_path / "one") and entry.problem(tmp_path / "one") == ""
    write_shard(tmp_path / "none", [])
    with ShardReader([tmp_path / "one", tmp_path / "none"]) as reader:
        assert reader.whole("x").tolist() == [[1.5, -2], [3, 4]]
        assert reader.step("x") == 0.0


def test_a_gap_and_a_file_of_another_kind_are_errors(tmp_path):
    files, _ = write(tmp_path, {"a": [0, 4, 9]}, 2)
    with ShardReader(files[:1]) as reader, pytest.raises(OSError, match=r"lack 5 of 9 values of a \(weight\)"):
        reader.whole("a")
    with ShardReader(files) as reader, pytest.raises(OSError, match="lack 3 of 3 values of z"):
        reader.read("weight", "z", 0, torch.empty(3))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(OSError, match="text: not a shard of a checkpoint"):
        ShardReader([tmp_path / "text"])


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    entry = FileEntry.of(file)
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    file.write_bytes(b"ab")
    assert entry.problem(file).endswith("2 bytes instead of 3 (truncated)")
    file.write_bytes(b"abd")
    assert entry.problem(file).endswith("its content has changed (SHA-256 differs)")
    file.unlink()
    assert entry.problem(file).endswith("missing")
    assert "directory" in FileEntry(tmp_path.stat().st_size, "").problem(tmp_path).lower()


def test_scales_of_blocks_are_given_to_each_value(tmp_path):
    """A part that begins at the 250th value of its block of 256: six values of one scale, then the next."""
    codes = torch.arange(20, dtype=torch.uint8)
    tensors = {"weight": torch.zeros(20), "state1": codes, "absmax1": torch.tensor([2.0, 5.0])}
    write_shard(tmp_path / "a", [ShardPart("p", 100, (400,), 3.0, tensors, phase=250)])
    with ShardReader([tmp_path / "a"]) as reader:
        scales, read = torch.empty(10), torch.empty(10, dtype=torch.uint8)
        reader.read("absmax1", "p", 103, scales)
        reader.read("state1", "p", 103, read)
    assert scales.tolist() == [2.0] * 3 + [5.0] * 7
    assert torch.equal(read, codes[3:13])


def test_a_shard_is_on_the_disk_when_it_is_written(tmp_path, monkeypatch):
    """All of it: its size at the moment of the fsync is what the index says."""
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size) or sync(number))
    parts = [ShardPart("a", 0, (5,), 1.0, {"weight": torch.arange(5.0)})]
    entry = write_shard(tmp_path / "shard", parts)
    assert synced == [entry.size] == [(tmp_path / "shard").stat().st_size]
