"""A thread that makes batches ahead: the same ones, the same errors, and an end."""

import threading
import time

import pytest
import torch

from fastsae.train.ahead import ahead

CPU = torch.device("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_yields_the_same_in_order():
    assert [int(x) for x in ahead(map(torch.tensor, range(20)), CPU)] == list(range(20))
    assert not threads()


def test_works_ahead_but_not_far():
    made = []

    def make():
        for i in range(20):
            made.append(i)
            yield torch.tensor(i)

    batches = ahead(make(), CPU, depth=2)
    next(batches)
    for _ in range(100):
        if len(made) == 4:  # one taken, two wait, one is ready to
            break
        time.sleep(0.02)
    time.sleep(0.05)
    assert len(made) == 4
    batches.close()
    assert not threads()


def test_an_error_comes_in_its_turn():
    def make():
        yield torch.tensor(0)
        yield torch.tensor(1)
        raise ValueError("bad rows")

    got = []
    with pytest.raises(ValueError, match="bad rows"):
        got.extend(map(int, ahead(make(), CPU)))
    assert got == [0, 1]
    assert not threads()


def test_stops_with_whoever_reads():
    def endless():
        while True:
            yield torch.zeros(1)

    def read():
        for _ in ahead(endless(), CPU):
            raise KeyError("the step failed")

    with pytest.raises(KeyError):
        read()
    for _ in range(100):
        if not threads():
            break
        time.sleep(0.02)
    assert not threads()
