"""W_UK and W_UV as views, the two products, and the weight behind adapters and wrappers."""

import pytest
import torch
from einops import einsum, rearrange
from helpers import assert_within_budget, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mla.absorb import absorb_output, absorb_queries, effective_weight, split_kv_b
from mla.checks import ShapeError, UnsupportedError

H, N, V, C = 3, 5, 4, 7

CASES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "L": st.integers(0, 3),
        "H": st.sampled_from([1, 3, 9]),
        "N": st.integers(0, 9),
        "V": st.integers(1, 9),
        "C": st.integers(1, 20),
        "seed": st.integers(0, 2**31 - 1),
    }
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def make_layer(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, bias: bool = False
) -> nn.Linear:
    layer = nn.Linear(C, H * (N + V), bias=bias, dtype=dtype)
    layer.weight.data.copy_(randn(H * (N + V), C, seed=seed))
    return layer


@given(case=CASES)
def test_parts_are_views_of_the_weight(case):
    H, N, V, C = (case[name] for name in "HNVC")
    weight = randn(H * (N + V), C, seed=case["seed"])
    parts = split_kv_b(weight, H, N, V)
    assert parts.w_uk.shape == (H, N, C)
    assert parts.w_uv.shape == (H, V, C)
    storage = weight.untyped_storage().data_ptr()
    assert {part.untyped_storage().data_ptr() for part in parts} == {storage}
    assert parts.w_uv.data_ptr() == weight[N:].data_ptr()
    wanted = rearrange(weight, "(h nv) c -> h nv c", h=H)
    assert torch.equal(torch.cat(parts, dim=1), wanted)


def test_parts_follow_changes_of_the_weight():
    layer = make_layer()
    w_uk = split_kv_b(effective_weight(layer), H, N, V).w_uk
    before = w_uk.detach().clone()
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    torch.testing.assert_close(w_uk, before - 0.5)
    layer.load_state_dict({"weight": torch.zeros_like(layer.weight)})
    assert (w_uk == 0).all()


def test_weight_of_other_strides_is_not_copied():
    weight = randn(C, H * (N + V), seed=0).T
    parts = split_kv_b(weight, H, N, V)
    assert parts.w_uk.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("shape", [(H * (N + V) + 1, C), (H, N + V, C)])
def test_weight_of_other_shape_is_refused(shape):
    with pytest.raises(
        ShapeError, match=r"split_kv_b: weight has shape .* expected \[H\*\(N\+V\)=27"
    ):
        split_kv_b(torch.zeros(shape), H, N, V)


def drawn_products(case: dict[str, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    B, L, H, N, V, C, seed = (case[name] for name in ("B", "L", "H", "N", "V", "C", "seed"))
    weight = randn(H * (N + V), C, seed=seed, dtype=dtype)
    queries = randn(B, L, H, N, seed=seed + 1, dtype=dtype)
    out = randn(B, L, H, C, seed=seed + 2, dtype=dtype)
    return *split_kv_b(weight, H, N, V), queries, out


@given(case=CASES, dtype=DTYPES)
def test_products_match_the_formula(case, dtype):
    w_uk, w_uv, queries, out = drawn_products(case, dtype)
    pattern, back = "b l h n, h n c -> b l h c", "b l h c, h v c -> b l h v"
    assert_within_budget(
        absorb_queries(queries, w_uk),
        einsum(queries.double(), w_uk.double(), pattern),
        einsum(queries, w_uk, pattern),
        "q_latent",
    )
    assert_within_budget(
        absorb_output(out, w_uv),
        einsum(out.double(), w_uv.double(), back),
        einsum(out, w_uv, back),
        "values",
    )


@given(case=CASES)
def test_absorbed_scores_and_values_equal_expanded_ones(case):
    w_uk, w_uv, queries, _ = drawn_products(case, torch.float64)
    latent = randn(case["B"], 6, case["C"], seed=case["seed"] + 3, dtype=torch.float64)
    weights = randn(case["B"], case["L"], case["H"], 6, seed=case["seed"], dtype=torch.float64)
    keys = einsum(latent, w_uk, "b s c, h n c -> b s h n")
    values = einsum(latent, w_uv, "b s c, h v c -> b s h v")
    torch.testing.assert_close(
        einsum(absorb_queries(queries, w_uk), latent, "b l h c, b s c -> b l h s"),
        einsum(queries, keys, "b l h n, b s h n -> b l h s"),
    )
    torch.testing.assert_close(
        absorb_output(einsum(weights, latent, "b l h s, b s c -> b l h c"), w_uv),
        einsum(weights, values, "b l h s, b s h v -> b l h v"),
    )


def test_queries_without_unrotated_part_give_zeros():
    w_uk = split_kv_b(torch.full((H * V, C), float("nan")), H, 0, V).w_uk
    assert torch.equal(absorb_queries(torch.zeros(2, 1, H, 0), w_uk), torch.zeros(2, 1, H, C))


@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**31 - 1))
def test_inputs_of_any_strides_are_taken(dtype, seed):
    w_uk, w_uv = split_kv_b(randn(H * (N + V), C, seed=seed, dtype=dtype), H, N, V)
    queries = randn(2, H, 4, N + 2, seed=seed, dtype=dtype).transpose(1, 2)[..., :N]
    out = randn(2, H, 4, C, seed=seed, dtype=dtype).transpose(1, 2)
    assert torch.equal(absorb_queries(queries, w_uk), absorb_queries(queries.contiguous(), w_uk))
    assert torch.equal(absorb_output(out, w_uv), absorb_output(out.contiguous(), w_uv))


@given(case=CASES)
def test_gradients_are_those_of_finite_differences(case):
    case = case | {"H": 2, "N": min(case["N"], 3), "V": min(case["V"], 3), "C": min(case["C"], 4)}
    layer = nn.Linear(case["C"], 2 * (case["N"] + case["V"]), bias=False, dtype=torch.float64)
    _, _, queries, out = drawn_products(case, torch.float64)

    def run(queries: Tensor, out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        w_uk, w_uv = split_kv_b(weight, 2, case["N"], case["V"])
        return absorb_queries(queries, w_uk), absorb_output(out, w_uv)

    inputs = queries.requires_grad_(), out.requires_grad_(), effective_weight(layer)
    assert torch.autograd.gradcheck(run, inputs)


def test_bfloat16_gradient_reaches_the_weight():
    layer = make_layer(dtype=torch.bfloat16)
    w_uk, w_uv = split_kv_b(effective_weight(layer), H, N, V)
    out = absorb_output(absorb_queries(randn(1, 2, H, N, seed=0, dtype=torch.bfloat16), w_uk), w_uv)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad != 0).all()


def multiplies_with(layer: nn.Module) -> Tensor:
    """The matrix of a linear map, read off its images of the unit vectors."""
    return layer(torch.eye(C, dtype=torch.float64)).T


def test_weight_of_a_plain_layer_is_its_parameter():
    layer = make_layer()
    assert effective_weight(layer) is layer.weight
    assert effective_weight(layer.to("meta")) is layer.weight


def test_parametrized_weight_is_the_one_in_force():
    layer = make_layer()
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert torch.equal(effective_weight(layer), multiplies_with(layer))


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PackedTensor(Tensor):
    pass


def test_layers_that_are_not_one_matrix_are_refused():
    quantised = torch.ao.nn.quantized.dynamic.Linear(C, H * (N + V))
    packed = make_layer()
    packed.weight = nn.Parameter(packed.weight.detach().as_subclass(PackedTensor))
    eight_bits = make_layer()
    eight_bits.weight = nn.Parameter(
        eight_bits.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    replaced = make_layer()
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    for layer, fact in (
        (make_layer(bias=True), "a bias, expected .*; a bias of keys cannot be absorbed"),
        (ScaledLinear(C, H * (N + V), bias=False), "type test_absorb.ScaledLinear"),
        (nn.Identity(), "type torch.nn.modules.linear.Identity"),
        (quantised, "type torch.*quantized"),
        (packed, "a weight of type PackedTensor"),
        (eight_bits, "a weight of type Parameter and dtype torch.float8_e4m3fn"),
        (replaced, "a forward method of its own"),
    ):
        with pytest.raises(UnsupportedError, match=f"effective_weight: kv_b_proj has {fact}"):
            effective_weight(layer)


def test_hooks_of_accelerate_pass_unless_they_offload():
    hooks = pytest.importorskip("accelerate.hooks")
    layer = make_layer()
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    assert effective_weight(layer) is layer.weight
    hook = hooks.AlignDevicesHook(
        execution_device="cpu", offload=True, weights_map=layer.state_dict()
    )
    for append in (False, True):
        layer = make_layer()
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooks.add_hook_to_module(layer, hook, append=append)
        with pytest.raises(UnsupportedError, match="an offloaded weight"):
            effective_weight(layer)


def test_weight_sharded_by_rows_gives_those_of_this_process(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = make_layer()
        plain = layer.weight.detach()
        layer.weight = nn.Parameter(distribute_tensor(plain, mesh, [Shard(0)]))
        held = effective_weight(layer)
        assert not isinstance(held, DTensor) and torch.equal(held, plain)
        layer.weight = nn.Parameter(distribute_tensor(plain, mesh, [Shard(1)]))
        with pytest.raises(UnsupportedError, match=r"placements \(Shard\(dim=1\),\)"):
            effective_weight(layer)
    finally:
        distributed.destroy_process_group()


def test_compiles_without_breaks():
    layer = make_layer()

    def run(queries: Tensor) -> Tensor:
        w_uk, w_uv = split_kv_b(effective_weight(layer), H, N, V)
        return absorb_output(absorb_queries(queries, w_uk), w_uv)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    queries = randn(2, 1, H, N, seed=0, dtype=torch.float64)
    torch.testing.assert_close(compiled(queries), run(queries))
