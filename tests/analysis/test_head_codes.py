"""Discrete codes: scores against sets in plain Python, and a planted circuit that is found."""

from __future__ import annotations

import re

import pytest
import torch

from fastsae.analysis.head_codes import (
    edge_scores,
    head_codes,
    node_scores,
    roc_auc,
    train_code_sae,
)
from fastsae.nn import BatchTopKSAE, TopKSAE
from tests.properties import given, settings, st


def only_in_positives(codes: list[object], positive: list[bool]) -> set[object]:
    """The codes of positives that no negative has; None is no code."""
    ours = {code for code, yes in zip(codes, positive, strict=True) if yes}
    theirs = {code for code, yes in zip(codes, positive, strict=True) if not yes}
    return ours - theirs - {None}


def column(codes: torch.Tensor, head: int) -> list[int | None]:
    return [None if code < 0 else code for code in codes[:, head].tolist()]


cases = given(st.integers(0, 12), st.integers(0, 5), st.integers(1, 6), st.integers(0, 2**31))


def case(examples: int, heads: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, size, (examples, heads), generator=generator)
    return codes, torch.rand(examples, generator=generator) < 0.5


@settings(max_examples=60, deadline=None)
@cases
def test_node_scores_count_codes_that_only_positives_have(examples, heads, size, seed):
    codes, positive = case(examples, heads, size, seed)
    expected, shares = [], []
    for head in range(heads):
        held = column(codes, head)
        expected.append(len(only_in_positives(held, positive.tolist())))
        shares.append(expected[-1] / max(1, len(set(held) - {None})))
    assert node_scores(codes, positive).tolist() == expected
    got = node_scores(codes, positive, normalize=True)
    torch.testing.assert_close(got, torch.tensor(shares, dtype=torch.float32))


@settings(max_examples=60, deadline=None)
@cases
def test_edge_scores_count_pairs_that_only_positives_have(examples, heads, size, seed):
    codes, positive = case(examples, heads, size, seed)
    got = edge_scores(codes, positive)
    assert got.shape == (heads, heads)
    for i in range(heads):
        for j in range(heads):
            pairs = [
                None if None in pair else pair
                for pair in zip(column(codes, i), column(codes, j), strict=True)
            ]
            expected = len(only_in_positives(pairs, positive.tolist())) if i != j else 0
            assert got[i, j] == expected


def test_pairs_tell_what_single_codes_do_not():
    codes = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]])
    positive = torch.tensor([True, True, False, False])
    assert node_scores(codes, positive).tolist() == [0, 0]
    assert edge_scores(codes, positive).tolist() == [[0, 2], [2, 0]]


def test_large_codes_do_not_collide():
    size = 2**20
    codes = torch.tensor([[size - 1, 0, size - 1], [0, size - 1, size - 1], [0, 0, size - 1]])
    positive = torch.tensor([True, True, False])
    assert node_scores(codes, positive).tolist() == [1, 1, 0]
    assert edge_scores(codes, positive).tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0]]


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_roc_auc_counts_pairs_with_ties_as_half(n, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (n,), generator=generator) / 7
    labels = torch.rand(n, generator=generator) < 0.4
    labels[0], labels[1] = True, False
    wins = [
        1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
        for ours in scores[labels].tolist()
        for theirs in scores[~labels].tolist()
    ]
    assert roc_auc(scores, labels) == sum(wins) / len(wins)
    assert roc_auc(-scores, labels) == pytest.approx(1 - sum(wins) / len(wins), abs=1e-12)


def test_roc_auc_of_perfect_reversed_and_constant_scores():
    labels = torch.tensor([False, True, False, True])
    assert roc_auc(torch.tensor([0, 5, 1, 2]), labels) == 1
    assert roc_auc(torch.tensor([float("inf"), 0.0, 3.0, float("-inf")]), labels) == 0
    assert roc_auc(torch.ones(4), labels) == 0.5


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_codes_are_the_largest_latent_of_the_dense_code(cls):
    sae = cls(16, 48, k=3)
    sae.b_enc = torch.full((48,), -1.0)
    x = torch.randn(7, 5, 16)
    x[2, 3] = 0  # no latent is positive
    sae.loss(x)  # thresholds, for the class that has them
    codes = head_codes(sae.train(), x)
    assert not sae.training
    dense = sae.encode(x)
    assert codes.dtype == torch.int64
    assert codes.shape == (7, 5)
    assert codes[2, 3] == -1
    assert torch.equal(codes, torch.where(dense.amax(2) > 0, dense.argmax(2), -1))
    assert len(codes.unique()) > 10
    assert head_codes(sae, x[:0]).shape == (0, 5)


def test_the_lowest_index_wins_among_equals():
    sae = TopKSAE(2, 6, k=4)
    sae.W_enc = torch.tensor([[0.0, 1.0, 1.0, 0.5, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]])
    assert head_codes(sae, x).tolist() == [[1, 0, -1]]


@pytest.fixture
def one_thread():
    """Updates of a few ms are no faster on more threads, and slower where others compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted(circuit: torch.Tensor, n: int, d: int = 128) -> torch.Tensor:
    """Noisy outputs of heads, each around a place of its own: n positives, then n negatives.

    Heads of the circuit add one of four task directions in positives only; the others add one of
    four directions in both classes alike.
    """
    heads = len(circuit)
    places, moves = 2 * torch.randn(heads, d), 3 * torch.randn(heads, 4, d)
    moved = moves[torch.arange(heads), torch.randint(4, (2 * n, heads))]
    moved[n:, circuit] = 0
    return places + moved + torch.randn(2 * n, heads, d)


@pytest.mark.usefixtures("one_thread")
def test_a_planted_circuit_is_found_from_ten_examples():
    heads, n = 24, 60
    circuit = torch.zeros(heads, dtype=torch.bool)
    circuit[torch.tensor([2, 3, 11, 17, 20])] = True
    positive = torch.arange(2 * n) < n
    x = planted(circuit, n)
    codes = head_codes(train_code_sae(x, examples=10), x)
    nodes = node_scores(codes, positive)
    assert roc_auc(nodes, circuit) > 0.9
    upper = torch.ones(heads, heads, dtype=torch.bool).triu(1)
    touches = circuit.unsqueeze(0) | circuit.unsqueeze(1)
    assert roc_auc(edge_scores(codes, positive)[upper], touches[upper]) > 0.9
    # Labels that have nothing to do with the task single out nobody.
    shuffled = node_scores(codes, positive[torch.randperm(2 * n)])
    assert shuffled[circuit].sum() < nodes[circuit].sum() / 2
    # What training is for: noise moves the codes of a random SAE.
    untrained = node_scores(head_codes(TopKSAE(128, 200, k=1), x), positive)
    assert nodes[~circuit].sum() < untrained[~circuit].sum() / 2


def test_training_takes_the_number_of_examples_it_is_told():
    x = torch.randn(6, 4, 8)

    def trained(x: torch.Tensor, examples: int, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(5)
        sae = train_code_sae(x, 20, examples=examples, steps=3, seed=seed)
        assert not sae.training
        return sae.W_enc.detach()

    def seen(examples: int, seed: int = 0) -> list[int]:
        """The examples that matter: another number there is another SAE."""
        before = trained(x, examples, seed)
        edits = [
            x + torch.nn.functional.one_hot(torch.tensor(i), 6).view(6, 1, 1) for i in range(6)
        ]
        return [i for i in range(6) if not torch.equal(trained(edits[i], examples, seed), before)]

    assert torch.equal(trained(x, 2), trained(x, 2))
    assert len(seen(2)) == 2
    assert len(seen(99)) == 6
    assert len({tuple(seen(2, seed)) for seed in range(4)}) > 1


CODES, POSITIVE = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "arguments", "error", "message"),
    [
        (head_codes, (TopKSAE(4, 8, k=1), torch.zeros(2, 4)), ValueError,
         "expected x to be [examples, heads, d], got [2, 4]"),
        (train_code_sae, (torch.zeros(2, 4),), ValueError,
         "expected x to be [examples, heads, d], got [2, 4]"),
        (train_code_sae, (torch.zeros(0, 3, 4),), ValueError,
         "expected at least one head's row, got [0, 3, 4]"),
        (node_scores, (CODES[0], POSITIVE), ValueError,
         "expected codes to be [examples, heads], got [3]"),
        (node_scores, (CODES.int(), POSITIVE), TypeError,
         "expected codes to be torch.int64, got torch.int32"),
        (edge_scores, (CODES, POSITIVE[1:]), ValueError,
         "expected positive to be [examples] with examples = 4, got [3]"),
        (edge_scores, (CODES, POSITIVE.long()), TypeError,
         "expected positive to be torch.bool, got torch.int64"),
        (roc_auc, (torch.zeros(4), POSITIVE[1:]), ValueError,
         "expected scores and labels to be [n], got [4] and [3]"),
        (roc_auc, (torch.zeros(4), POSITIVE), ValueError,
         "expected labels of both classes, got 0 True of 4"),
        (roc_auc, (torch.zeros(4), POSITIVE.long()), TypeError,
         "expected labels to be bool, got torch.int64"),
        (roc_auc, (torch.tensor([0.0, float("nan")]), torch.tensor([True, False])), ValueError,
         "expected scores without NaN, got 1"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(call, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'{call.__name__}: {message}')}$"):
        call(*arguments)
