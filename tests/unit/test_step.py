import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.data.plan import shard_by_length
from ssgen_ds.step import learning_rate_at
from ssgen_ds.window import IGNORE, Packing, Sequence, build_window


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
@given(
    st.lists(sequences, min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.none() | st.integers(1, 40),
    st.booleans(),
)
def test_windows_of_all_ranks_hold_every_label_once(batch, micro_batch, world_size, tokens, packed):
    windows = [
        build_window(batch, Packing(micro_batch, tokens, packed), rank, world_size, "cpu") for rank in range(world_size)
    ]
    assert len({len(window.micro_batches) for window in windows}) == 1, "ranks would hang"
    weight = sum(sequence.weight * sequence.num_labels for sequence in batch)
    assert all(window.global_weight == weight for window in windows)
    micros = [micro for window in windows for micro in window.micro_batches]
    assert sum(float(micro.weights_N.sum()) for micro in micros) == pytest.approx(weight)
    for micro in micros:
        assert len(micro.labels_N) == len(micro.predicting_N) == len(micro.weights_N)
        assert len(micro.lengths) <= micro_batch
        read = sum(micro.lengths) if packed else len(micro.lengths) * max(micro.lengths)
        assert micro.input_ids_BL.numel() == read
        assert tokens is None or read <= tokens or len(micro.lengths) == 1
    lengths = sorted(n for micro in micros if micro.weights_N.sum() > 0 for n in micro.lengths)
    assert lengths == sorted(len(sequence.input_ids) for sequence in batch)


def test_padding_is_on_the_right_and_labels_are_predicted_one_before_their_place():
    sequences = [Sequence([5, 6, 7], [IGNORE, 6, 7]), Sequence([8, 9], [IGNORE, 4], weight=0.5)]
    (micro,) = build_window(sequences, Packing(2), 0, 1, "cpu").micro_batches
    assert micro.input_ids_BL.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert micro.lengths == [3, 2] and micro.layout is None
    assert (micro.predicting_N.tolist(), micro.labels_N.tolist()) == ([0, 1, 3], [6, 7, 4])
    assert micro.weights_N.tolist() == [1.0, 1.0, 0.5]


def test_a_packed_row_has_no_padding_and_knows_where_its_sequences_lie():
    sequences = [Sequence([5, 6, 7], [IGNORE, 6, 7]), Sequence([8, 9], [IGNORE, 4], weight=0.5)]
    (micro,) = build_window(sequences, Packing(2, is_packed=True), 0, 1, "cpu").micro_batches
    assert micro.input_ids_BL.tolist() == [[5, 6, 7, 8, 9]]
    assert (micro.predicting_N.tolist(), micro.labels_N.tolist()) == ([0, 1, 3], [6, 7, 4])
    layout = micro.layout
    assert (layout.rows, layout.width) == (2, 3)
    assert layout.positions_1N.tolist() == [[0, 1, 2, 0, 1]]
    assert layout.slots_N.tolist() == [0, 1, 2, 3, 4]


def test_a_token_budget_cuts_evenly_and_leaves_a_long_sequence_alone():
    def cut(lengths, ranks, budget, padded=True):
        return [
            [[lengths[i] for i in micro] for micro in shard]
            for shard in shard_by_length(lengths, ranks, 8, budget, padded)
        ]

    assert cut([9, 3, 3, 2], 1, 6) == [[[9], [3, 3], [2]]]
    assert cut([4, 4, 2, 2, 2, 2], 1, 10, padded=False) == [[[4, 4], [2, 2, 2, 2]]]  # not 4+4+2 and 2+2+2
    assert cut([4, 4, 4, 4], 2, 8) == [[[4, 4]], [[4, 4]]]
