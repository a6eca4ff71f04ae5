"""sparsify's coder and trainer with our functions and with its own: the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.interop.dropin.common import (
    TOLERANCES,
    assert_same,
    assert_same_gradients,
    assert_same_state,
    peer,
    rows,
)

library = peer("sparsify")

from sparsify import sparse_coder, utils  # noqa: E402

from bench.dropin import sparsify_trainer  # noqa: E402
from fastsae.interop.dropin import sparsify as fast  # noqa: E402

N, D, F, K = 48, 16, 96, 6


@pytest.fixture(autouse=True)
def _restored():
    precision = torch.get_float32_matmul_precision()  # its trainer sets it
    yield
    fast.disable()
    torch.set_float32_matmul_precision(precision)


def coder(dtype=torch.float64, bias=0.1, **options):
    torch.manual_seed(0)
    made = library.SparseCoder(
        D, library.SparseCoderConfig(num_latents=F, k=K, **options), dtype=dtype
    )
    with torch.no_grad():
        made.encoder.weight.copy_(0.4 * torch.randn(F, D))
        made.encoder.bias.copy_(bias + 0.1 * torch.randn(F))
        made.W_dec.copy_(0.3 * torch.randn(F, D))
        made.b_dec.copy_(0.1 * torch.randn(D))
    return made


def outputs(ours, theirs, x, y=None, **given):
    """Return both outputs after a backward pass of the loss that its trainer uses."""
    found = []
    for model, use in ((ours, fast.enable), (theirs, fast.disable)):
        use()
        out = model(x, y, **given)
        (out.fvu + 0.7 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        found.append(out)
    return found


def assert_same_outputs(ours, theirs):
    for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        expected = getattr(theirs, name)
        if bool(expected.any()):
            assert_same(getattr(ours, name), expected, name)
        else:
            assert not bool(getattr(ours, name).any()), name
    assert ours.latent_indices.dtype == torch.long
    codes = []
    for out in (ours, theirs):
        empty = torch.zeros(len(out.sae_out), F, dtype=out.latent_acts.dtype)
        codes.append(empty.scatter(1, out.latent_indices, out.latent_acts))
    assert_same(*codes, "code")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dead", [None, 0, 3, 20, 90])
@pytest.mark.parametrize(
    "options",
    [{}, {"multi_topk": True}, {"skip_connection": True}, {"normalize_decoder": False}],
    ids=str,
)
def test_step(options, dead, dtype):
    ours = coder(dtype, **options)
    theirs = copy.deepcopy(ours)
    mask = None if dead is None else torch.arange(F) < dead
    found = outputs(ours, theirs, rows(N, D, dtype), dead_mask=mask)
    assert_same_outputs(*found)
    assert dead in (None, 0) or bool(found[1].auxk_loss > 0)
    assert_same_gradients(ours, theirs)


def test_transcoder_with_input_gradient_and_given_variance():
    ours = coder(transcode=True)
    theirs = copy.deepcopy(ours)
    x, y = rows(N, D), rows(N, D, seed=1)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    found = []
    for model, given, use in zip((ours, theirs), inputs, (fast.enable, fast.disable), strict=True):
        use()
        found.append(model(given, y, total_variance=torch.tensor(3.0)))
        found[-1].fvu.backward()
    assert_same_outputs(*found)
    assert_same(inputs[0].grad, inputs[1].grad, "gradient of x")
    assert_same_gradients(ours, theirs)


def test_entries_of_value_0_have_the_gradient_that_sparsify_gives_them():
    """All latents are selected, so that no tie is left to choose from."""
    ours = coder(bias=-0.5)
    ours.cfg.k = F
    theirs = copy.deepcopy(ours)
    found = outputs(ours, theirs, rows(N, D))
    assert bool((found[1].latent_acts == 0).any(1).all())
    assert_same_outputs(*found)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(
    "model", [lambda: coder(activation="groupmax"), lambda: coder(torch.bfloat16)]
)
def test_groupmax_and_16_bits_are_encoded_by_their_own_function(model):
    ours = model()
    theirs = copy.deepcopy(ours)
    x = rows(N, D).to(ours.dtype)
    assert_same_outputs(*outputs(ours, theirs, x))
    assert_same_gradients(ours, theirs)
    with fast.enabled():
        assert isinstance(ours.encode(x).pre_acts, torch.Tensor)


def test_pre_activations_stand_for_the_tensor():
    model, x = coder(bias=-1.0), rows(N, D)
    with torch.no_grad():
        theirs = model.encode(x).pre_acts
        with fast.enabled():
            ours = model.encode(x).pre_acts
    assert isinstance(ours, fast.PreActs)
    assert ours.shape == theirs.shape
    assert len(ours) == N
    assert_same(ours.dense(), theirs, "dense")
    assert_same(ours[3:5], theirs[3:5], "rows")
    assert_same(torch.relu(ours), theirs, "a function")
    assert_same(torch.cat([ours, theirs]), torch.cat([theirs, theirs]), "a list")
    mask = torch.arange(F)[None] < 40
    assert_same(ours.topk(3).values, theirs.topk(3).values, "topk")  # sorted
    for a, b in ((ours, theirs), *((torch.where(mask, p, -torch.inf),) for p in ())):
        assert_same(
            a.topk(5, sorted=False).values.sum(1), b.topk(5, sorted=False).values.sum(1), ""
        )
    masked = [torch.where(mask, p, -torch.inf) for p in (ours, theirs)]
    assert isinstance(masked[0], fast.PreActs)
    assert torch.equal(masked[0].dense(), masked[1])
    top = masked[0].topk(5, sorted=False)
    assert_same(theirs.gather(1, top.indices), top.values, "places")
    assert int(top.indices.max()) < 40
    by_row = torch.arange(N)[:, None] < 40
    assert torch.equal(torch.where(by_row, ours, 0), torch.where(by_row, theirs, 0))


def trainers(optimizer, tmp_path, x, steps, dtype=torch.float32, **more):
    """Return two trainers on one batch."""
    data = [{"input_ids": torch.arange(i * N, (i + 1) * N)} for i in range(steps)]
    made = []
    for name in ("ours", "theirs"):
        options = {"save_dir": str(tmp_path / name), "lr": 3e-3, "lr_warmup_steps": 2, **more}
        made.append(sparsify_trainer(optimizer, x, data, F, K, **options))
        for parameter in made[-1].saes["embed"].parameters():
            parameter.data = parameter.data.to(dtype)
        if "k_decay_steps" in more:  # it starts with all latents: leave none of value 0
            made[-1].saes["embed"].encoder.bias.data.fill_(9.0)
    return made


# As for SAELens; signum moves by the rate whatever the size of a gradient, and the sign of one next
# to 0 is rounding's, so a few of its parameters differ by a rate.
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"auxk_alpha": 1 / 32, "dead_feature_threshold": N - 1},
        {"sae": {"multi_topk": True}},
        {"micro_acc_steps": 2, "grad_acc_steps": 2},
        {"k_decay_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_fit(optimizer, more, tmp_path, capsys):
    steps = 8
    x = rows(N * steps, D, torch.float64)
    mine, other = trainers(optimizer, tmp_path, x, steps, torch.float64, **copy.deepcopy(more))
    for trainer, use in ((mine, fast.enable), (other, fast.disable)):
        use()
        trainer.fit()
    assert_same_state(mine.saes["embed"], other.saes["embed"], 1e-7)
    fired = [t.num_tokens_since_fired["embed"] for t in (mine, other)]
    assert torch.equal(*fired)
    if "auxk_alpha" in more:
        assert bool((fired[0] >= N).any())


def test_folders_are_the_same(tmp_path):
    ours = coder(torch.float32)
    with fast.enabled():
        ours.save_to_disk(tmp_path / "ours")
    ours.save_to_disk(tmp_path / "theirs")
    for name in ("cfg.json", "sae.safetensors"):
        found = [(tmp_path / folder / name).read_bytes() for folder in ("ours", "theirs")]
        assert found[0] == found[1]
    back = library.SparseCoder.load_from_disk(tmp_path / "ours")
    x = rows(N, D, torch.float32)
    expected = ours(x).sae_out
    with fast.enabled():
        assert_same(back(x).sae_out, expected, "loaded", TOLERANCES[torch.float32])


def test_enable_and_disable():
    theirs = sparse_coder.fused_encoder, utils.decoder_impl
    fast.enable()
    fast.enable()
    assert sparse_coder.fused_encoder is fast.fused_encoder
    assert sparse_coder.decoder_impl is utils.decoder_impl is fast.decode
    with fast.enabled():
        pass
    assert sparse_coder.fused_encoder is fast.fused_encoder
    fast.disable()
    assert (sparse_coder.fused_encoder, sparse_coder.decoder_impl) == theirs
    with pytest.raises(RuntimeError, match="inside"), fast.enabled():
        raise RuntimeError("inside")
    assert (sparse_coder.fused_encoder, utils.decoder_impl) == theirs


@pytest.mark.parametrize(
    ("place", "name", "other"),
    [
        (sparse_coder, "decoder_impl", lambda top_indices, top_acts, W_dec: None),
        (fast, "_their_encoder", lambda input, weight, bias, k: None),
        (fast, "_their_decoder", lambda indices, acts, W_dec: None),
        (sparse_coder.SparseCoder, "encode", lambda self, x, more: None),
    ],
)
def test_another_version_is_refused_whole(place, name, other, monkeypatch):
    monkeypatch.setattr(place, name, other)
    before = sparse_coder.fused_encoder, sparse_coder.decoder_impl
    message = r"^fastsae's drop-in for eai-sparsify: expected .*, got .* eai-sparsify \d"
    with pytest.raises(ImportError, match=message):
        fast.enable()
    assert before == (sparse_coder.fused_encoder, sparse_coder.decoder_impl)
