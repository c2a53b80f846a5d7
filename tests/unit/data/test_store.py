"""The store: written once, reused, stable under order, and honest about every row that it left out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssgen_ds.data import store as store_module
from ssgen_ds.data.store import Store, build_store, split_store
from ssgen_ds.data.store_writer import id_hash
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import SourceConfig
from tests.unit.data.helpers import data_config


def rows_of(count: int) -> list[dict]:
    return [{"prompt": f"q{i}", "completion": f"a{i}", "id": f"n{i}"} for i in range(count)]


@pytest.fixture
def build(chatml, tmp_path: Path):
    def build(*sources: Path | SourceConfig, **settings: object) -> Store:
        data = data_config(*sources, **settings)
        return build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")

    return build


def test_examples_come_back_as_encoded(build, chatml, write_jsonl) -> None:
    file = write_jsonl(rows_of(600))
    store = build(file)
    chat = ChatFormat(chatml, data_config())
    assert len(store) == len(list(store)) == 600  # more than two batches on disk
    example = store[513]
    assert (example.id, example.gold_text, example.prompt_loss_mask) == ("n513", "a513", None)
    assert chat.decode(example.prompt_ids) == "<|im_start|>user\nq513<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(example.response_ids) == "a513<|im_end|>"
    assert store.where(513) == f"{file}:514"
    assert store[-1].id == "n599"
    with pytest.raises(IndexError):
        store[600]
    assert store.numbers("id_hash")[513] == id_hash("n513")


def test_second_start_reuses_and_any_change_rebuilds(build, write_jsonl, tmp_path: Path) -> None:
    file = write_jsonl(rows_of(3))
    first = build(file)
    arrow = first.folder / "examples.arrow"
    written = arrow.stat().st_mtime_ns
    assert build(SourceConfig(path=str(file), weight=3.0)).folder == first.folder
    assert arrow.stat().st_mtime_ns == written
    assert build(file, max_prompt_tokens=30).folder != first.folder
    assert build(file, system="s").fingerprint != first.fingerprint
    write_jsonl(rows_of(4))
    os.utime(file, ns=(1, 1))
    assert len(build(file)) == 4
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


def test_fingerprint_depends_on_order_and_content(build, write_jsonl) -> None:
    rows = rows_of(3)
    prints = [
        build(write_jsonl(variant, f"{name}.jsonl")).fingerprint
        for name, variant in {
            "a": rows,
            "same": rows,
            "order": rows[::-1],
            "id": [*rows[:2], rows[2] | {"id": "z"}],
        }.items()
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_bad_rows_stop_or_are_listed(build, write_jsonl, tmp_path: Path) -> None:
    file = write_jsonl(
        [*rows_of(2), "{oops", {"prompt": "q", "completion": ""}, {"prompt": "q" * 99, "completion": "a"}]
    )
    with pytest.raises(UserError) as caught:
        build(file)
    message = str(caught.value)
    assert message.startswith("data.train: 2 bad rows")
    assert f"{file}:3: not valid JSON" in message and f"{file}:4: the response is empty" in message
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-made is left
    store = build(file, on_bad_row="skip", over_length="skip", max_prompt_tokens=50)
    assert (store.summary.examples, store.summary.bad_rows, store.summary.over_length_rows) == (2, 2, 1)
    skipped = (store.folder / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 3 and skipped[1] == f"{file}:4: the response is empty"


def test_counts(build, write_jsonl) -> None:
    store = build(write_jsonl([{"prompt": "q" * 30, "completion": "a"}, {"prompt": "q", "completion": "abc"}]),
                  max_prompt_tokens=22, max_response_tokens=3)  # fmt: skip
    summary = store.summary
    assert (summary.truncated_prompts, summary.truncated_responses) == (1, 1)
    assert (summary.prompt_tokens, summary.response_tokens) == (22 + 20, 2 + 3)


def test_empty_sources_are_named(build, write_jsonl) -> None:
    empty = write_jsonl([], "empty.jsonl")
    with pytest.raises(UserError, match=r"data\.train: .*empty\.jsonl holds no rows"):
        build(write_jsonl(rows_of(2)), empty)
    with pytest.raises(UserError, match=r"all 1 rows were left out; the last: .*:1: the response is empty"):
        build(write_jsonl([{"prompt": "q", "completion": " "}], "bad.jsonl"), on_bad_row="skip")


def test_one_id_means_one_content(build, write_jsonl) -> None:
    rows = rows_of(3)
    assert len(build(write_jsonl([*rows, rows[0]], "equal.jsonl"))) == 4  # equal rows may share an id
    file = write_jsonl([*rows, rows[0] | {"completion": "other"}], "clash.jsonl")
    with pytest.raises(UserError, match=r"id 'n0': .*clash\.jsonl:[14] and .*clash\.jsonl:[14]"):
        build(file)
    assert len(build(file, columns={"id": ""})) == 4


def test_split_is_stable_and_keeps_equal_ids_together(build, write_jsonl) -> None:
    rows = rows_of(400)
    train, evaluation = split_store(build(write_jsonl(rows + rows[:50])), 0.25)
    ids = {example.id.removesuffix("#2") for example in evaluation}
    assert 70 < len(ids) < 130 and len(train) + len(evaluation) == 450
    assert ids.isdisjoint(example.id.removesuffix("#2") for example in train)
    _, reordered = split_store(build(write_jsonl(rows[::-1], "reversed.jsonl")), 0.25)
    assert {example.id for example in reordered} == ids
    assert train.fingerprint != evaluation.fingerprint
    assert train.numbers("source").shape == (len(train),)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_no_side_of_a_split_is_empty(build, write_jsonl, fraction: float) -> None:
    train, evaluation = split_store(build(write_jsonl(rows_of(2))), fraction)
    assert (len(train), len(evaluation)) == (1, 1)
    with pytest.raises(UserError, match=r"data\.eval_fraction"):
        split_store(build(write_jsonl(rows_of(1) * 2, "one.jsonl")), fraction)


def test_conversations_without_a_template_are_the_recipes_fault(plain, write_jsonl, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    data = data_config(write_jsonl([{"messages": turns}]), on_bad_row="skip")
    with pytest.raises(UserError, match=r"train\.jsonl:1: the tokenizer has no chat template"):
        build_store(data.train, data, ChatFormat(plain, data), tmp_path / "cache")


def test_a_faster_process_wins(build, write_jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write the same store; the slower finds it in place."""
    file = write_jsonl(rows_of(3))
    write = store_module.write_examples

    def slow_write(folder: Path, *arguments: object) -> None:
        monkeypatch.setattr(store_module, "write_examples", write)
        build(file)
        write(folder, *arguments)

    monkeypatch.setattr(store_module, "write_examples", slow_write)
    assert len(build(file)) == 3


GROW = """
import resource, sys
from pathlib import Path
from ssgen_ds.data.store import Store
folder = Path(sys.argv[1])
def rss():
    return int(Path("/proc/self/statm").read_text().split()[0]), int(
        next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
before = rss()[1]
store = Store(folder, (1.0,))
for index in range(0, len(store), 7):
    store[index]
print(rss()[1] - before, (folder / "examples.arrow").stat().st_size // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_reading_a_store_holds_no_examples_in_memory(build, write_jsonl) -> None:
    long_rows = [{"prompt": "q" * 900, "completion": f"{i} " + "a" * 900} for i in range(3000)]
    store = build(write_jsonl(long_rows), max_response_tokens=2000)
    result = subprocess.run(
        [sys.executable, "-c", GROW, str(store.folder)], capture_output=True, text=True, timeout=120, check=True
    )
    grown, size = map(int, result.stdout.split())
    assert size > 20_000 and grown < size / 3, (grown, size)


def test_part_of_a_part(build, write_jsonl) -> None:
    store = build(write_jsonl(rows_of(10)))
    part = store.part(np.array([8, 2, 5])).part(np.array([2, 0]))
    assert [example.id for example in part] == ["n5", "n8"]
    assert part.where(0).endswith(":6")


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(chatml, write_jsonl, monkeypatch) -> None:
    data = data_config(write_jsonl(rows_of(3)))
    with pytest.raises(UserError, match=r"^data.train: .* cannot be kept in /proc/none/data: .*set SSGEN_CACHE"):
        build_store(data.train, data, ChatFormat(chatml, data), Path("/proc/none/data"))


@pytest.mark.parametrize("named", [None, "store-1/examples.arrow"])
def test_a_full_disk_under_the_cache_is_named(chatml, write_jsonl, tmp_path, monkeypatch, named) -> None:
    def no_room(*args: object) -> None:
        raise OSError(28, "No space left on device", *([] if named is None else [str(tmp_path / named)]))

    monkeypatch.setattr(store_module, "write_examples", no_room)
    data = data_config(write_jsonl(rows_of(3)))
    with pytest.raises(UserError, match=rf"cannot be kept in {tmp_path}: No space left on device; set SSGEN_CACHE"):
        build_store(data.train, data, ChatFormat(chatml, data), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"], "nothing half is left"


def test_another_file_that_cannot_be_read_speaks_for_itself(chatml, write_jsonl, tmp_path, monkeypatch) -> None:
    def forbidden(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "/elsewhere/rows.jsonl")

    monkeypatch.setattr(store_module, "write_examples", forbidden)
    data = data_config(write_jsonl(rows_of(3)))
    with pytest.raises(PermissionError, match=r"/elsewhere/rows\.jsonl"):
        build_store(data.train, data, ChatFormat(chatml, data), tmp_path / "cache")


def test_the_longest_example_is_known_without_reading_any(build, write_jsonl, monkeypatch) -> None:
    rows = rows_of(600)
    rows[300] = {"prompt": "long " * 9, "completion": "a", "id": "n300"}
    file = write_jsonl(rows)
    wanted = max(len(example.prompt_ids) + len(example.response_ids) for example in build(file))
    again = build(file)
    monkeypatch.setattr(again, "_reader", None)
    assert again.longest == wanted == len(build(file)[300].prompt_ids) + 2
