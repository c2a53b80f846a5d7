import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.step import learning_rate_at
from ssgen_ds.window import IGNORE, Sequence, build_window


def test_learning_rates():
    def rates(schedule, warmup):
        return [learning_rate_at(step, 10, 1.0, schedule, warmup) for step in range(10)]

    assert rates("constant", 0) == [1.0] * 10
    assert rates("constant", 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", 0.2) == pytest.approx([0.5, 1.0, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = rates("cosine", 0)
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)


sequences = st.builds(
    lambda n, m, w: Sequence(list(range(n + m)), [IGNORE] * n + list(range(m)), w),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([1.0, 0.5]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_windows_of_all_ranks_hold_every_label_once(batch, micro_batch, world_size):
    windows = [build_window(batch, micro_batch, rank, world_size, "cpu") for rank in range(world_size)]
    assert len({len(window.micro_batches) for window in windows}) == 1, "ranks would hang"
    weight = sum(sequence.weight * sequence.num_labels for sequence in batch)
    assert all(window.global_weight == weight for window in windows)
    micros = [micro for window in windows for micro in window.micro_batches]
    assert sum(float(micro.weights_N.sum()) for micro in micros) == pytest.approx(weight)
    for micro in micros:
        assert (micro.labels_BL != IGNORE).sum() == len(micro.weights_N)
        assert len(micro.lengths_B) <= micro_batch
    lengths = sorted(int(n) for micro in micros if micro.weights_N.sum() > 0 for n in micro.lengths_B)
    assert lengths == sorted(len(sequence.input_ids) for sequence in batch)


def test_padding_is_on_the_right_and_has_no_label():
    window = build_window([Sequence([5, 6, 7], [IGNORE, 6, 7]), Sequence([8, 9], [IGNORE, 9])], 2, 0, 1, "cpu")
    (micro,) = window.micro_batches
    assert sorted(micro.input_ids_BL.tolist()) == [[5, 6, 7], [8, 9, 0]]
    row = micro.input_ids_BL.tolist().index([8, 9, 0])
    assert micro.labels_BL[row].tolist() == [IGNORE, 9, IGNORE]
    assert torch.equal(micro.lengths_B.sort().values, torch.tensor([2, 3]))
