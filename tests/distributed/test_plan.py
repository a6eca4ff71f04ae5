"""The plan of a run says what the run does."""

import json
from collections import Counter

import pytest

from fastsae.distributed.plan import ARCHITECTURES, MACHINES, plan
from tests.distributed.launch import once, torchrun
from tests.distributed.run_plan import D, F, K, N

MESHES = [(1, 2), (2, 1), (2, 2)]


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def measured(request, tmp_path_factory):
    data, latent = request.param

    def run(out):
        torchrun(data * latent, "run_plan.py", data, latent, out)

    out = once(tmp_path_factory, f"plan-{data}x{latent}", run)
    return request.param, json.loads(out.read_text())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_collectives_and_bytes_are_those_of_a_step(measured, name):
    (data, latent), found = measured
    k = found[name]["entries"] if name == "jumprelu" else K
    planned = plan(D, F, k, N, data=data, latent=latent, architecture=name)
    used = dict(found[name]["used"])
    sent = used.pop("bytes")
    assert Counter(f"{one.kind} {one.dimension}" for one in planned.collectives) == used
    assert sent == pytest.approx(planned.sent, rel=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_memory_is_that_of_a_process(measured, name):
    (data, latent), found = measured
    planned = plan(D, F, K, N, data=data, latent=latent, architecture=name)
    assert found[name]["parameters"] == pytest.approx(planned.parameters, rel=0.05)
    assert found[name]["optimizer"] == pytest.approx(planned.optimizer, rel=0.05)


def test_parameters_and_averages_fall_with_the_latent_processes():
    one = plan(1024, 2**16, 32, 4096)
    for latent in (2, 4, 8):
        part = plan(1024, 2**16, 32, 4096, latent=latent)
        assert part.parameters / one.parameters == pytest.approx(1 / latent, rel=1e-3)
        assert part.optimizer / one.optimizer == pytest.approx(1 / latent, rel=1e-3)
    # 4 bytes of 2 d_in numbers and a bias for each latent, and b_dec; twice that in averages
    assert one.parameters == 4 * (2**16 * (2 * 1024 + 1) + 1024)
    assert one.optimizer == 2 * one.parameters


def test_time_is_that_of_the_ceilings():
    found = plan(1000, 10_000, 10, 2000, latent=2).seconds(MACHINES["h200"])
    assert found["encoder"] == pytest.approx(2 * 2000 * 1000 * 5000 / 989e12)
    # 10,000 entries, each of three rows of the output's width and one of the input's: 1000 numbers
    assert found["rows of entries"] == pytest.approx(10_000 * 4 * 1000 * 4 / 4.8e12)
    assert found["update"] == pytest.approx(2 * 3 * 4 * (5000 * 2001 + 1000) / 4.8e12)
    # candidates (gathered: the other's 4 * 20,000 bytes), reconstructions 4 * 2,000,000 and b_dec
    # 4 * 1000 (reduced: as many bytes as there are), and three latencies
    expected = 3 * 20e-6 + (80_000 + 8_000_000 + 4_000) / 450e9
    assert found["collectives"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"latent": 0}, "expected latent >= 1, got 0"),
        ({"batch": 7, "data": 2}, "expected batch to be a multiple of 2 data groups, got 7"),
        ({"architecture": "dense"}, "expected architecture in topk, batchtopk"),
        ({"k": 0}, "expected 0 < k <= d_sae = 8, got 0"),
        ({"latent": 7}, "expected d_sae for 7 processes, got 8"),
    ],
)
def test_wrong_sizes_are_named(changed, expected):
    sizes = {"d_in": 4, "d_sae": 8, "k": 2, "batch": 8, **changed}
    with pytest.raises(ValueError, match=expected):
        plan(**sizes)
