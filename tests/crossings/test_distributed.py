"""DDP and FSDP2 over two processes (gloo)."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

import fastsae
from tests.crossings.distributed_cases import D, F, K, rows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "rendezvous"
    module = "tests.crossings.distributed_cases"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(outputs[0][0].strip().splitlines()[-1])


@pytest.mark.parametrize("name", ["JumpReLUSAE", "BatchTopKSAE", "FeatureChoiceSAE"])
def test_statistics_are_the_same_on_both_ranks_of_ddp(found, name):
    for statistic, (a, b) in found["ddp"][name].items():
        assert a == b, statistic


def test_thresholds_start_from_the_rows_of_all_ranks(found):
    """One process with both halves in turn gives the mean of the two starts, by hand."""
    units, smallest, codes = [], [], []
    torch.manual_seed(0)
    sae = fastsae.JumpReLUSAE(D, F, K)
    for rank in range(2):
        x = rows(rank)
        units.append((x - x.mean(0)).square().mean().sqrt())
        z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach().flatten()
        smallest.append(z.sort(descending=True).values[int(K * len(x)) - 1])
        codes.append(z)
    threshold = sum(smallest) / 2
    l0 = sum(float((z > threshold).sum()) for z in codes) / (2 * len(x))
    moved = 0.1 * math.log(l0 / K)  # by the step that followed
    expected = torch.log(sum(smallest) / sum(units)) + moved
    assert found["ddp"]["JumpReLUSAE"]["log_threshold"][0] == pytest.approx(
        [float(expected)] * 4, rel=1e-5
    )
    assert found["ddp"]["JumpReLUSAE"]["unit"][0] == pytest.approx(
        [float(sum(units)) / 2], rel=1e-5
    )


def test_every_parameter_of_jumprelu_is_reached_by_its_forward(found):
    assert found["own_loss"]["moves"]
    assert found["own_loss"]["grads"][0] == found["own_loss"]["grads"][1]


def test_a_sharded_sae_has_the_gradients_of_one_process(found):
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(D, F, K)
    for rank in range(2):
        x = rows(rank)
        ((sae(x) - x).square().sum() / 2).backward()
    for name, p in sae.named_parameters():
        assert found["fsdp"][name] == pytest.approx(
            p.grad.flatten()[:6].tolist(), rel=1e-4, abs=1e-5
        ), name


def test_thresholds_that_a_shard_would_lose_are_refused(found):
    assert (
        "expected thresholds that are started before fully_shard"
        in (found["fsdp_jumprelu"]["refusal"])
    )


def test_a_context_says_over_whom_statistics_are_reduced(found):
    a, b = found["reduce"]["shared"]
    assert a == b
    a, b = found["reduce"]["alone"]
    assert a != b
    assert found["reduce"]["shared"][0] == pytest.approx([(a[0] + b[0]) / 2], rel=1e-6)
