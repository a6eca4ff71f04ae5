"""Batches arrive as they were, though a buffer is used again as soon as that is safe."""

import pytest
import torch

from fastsae.train.feed import Feed


class Slow(Feed):
    """A device that reads a buffer when it is waited for, and not a moment earlier."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.under_way, self.waits, self.made = [], 0, 0

    def _travels(self, batch):
        return True

    def _pinned(self, like):
        self.made += 1
        return torch.full((like.numel(),), torch.nan, dtype=like.dtype)

    def _send(self, part):
        out = torch.empty_like(part)
        self.under_way.append((part, out))
        return out

    def _event(self):
        own = self.under_way[-1]

        class Event:
            def synchronize(_):
                self.waits += 1
                self.arrive(own)

        return Event()

    def arrive(self, one) -> None:
        part, out = one
        out.copy_(part)
        self.under_way = [other for other in self.under_way if other[1] is not out]


def test_a_buffer_is_filled_only_after_its_copy() -> None:
    feed = Slow()
    batches = [torch.randn(6, 4) for _ in range(7)]
    sent = [feed(batch) for batch in batches]
    assert feed.waits == 5  # not for the first two
    assert len(feed.under_way) == 2
    for one in list(feed.under_way):
        feed.arrive(one)
    for batch, out in zip(batches, sent, strict=True):
        assert torch.equal(out, batch)
    assert feed.made == 2


def test_batches_of_other_sizes_and_dtypes() -> None:
    feed = Slow()
    batches = [
        torch.randn(6, 4),
        torch.randn(2, 4),
        torch.randn(3, 4),
        torch.randn(9, 4),
        torch.randn(9, 4).bfloat16(),
        torch.randn(4, 9).t(),
    ]
    sent = [feed(batch) for batch in batches]
    for one in list(feed.under_way):
        feed.arrive(one)
    for batch, out in zip(batches, sent, strict=True):
        assert out.dtype == batch.dtype
        assert torch.equal(out, batch)


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = torch.randn(3, 2)
    assert Feed(torch.device("cpu"))(batch) is batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    feed = Feed(torch.device("cuda"))
    batches = [torch.randn(4096, 512) for _ in range(20)]
    sent = [feed(batch) for batch in batches]
    for batch, out in zip(batches, sent, strict=True):
        assert out.device.type == "cuda"
        assert torch.equal(out.cpu(), batch)
    there = torch.randn(3, 2, device="cuda")
    assert feed(there).data_ptr() == there.data_ptr()
