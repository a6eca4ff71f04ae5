"""A number that the host knows is read again whenever it may be another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastsae.nn.known import Known


class Reader:
    """Counts how often a tensor is read."""

    def __init__(self):
        self.reads = 0

    def __call__(self, t):
        self.reads += 1
        return int(t.sum())


WRITES = {
    "nothing": (lambda m: None, False),
    "in place": (lambda m: m.x.add_(5), True),
    "of a part": (lambda m: m.x[:1].fill_(9), True),
    "through detach": (lambda m: m.x.detach().zero_(), True),
    "state dict": (lambda m: m.load_state_dict({"x": torch.tensor([4, 4])}), True),
    "its own state": (lambda m: m.state_dict()["x"].fill_(2), True),
    "another tensor": (lambda m: setattr(m, "x", torch.tensor([1, 7])), True),
    "assigned": (lambda m: m.load_state_dict({"x": torch.tensor([3, 8])}, assign=True), True),
    "read only": (lambda m: m.x.sum() + m.x.detach().clone().add_(1).sum(), False),
}


def module():
    held = torch.nn.Module()
    held.register_buffer("x", torch.tensor([1, 2]))
    return held


@pytest.mark.parametrize("write", WRITES)
def test_it_is_read_again_after_a_write(write):
    held, known, reader = module(), Known(), Reader()
    do, again = WRITES[write]
    assert [known.of(held.x, reader) for _ in range(3)] == [3, 3, 3]
    assert reader.reads == 1
    do(held)
    assert known.of(held.x, reader) == int(held.x.sum())
    assert reader.reads == 1 + again


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_reads_for_itself(copied):
    held, reader = module(), Reader()
    held.known = Known()
    held.x.add_(1)
    held.known.of(held.x, Reader())
    held.x.add_(1)  # not read since
    other = copied(held)
    assert other.known.of(other.x, reader) == 7
    assert held.known.of(held.x, reader) == 7
    assert reader.reads == 2


def test_what_is_set_or_counted_is_not_read():
    held, known, reader = module(), Known(), Reader()
    known.set(held.x, 10)
    known.count(held.x)
    assert known.of(held.x, reader) == 11
    assert reader.reads == 0


def test_tensors_whose_writes_nobody_counts_are_read_each_time():
    known, reader = Known(), Reader()
    with torch.inference_mode():
        t = torch.tensor([1, 2])
        known.set(t, 50)
        assert known.of(t, reader) == 3
        t.add_(1)
        assert known.of(t, reader) == 5
    assert reader.reads == 2
