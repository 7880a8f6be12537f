"""Top-1, top-5 and loss over a split: exact on any number of ranks, and wrong counts cannot pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluate import evaluate
from pipeline.loader import MicroBatch, evaluation_requests
from tests.conftest import fork_ranks

SAMPLES, CLASSES = 53, 7
LOGITS = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(1))


def batches(rank: int, world_size: int, micro: int):
    """Micro-batches whose "images" are the sample ids, so that the forward pass can look its logits up."""
    for request in evaluation_requests(SAMPLES, micro, 8, rank, world_size):
        ids = torch.from_numpy(request.ids)
        yield MicroBatch(ids, LABELS[ids], torch.from_numpy(request.weights), request.ids)


def evaluate_rank(world, micro: int):
    return evaluate(
        lambda ids: LOGITS[ids], batches(world.rank, world.size, micro), images=SAMPLES, device=torch.device("cpu")
    )


@pytest.mark.parametrize(("world_size", "micro"), [(1, 53), (1, 8), (2, 8), (3, 64)])
def test_the_result_is_that_of_the_whole_split_at_once(world_size, micro):
    ranks = LOGITS.argsort(dim=1, descending=True)
    position = (ranks == LABELS[:, None]).int().argmax(dim=1)
    for result in fork_ranks(evaluate_rank, world_size, micro):
        assert result.images == SAMPLES
        assert result.top1 == pytest.approx(100 * (position == 0).float().mean().item(), abs=1e-5)
        assert result.top5 == pytest.approx(100 * (position < 5).float().mean().item(), abs=1e-5)
        assert result.loss == pytest.approx(F.cross_entropy(LOGITS, LABELS).item(), rel=1e-6)


def test_a_sample_too_few_or_too_many_cannot_pass():
    for images in (SAMPLES - 1, SAMPLES + 1):
        with pytest.raises(AssertionError, match=f"saw {SAMPLES} images"):
            evaluate(lambda ids: LOGITS[ids], batches(0, 1, 8), images=images, device=torch.device("cpu"))


def test_fewer_than_five_classes_have_a_top_five_of_all():
    ids = np.arange(4)
    batch = MicroBatch(torch.arange(4), torch.tensor([0, 1, 2, 0]), torch.ones(4), ids)
    result = evaluate(lambda ids: torch.eye(3)[ids % 3], [batch], images=4, device=torch.device("cpu"))
    assert result.top5 == 100.0 and result.top1 == 100.0
