"""Every process brings rows of its own."""

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer
from tests.distributed.launch import once, torchrun


@pytest.fixture(scope="module", params=[(1, 2), (2, 2)], ids=["1x2", "2x2"])
def results(request, tmp_path_factory):
    data, latent = request.param

    def run(out):
        torchrun(data * latent, "run_rows.py", data, latent, out)

    out = once(tmp_path_factory, f"rows-{data}x{latent}", run)
    return request.param, torch.load(out, weights_only=False)


def test_steps_with_rows_of_each_process_are_those_of_one(results):
    torch.manual_seed(0)
    sae = fastsae.BatchTopKSAE(8, 40, 4, dtype=torch.float64)
    every = torch.randn(6, 64, 8, dtype=torch.float64)
    trainer = Trainer(sae, None, TrainConfig(steps=30, batch_size=64, progress=False))
    trainer.prepare(every.flatten(0, 1))
    expected = [trainer.step(batch).loss.item() for batch in every]
    for losses, *_ in results[1]:
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_bad_row_of_one_process_is_refused_by_all(results):
    for _, said, steps, *_ in results[1]:
        assert "expected finite activations at step 6, got 1 of" in said
        assert steps == 6


def test_gathered_rows_are_those_of_the_data_group(results):
    (data, latent), found = results
    for rank, (_, _, _, seen, *_) in enumerate(found):
        group = rank // latent
        members = [float(group * latent + i + 1) for i in range(latent)]
        assert seen["batch"] == sorted(value for value in members for _ in range(4))
        processes = [float(i + 1) for i in range(data * latent)]
        assert seen["in order"] == [[v] * 30 for v in processes] + [[v] * 10 for v in processes]
        assert seen["sample"] == sorted(value for value in processes for _ in range(4))
        assert seen["fingerprint"] == found[0][3]["fingerprint"]


def test_misuse_is_refused_by_all(results):
    expected = [
        "expected equally many rows of each process, got",
        "expected an SAE in one piece, got one that is spread over processes",
        "expected a spread SAE to be trained by Trainer, or used under torch.no_grad()",
        "expected the same settings and data",
        "expected the same settings and data",
    ]
    for *_, refused, _ in results[1]:
        assert len(refused) == len(expected)
        for said, part in zip(refused, expected, strict=True):
            assert part in said
        assert "data differ" in refused[3]
        assert "steps differ" in refused[4]


def test_fit_reads_rows_of_each_process(results):
    fvus = {fvu for *_, fvu in results[1]}
    assert len(fvus) == 1
    assert 0 < fvus.pop() < 0.9
