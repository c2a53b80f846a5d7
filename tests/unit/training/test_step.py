import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssgen_ds.data.window import IGNORE, Packing, Sequence, build_window, shard_by_length
from ssgen_ds.training.step import accumulate_gradients, train_step
from tests.support.alone import Alone, alone
from tests.support.plain_engine import PlainEngine
from tests.support.tiny_models import tiny_model

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


# -- one step, without DeepSpeed ---------------------------------------------------------------------------------------


UNEVEN = [
    Sequence([5, 6, 7, 8, 9], [IGNORE, IGNORE, 7, 8, 2]),
    Sequence([11, 12], [IGNORE, 2]),
    Sequence([21, 22, 23, 24, 25, 26, 27], [IGNORE, 22, 23, 24, 25, 26, 2], weight=0.25),
]


def gradient(engine: PlainEngine) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in engine.module.parameters()])


def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """sum(w * nll) / sum(w) over the three sequences, each alone, and its gradient."""
    model = tiny_model("llama")
    total, weight = torch.zeros(()), 0.0
    for sequence in UNEVEN:
        logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1]
        nll = F.cross_entropy(logits, torch.tensor(sequence.labels[1:]), ignore_index=IGNORE, reduction="sum")
        total, weight = total + sequence.weight * nll, weight + sequence.weight * sequence.num_labels
    (total / weight).backward()
    return (total / weight).detach(), gradient(PlainEngine(model))


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_of_the_ranks_gradients_is_that_of_the_whole_window(size, micro_batch):
    """DeepSpeed averages over the ranks: each rank's part must be as large as their number makes it small."""
    loss, wanted = by_hand()
    gradients, losses = [], []
    for rank in range(size):
        engine = PlainEngine(tiny_model("llama"))
        window = build_window(UNEVEN, Packing(micro_batch), rank, size, "cpu")
        losses.append(accumulate_gradients(engine, window, alone(rank, size)))
        gradients.append(gradient(engine))
        assert engine.boundaries == [False] * (len(window.micro_batches) - 1) + [True]
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-5)  # a silent rank's sum is its own part
    difference = torch.stack(gradients).mean(0) - wanted
    assert difference.norm() < 1e-5 * wanted.norm()


class AnotherHasNoLoss(Alone):
    """The other rank's loss is infinite."""

    def sum(self, *values: float) -> list[float]:
        return [math.inf for _ in values]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_an_infinite_loss_makes_every_gradient_nan(micro_batch):
    """The gradient of an infinite loss can be finite, and is on the ranks that do not have it: nothing else tells."""
    engine = PlainEngine(tiny_model("llama"))
    window = build_window(UNEVEN, Packing(micro_batch), 0, 1, "cpu")
    assert accumulate_gradients(engine, window, alone(kind=AnotherHasNoLoss)) == math.inf
    assert gradient(engine).isnan().all()
    before = [p.detach().clone() for p in engine.module.parameters()]
    stats = train_step(engine, window, 0.1, alone(kind=AnotherHasNoLoss))
    assert (stats.is_applied, stats.loss, engine.steps) == (False, math.inf, 0)
    assert all(torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True))
    assert all(p.grad is None for p in engine.module.parameters())
    assert train_step(engine, window, 0.1, alone()).is_applied


def test_a_step_goes_down_the_gradient_at_its_own_rate():
    loss, wanted = by_hand()
    engine = PlainEngine(tiny_model("llama"), lr=9.0)
    before = torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])
    stats = train_step(engine, build_window(UNEVEN, Packing(2), 0, 1, "cpu"), 0.5, alone())
    after = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    assert (before - after - 0.5 * wanted).norm() < 1e-5 * wanted.norm()
    assert (stats.loss, stats.grad_norm) == pytest.approx((loss.item(), wanted.norm().item()), rel=1e-5)
