"""A thread that makes batches ahead: the same ones, the same errors, and an end."""

import threading
import time

import pytest
import torch

from fastsae.train.prefetch import Prepared, prefetch

CPU = torch.device("cpu")


def made(i):
    return Prepared(torch.tensor(i), {"batch": i})


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_yields_the_same_in_order():
    assert [(int(x), at) for x, at in prefetch(map(made, range(20)), CPU)] == [
        (i, {"batch": i}) for i in range(20)
    ]
    assert not threads()


def test_works_ahead_but_not_far():
    found = []

    def make():
        for i in range(20):
            found.append(i)
            yield made(i)

    batches = prefetch(make(), CPU, depth=2)
    next(batches)
    for _ in range(100):
        if len(found) == 4:  # one taken, two wait, one is ready to
            break
        time.sleep(0.02)
    time.sleep(0.05)
    assert len(found) == 4
    batches.close()
    assert not threads()


def test_an_error_comes_in_its_turn():
    def make():
        yield made(0)
        yield made(1)
        raise ValueError("bad rows")

    got = []
    with pytest.raises(ValueError, match="bad rows"):
        got.extend(int(batch.x) for batch in prefetch(make(), CPU))
    assert got == [0, 1]
    assert not threads()


def test_stops_with_whoever_reads():
    def endless():
        while True:
            yield made(0)

    def read():
        for _ in prefetch(endless(), CPU):
            raise KeyError("the step failed")

    with pytest.raises(KeyError):
        read()
    for _ in range(100):
        if not threads():
            break
        time.sleep(0.02)
    assert not threads()
