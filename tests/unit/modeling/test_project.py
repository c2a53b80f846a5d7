"""Logits where they are wanted only, and a loss in their place: as the family's own forward makes them."""

from __future__ import annotations

import pytest
import torch

from ssgen_ds.modeling.project import instead_of_logits, logit_transform, project_only
from tests.support.tiny_models import tiny_model

IDS_BL = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
# Cohere and Granite scale their logits, Gemma 2 caps them.
FAMILIES = ["llama", "gpt2", "gemma2", "cohere", "granite"]


@pytest.mark.parametrize("family", FAMILIES)
def test_wanted_logits_are_those_of_the_whole_forward(family: str) -> None:
    model = tiny_model(family).eval()
    wanted_BL = torch.tensor([[False, True, False, True], [True, False, False, False]])
    with torch.no_grad():
        whole_BLV = model(input_ids=IDS_BL, use_cache=False).logits
        with project_only(model, wanted_BL.flatten().nonzero()[:, 0]):
            some_1NV = model(input_ids=IDS_BL, use_cache=False).logits
        again_BLV = model(input_ids=IDS_BL, use_cache=False).logits
    assert some_1NV.shape == (1, 3, whole_BLV.shape[-1])
    torch.testing.assert_close(some_1NV[0], whole_BLV[wanted_BL], rtol=1e-6, atol=1e-6)
    assert torch.equal(again_BLV, whole_BLV), "the hook is gone"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_logits_of_the_family(family: str) -> None:
    """Its transform is what the family does after its projection; the result of `compute` comes out once a forward."""
    model = tiny_model(family).eval()
    rows_NV: list[torch.Tensor] = []

    def compute(hidden_NH: torch.Tensor, head, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        rows_NV.append(head(hidden_NH))
        assert any(p is model.get_output_embeddings().weight for p in parameters)
        return rows_NV[-1].sum()

    with torch.no_grad():
        whole_BLV = model(input_ids=IDS_BL, use_cache=False).logits
        with instead_of_logits(model, compute) as results:
            model(input_ids=IDS_BL, use_cache=False)
        assert torch.equal(model(input_ids=IDS_BL, use_cache=False).logits, whole_BLV), "the forward is back"
    torch.testing.assert_close(rows_NV[0], whole_BLV.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert len(results) == 1 and torch.equal(results[0], rows_NV[0].sum())


def test_the_transform_by_hand() -> None:
    config = tiny_model("gemma2").config
    config.final_logit_softcapping = 2.0
    expected = 2.0 * torch.tanh(torch.tensor([0.0, 0.5, -5.0]))
    torch.testing.assert_close(logit_transform(config)(torch.tensor([0.0, 1.0, -10.0])), expected)
