"""Converted models as stock DeepSeek-V3 models: the norm, the list, logits, tokens, folders."""

import itertools
import json
from collections import Counter

import pytest
import torch
from helpers import assert_within_budget, generator, randn
from hf_models import left_padded, tokens
from hypothesis import given
from hypothesis import strategies as st
from test_convert import Case

from mla.checks import ShapeError
from mla.convert.choose import choose_rotated
from mla.convert.deepseek import (
    CONSTANT,
    LARGEST,
    beside_constant,
    deepseek_layer,
    longrope_parameters,
    losses_by_frequency,
    most_lost,
)
from mla.convert.rotate import KeyComponents

transformers = pytest.importorskip("transformers")

from test_convert_model import continuation, grouped_model, logits  # noqa: E402

from mla.integrations.converted import (  # noqa: E402
    convert_model,
    convert_to_deepseek_v3,
    export_deepseek_v3,
    to_deepseek_v3,
)
from mla.integrations.transformers import replace_attention  # noqa: E402

EPS = 1e-6  # of the norms of a DeepSeek-V3 layer
SEEDS = st.integers(0, 2**31 - 1)


def converted(host="llama", *, kv_budget=0.5, dtype=torch.float64, **overrides):
    model = grouped_model(host, dtype=dtype, **overrides)
    return convert_model(model, tokens(2, 24, seed=1), kv_budget=kv_budget, layout="deepseek_v3")


def stock_of(path, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    assert type(model) is transformers.DeepseekV3ForCausalLM
    return model.eval()


@given(SEEDS, st.integers(1, 40), st.integers(1, 9), st.floats(1e-4, 1e4))
def test_the_norm_changes_nothing_beside_a_constant(seed, C, extra, size):
    rng = generator(seed)
    weight, x, bias = (
        size * torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((C, 7), (50, 7), (C,))
    )
    latent = x @ weight.T + bias
    made = beside_constant(weight, bias, float(latent.norm(dim=1).max()), C + extra)
    raw = x @ made.weight.T + made.bias
    assert torch.equal(raw[:, -1], torch.full_like(raw[:, -1], CONSTANT))
    assert float(raw[:, :-1].norm(dim=1).max()) <= LARGEST * (1 + 1e-12)
    normed = made.norm * raw / (raw.square().mean(1, keepdim=True) + EPS).sqrt()
    assert (normed[:, C:] == 0).all()
    error = (normed[:, :C] * made.undo - latent).norm(dim=1) / latent.norm(dim=1)
    # 1 - (1 + |c|^2 / K^2 + C eps / K^2)^-1/2 from below, and float64 from above
    assert float(error.max()) <= (LARGEST**2 + (C + extra) * EPS) / (2 * CONSTANT**2) + 1e-13
    for exact in (made.norm, made.bias[-1]):
        assert torch.equal(exact.half().double(), exact)
        assert torch.equal(exact.bfloat16().double(), exact)


@pytest.mark.parametrize(("host", "seed"), [("llama", 1), ("qwen2", 2)])
def test_no_input_takes_the_latent_beyond_its_range(host, seed):
    conversion = converted(host, seed=seed)
    block = conversion.model.model.layers[1]
    config, state = block.self_attn.mla.config, block.self_attn.mla.state_dict()
    gain = block.input_layernorm.weight.detach()
    tensors = deepseek_layer(config, state, gain)
    C, D = config.kv_lora_rank, config.hidden_size
    down = tensors["kv_a_proj_with_mqa.weight"][:C] * gain
    worst = torch.linalg.svd(down).Vh[0]
    inputs = torch.cat([randn(20, D, seed=seed).double(), worst[None], -worst[None]])
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    latent = inputs @ down.T + tensors["kv_a_proj_with_mqa.bias"][:C]
    assert LARGEST / 4 < float(latent.norm(dim=1).max()) <= LARGEST
    if host == "qwen2":
        query = (inputs * gain) @ tensors["q_a_proj.weight"].T
        assert float(query.norm(dim=1).max()) <= LARGEST


@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_the_shared_list_costs_all_layers_together_least(seed, pairs, G, num_layers):
    rng = generator(seed)
    J, frequency = pairs * G, torch.arange(pairs).repeat_interleave(G)
    layers = []
    for _ in range(num_layers):
        energy = torch.rand(J, generator=rng, dtype=torch.float64)
        unused = torch.zeros(J, 1, dtype=torch.complex128)
        rotation = torch.rand(pairs, generator=rng, dtype=torch.float64).to(torch.complex128)
        shuffled = torch.randperm(J, generator=rng)
        layers.append((KeyComponents(unused, unused.T, frequency[shuffled], energy), rotation))
    summed = sum(losses_by_frequency(*layer) for layer in layers)
    for count in range(J + 1):
        cost = {
            listed: sum(choose_rotated(*layer, 2 * count, listed).lost_energy for layer in layers)
            for listed in itertools.combinations_with_replacement(range(pairs), count)
            if max(Counter(listed).values(), default=0) <= G
        }
        chosen = most_lost(summed, count)
        assert cost[chosen] <= min(cost.values()) * (1 + 1e-12)
        for components, rotation in layers:
            kept = choose_rotated(components, rotation, 2 * count, chosen).kept
            assert Counter(components.frequency[kept].tolist()) == Counter(chosen)
            free = choose_rotated(components, rotation, 2 * count).lost_energy
            assert free <= choose_rotated(components, rotation, 2 * count, chosen).lost_energy


def test_each_layer_gives_its_best_components_to_the_list():
    unused, still = torch.zeros(4, 1, dtype=torch.complex128), torch.zeros(2)
    frequency = torch.tensor([0, 0, 1, 1])
    energies = [torch.tensor([1.0, 9.0, 6.0, 5.0]), torch.tensor([9.0, 1.0, 6.0, 5.0])]
    summed = sum(
        losses_by_frequency(KeyComponents(unused, unused.T, frequency, energy), still)
        for energy in energies
    )
    assert summed.tolist() == [[18.0, 2.0], [12.0, 10.0]]
    assert most_lost(summed, 1) == (0,) and most_lost(summed, 3) == (0, 1, 1)


@given(SEEDS, st.integers(1, 9), st.sampled_from([10000.0, 500000.0, 1e6]))
def test_transformers_reads_the_frequencies_that_were_written(seed, half, theta):
    wanted = torch.rand(half, generator=generator(seed), dtype=torch.float64).pow(8) + 1e-7
    parameters = longrope_parameters(wanted.tolist(), theta, 64)
    config = transformers.DeepseekV3Config(
        hidden_size=8, qk_rope_head_dim=2 * half, rope_parameters=json.loads(json.dumps(parameters))
    )
    rotary = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    for last in (3, 63, 64, 4000):  # beyond the trained context as well
        cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.tensor([[0, last]]))
        assert rotary.attention_scaling == 1.0
        assert torch.equal(cos[0, 0], torch.ones(2 * half)) and not sin[0, 0].any()
        # four roundings in float32: factor, power, product, reciprocal
        error = (rotary.inv_freq.double() / wanted - 1).abs().max()
        assert float(error) <= 4 * torch.finfo(torch.float32).eps


HOSTS = ["llama", "llama-llama3", "llama-yarn", "llama-biases", "llama-mha", "llama-mqa"]
HOSTS += ["mistral", "qwen2"]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_rank_gives_the_logits_and_tokens_of_the_original(host, dtype, tmp_path):
    model = grouped_model(host, dtype=dtype)
    conversion, check = convert_to_deepseek_v3(
        model, tokens(2, 24, seed=1), tmp_path / "v3", kv_budget=1.0
    )
    stock, ids = stock_of(tmp_path / "v3"), tokens(2, 40, seed=2)
    assert stock.dtype == dtype
    single = logits(grouped_model(host, dtype=torch.float32), ids)
    oracle = logits(grouped_model(host), ids)
    # The norm and the angles of the stock model are float32 in every dtype. Mixed weights, factors
    # and the norm are rounded once more than the original's weights: twice what it loses.
    twice = oracle + 2 * (single.double() - oracle)
    assert_within_budget(logits(stock, ids).float(), oracle, twice.float(), "logits", least=4.0)
    assert check.logit_difference <= 1e-4 * check.largest_logit
    half = model.config.num_key_value_heads * model.config.head_dim if host != "qwen2" else 16
    config = conversion.model.model.layers[0].self_attn.mla.config
    assert (config.qk_rope_head_dim, config.kv_lora_rank) == (half, half)
    inputs, options = left_padded([9, 4, 1], seed=3), {"max_new_tokens": 12}
    expected = continuation(model, inputs, **options)
    assert torch.equal(continuation(stock, inputs, **options), expected)


@pytest.mark.parametrize("host", ["llama", "llama-mqa", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kv_budget", [0.75, (4, 3)])
def test_a_budget_gives_the_logits_of_the_conversion(host, dtype, kv_budget, tmp_path):
    conversion = converted(host, kv_budget=kv_budget, dtype=dtype)
    export_deepseek_v3(conversion, tmp_path / "v3")
    stock, ids = stock_of(tmp_path / "v3"), tokens(2, 40, seed=2)
    oracle = logits(conversion.model.double(), ids)
    single = logits(conversion.model.float(), ids)
    twice = oracle + 2 * (single.double() - oracle)  # as above
    assert_within_budget(logits(stock, ids).float(), oracle, twice.float(), "logits", least=4.0)
    layers = conversion.model.model.layers
    assert len({layer.self_attn.mla.config for layer in layers}) == 1
    cached = stock.config.kv_lora_rank + stock.config.qk_rope_head_dim
    original = 2 * 8 * stock.config.hidden_size // 48 * (1 if host == "llama-mqa" else 2)
    assert cached == (7 if isinstance(kv_budget, tuple) else int(kv_budget * original) // 2 * 2)


@pytest.mark.parametrize("host", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kv_budget", [1.0, 0.5])
def test_stock_transformers_and_mla_generate_the_same_tokens(host, dtype, kv_budget, tmp_path):
    conversion = converted(host, kv_budget=kv_budget, dtype=dtype)
    export_deepseek_v3(conversion, tmp_path / "v3")
    stock, replaced = stock_of(tmp_path / "v3"), stock_of(tmp_path / "v3")
    assert len(replace_attention(replaced).replaced) == 2
    inputs, options = left_padded([9, 4, 1], seed=3), {"max_new_tokens": 12}
    expected = continuation(stock, inputs, **options)
    assert torch.equal(continuation(replaced, inputs, **options), expected)
    assert torch.equal(continuation(conversion.model, inputs, **options), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_caches_give_the_same_tokens(options):
    conversion = converted("qwen2", kv_budget=0.75)
    stock, inputs = to_deepseek_v3(conversion.model), left_padded([9, 4, 1], seed=3)
    expected = continuation(stock, inputs, **options)
    replace_attention(stock)
    assert torch.equal(continuation(stock, inputs, **options), expected)
    assert torch.equal(continuation(conversion.model, inputs, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", ["llama", "qwen2"])
def test_half_precision_loses_what_the_conversion_loses(host, dtype, tmp_path):
    conversion = converted(host, kv_budget=0.75, dtype=torch.float32)
    export_deepseek_v3(conversion, tmp_path / "v3")
    ids = tokens(2, 20, seed=2)
    oracle = logits(conversion.model.double(), ids)
    halved = logits(conversion.model.to(dtype), ids)
    loaded = logits(stock_of(tmp_path / "v3", dtype=dtype), ids)  # rounded once more, when loaded
    assert_within_budget(loaded, oracle, halved, "logits")
    assert loaded.dtype == dtype


def test_the_constant_is_cached_as_zero():
    conversion = converted("qwen2")
    stock = to_deepseek_v3(conversion.model)
    cache = transformers.DynamicCache()
    logits(stock, tokens(2, 5), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        assert not layer.keys[..., -1].any() and layer.keys[..., :-1].all()


def test_embeddings_and_mlps_are_shared_and_the_conversion_stays_as_it_is():
    conversion = converted()
    before = {name: x.clone() for name, x in conversion.model.state_dict().items()}
    stock = to_deepseek_v3(conversion.model)
    after = conversion.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    name = "model.layers.1.mlp.up_proj.weight"
    assert stock.state_dict()[name].data_ptr() == after[name].data_ptr()
    assert not stock.training


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="layout has value 'v3', expected one of"):
        convert_model(grouped_model(), tokens(1, 8), layout="v3")


@pytest.mark.parametrize(
    ("listed", "kv_budget", "message"),
    [
        ([0, 1], (6, 4), "has 2 values, expected R/2 of one kv_budget .R, C., got R in .6."),
        ([0, 1], 0.5, "has 2 values, expected R/2 of one"),
        ([3], (2, 4), r"has values \[3\], 1 times at most, expected 0 to 2, each at most 2"),
        ([1, 1, 1], (6, 4), r"has values \[1\], 3 times at most"),
    ],
)
def test_lists_that_no_layer_can_give_are_refused(listed, kv_budget, message):
    case = Case(G=2, per_group=1, half_d=3, D=7, has_biases=False, seed=0)
    with pytest.raises(ShapeError, match=message):
        case.convert(kv_budget=kv_budget, rotated_frequencies=listed)


@given(SEEDS)
def test_a_layer_keeps_the_listed_frequencies(seed):
    case = Case(G=2, per_group=2, half_d=3, D=7, has_biases=True, seed=seed)
    report = case.convert(kv_budget=(6, 5), rotated_frequencies=(2, 0, 2)).report
    assert report.rotated_frequencies == (0, 2, 2)
    free = case.convert(kv_budget=(6, 5)).report
    same = case.convert(kv_budget=(6, 5), rotated_frequencies=free.rotated_frequencies).report
    assert same == free
