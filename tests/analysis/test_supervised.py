"""Supervised dictionaries, control by few latents, and F1 of latents, against numbers by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import fastsae
from fastsae.analysis import (
    attribute_f1,
    share_found,
    sparse_edit,
    splitting,
    supervised_dictionary,
    union_f1,
)
from fastsae.nn import Transcoder

N, D = 400, 6


@pytest.fixture(scope="module")
def planted():
    """Return x that is a sum of planted vectors, its attributes and the vectors."""
    g = torch.Generator().manual_seed(0)
    attributes = {
        "color": torch.randint(5, (N,), generator=g),
        "shape": torch.randint(2, (N,), generator=g),
    }
    vectors = {"color": torch.randn(5, D, generator=g), "shape": torch.randn(2, D, generator=g)}
    x = 3.0 + sum(vectors[name][values] for name, values in attributes.items())
    return x, attributes, vectors


def test_mse_code_finds_what_was_planted(planted):
    x, attributes, vectors = planted
    made = supervised_dictionary(x, attributes)
    torch.testing.assert_close(made.reconstruct(attributes), x.double(), rtol=0, atol=1e-5)
    for name, u in vectors.items():
        torch.testing.assert_close(
            made.vectors[name] - made.vectors[name][:1], (u - u[:1]).double(), rtol=0, atol=1e-5
        )
        assert made.vector(name, attributes[name]).mean(0).abs().max() < 1e-9
    new = (attributes["color"] + 1) % 5
    edited = made.edit(x, "color", attributes["color"], new)
    wanted = x - vectors["color"][attributes["color"]] + vectors["color"][new]
    torch.testing.assert_close(edited, wanted.double(), rtol=0, atol=1e-5)


def test_mse_code_is_the_least_squares_of_numpy_with_noise(planted):
    import numpy as np

    x, attributes, _ = planted
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    design = np.concatenate([np.eye(5)[attributes["color"]], np.eye(2)[attributes["shape"]]], 1)
    wanted = design @ np.linalg.lstsq(design, x.numpy().astype(np.float64), rcond=None)[0]
    made = supervised_dictionary(x, attributes).reconstruct(attributes)
    torch.testing.assert_close(made, torch.from_numpy(wanted), rtol=0, atol=1e-8)


def test_mean_code_is_the_mean_of_each_value(planted):
    x, attributes, _ = planted
    made = supervised_dictionary(x, attributes, code="mean")
    own = x[attributes["color"] == 3].double().mean(0) - x.double().mean(0)
    torch.testing.assert_close(made.vectors["color"][3], own)
    error = (made.reconstruct(attributes) - x).square().sum()
    assert error > (supervised_dictionary(x, attributes).reconstruct(attributes) - x).square().sum()


def test_a_value_that_no_prompt_had_is_refused_where_it_is_asked_for(planted):
    x, attributes, _ = planted
    for code in ("mse", "mean"):
        made = supervised_dictionary(x, attributes, sizes={"color": 6, "shape": 2}, code=code)
        assert not made.reconstruct(attributes).isnan().any()
        with pytest.raises(ValueError, match="expected values of color that were fitted, got 5"):
            made.vector("color", torch.tensor([0, 5]))
        assert math.isfinite(made.norms()["color"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": "median"}, "expected code to be mse or mean, got 'median'"),
        ({"sizes": {"color": 3, "shape": 2}}, r"expected values of color in 0\.\.2, got 0\.\.4"),
    ],
)
def test_wrong_arguments(planted, change, message):
    x, attributes, _ = planted
    with pytest.raises(ValueError, match=message):
        supervised_dictionary(x, attributes, **change)


def unit_sae(d=D):
    """Return an SAE whose latents are the positive axes, which encodes exactly."""
    sae = fastsae.TopKSAE(d_in=d, d_sae=d, k=d).eval()
    with torch.no_grad():
        sae.W_enc_rows.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_a_greedy_edit_changes_the_largest_differences_first():
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0, 1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 5.0, 1.0, 1.0, 0.0]])
    edit = sparse_edit(unit_sae(), x, target, 2)
    assert edit.x.tolist() == [[1.0, 0.0, 5.0, 0.0, 1.0, 0.0]]
    assert edit.changed[0].tolist() == [False, True, True, False, False, False]
    assert float(edit.magnitude) == pytest.approx(4 / 6)  # of |x|^2 = 6 the second latent has 4
    all_of_them = sparse_edit(unit_sae(), x, target, 6)
    assert torch.equal(all_of_them.x, target.double())
    assert int(all_of_them.changed.sum()) == 3


def test_a_greedy_edit_is_the_best_of_all_of_one_latent():
    g = torch.Generator().manual_seed(3)
    sae = fastsae.TopKSAE(d_in=D, d_sae=20, k=5).eval()
    x, target = torch.randn(30, D, generator=g), torch.randn(30, D, generator=g)
    f = sae.encode(target) - sae.encode(x)
    every = x[:, None] + f[:, :, None] * sae.W_dec  # [n, d_sae, d]
    best = (every - target[:, None]).norm(dim=2).min(1).values
    before = (x - target).norm(dim=1)
    after = (sparse_edit(sae, x, target, 1).x - target).norm(dim=1)
    torch.testing.assert_close(after.float(), torch.minimum(best, before), rtol=1e-4, atol=1e-4)
    distances = [(sparse_edit(sae, x, target, k).x - target).norm(dim=1) for k in range(6)]
    assert all(bool((b <= a + 1e-9).all()) for a, b in pairwise(distances))


def test_a_random_edit_changes_only_latents_that_differ():
    x, target = torch.tensor([[1.0, 2, 0, 0, 1, 0]]), torch.tensor([[1.0, 0, 5, 1, 1, 0]])
    picked = {
        tuple(sparse_edit(unit_sae(), x, target, 2, how="random", seed=s).changed[0].tolist())
        for s in range(20)
    }
    assert len(picked) == 3
    assert all(sum(row) == 2 and not (row[0] or row[4] or row[5]) for row in picked)


def test_edits_of_what_is_no_sae_are_refused():
    x = torch.zeros(2, D)
    with pytest.raises(TypeError, match="expected an SAE, got Linear"):
        sparse_edit(torch.nn.Linear(D, D), x, x, 1)
    with pytest.raises(ValueError, match=r"expected \(SITE_READ, SITE_REPLACED\)"):
        sparse_edit(Transcoder(d_in=D, d_out=D, d_sae=8, k=2), x, x, 1)
    with pytest.raises(ValueError, match="expected how to be greedy or random"):
        sparse_edit(unit_sae(), x, x, 1, how="best")


ACTIVE = torch.tensor(
    [[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
).bool()
LABEL = torch.tensor([1, 1, 1, 1, 0, 0])


def test_f1_by_hand():
    f1 = attribute_f1(ACTIVE, LABEL)
    assert f1[:, 1].tolist() == pytest.approx([2 * 2 / 6, 2 * 1 / 5, 2 * 1 / 6, 2 * 4 / 9])
    assert share_found(f1, 0.85) == 0.5  # 8/9 for the value 1; for 0 at most 2/4 of latent 2


def test_f1_is_that_of_a_loop_over_prompts():
    g = torch.Generator().manual_seed(5)
    active = torch.rand(60, 7, generator=g) < 0.3
    values = torch.randint(4, (60,), generator=g)
    f1 = attribute_f1(active, values)
    for j in range(7):
        for v in range(4):
            pairs = [(bool(a), int(b) == v) for a, b in zip(active[:, j], values, strict=True)]
            hits = sum(a and b for a, b in pairs)
            precision = hits / max(sum(a for a, _ in pairs), 1)
            recall = hits / sum(b for _, b in pairs)
            wanted = 2 * precision * recall / (precision + recall) if hits else 0.0
            assert float(f1[j, v]) == pytest.approx(wanted)


def test_a_union_takes_what_raises_its_f1():
    union = union_f1(ACTIVE[:, :3], LABEL == 1)
    assert union.latents == [0, 1, 2]  # 4/6, then 6/7, then 8/9
    assert union.f1 == pytest.approx(8 / 9)
    assert union_f1(ACTIVE[:, :3], LABEL == 1, limit=2).f1 == pytest.approx(6 / 7)
    assert union_f1(ACTIVE, LABEL == 1).latents == [3]  # no other one makes it better


def test_splitting_by_hand():
    split = splitting(ACTIVE[:, :3], LABEL == 1)
    assert split.latents == 2  # the third one fires elsewhere as often
    assert split.recall == pytest.approx(0.25)  # 2 of 4 and 1 of 4; torch's median is the lower
    assert split.overlap == 0
    assert split.covered == 0.75
    assert split.best_f1 == pytest.approx(4 / 6)
    assert math.isnan(splitting(ACTIVE[:, :1], LABEL == 1).overlap)
    with pytest.raises(ValueError, match="expected a prompt that has the value"):
        splitting(ACTIVE, LABEL == 7)
    with pytest.raises(TypeError, match=r"expected bool and torch\.int64"):
        attribute_f1(ACTIVE.float(), LABEL)
