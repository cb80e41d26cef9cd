"""One-line breaks of tensor parallelism and of the rules for DTensors."""

from tools.mutants import Mutant

TENSOR = "tests/parallel/test_tensor.py"
SHARDING = "tests/parallel/test_tensor_sharding.py"
GRADIENTS = (f"{TENSOR}::test_output_and_every_gradient_are_those_of_one_process",)
REFUSED = (f"{TENSOR}::test_what_cannot_be_sharded_is_refused_and_left_alone",)
OPS = (f"{SHARDING}::test_ops_on_dtensors_are_those_on_plain_tensors",)

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "rotated-key-keeps-the-gradient-of-own-heads",
        "mla/parallel/tensor.py",
        "if own_columns == 0 or not whole.requires_grad:",
        "if own_columns >= 0 or not whole.requires_grad:",
        GRADIENTS,
    ),
    (
        "latent-keeps-the-gradient-of-own-heads",
        "mla/absorb.py",
        "return whole.to_local(grad_placements=[Partial()])",
        "return whole.to_local()",
        GRADIENTS,
    ),
    (
        "latent-sums-its-gradient-twice",
        "mla/parallel/tensor.py",
        "return Replicated(own_columns=module.out_features - layer.kv_b_proj.in_features)",
        "return Replicated(own_columns=module.out_features)",
        GRADIENTS,
    ),
    (
        "ranks-begin-with-weights-of-their-own",
        "mla/parallel/tensor.py",
        "parallelize_module(module, mesh, styles, src_data_rank=src_data_rank)",
        "parallelize_module(module, mesh, styles, src_data_rank=None)",
        (f"{TENSOR}::test_parameters_lie_where_the_plan_says",),
    ),
    (
        "heads-that-do-not-divide-are-sharded",
        "mla/parallel/tensor.py",
        "if H % size:",
        "if H < size:",
        REFUSED,
    ),
    (
        "sharded-layers-are-sharded-again",
        "mla/parallel/tensor.py",
        "if isinstance(weight, DTensor):",
        "if isinstance(weight, int):",
        REFUSED,
    ),
    (
        "gradient-of-latents-counts-as-whole",
        "mla/parallel/sharding.py",
        "rules.append(_rule(arguments, [HEADS, Partial(), Partial(), ROWS], heads))",
        "rules.append(_rule(arguments, [HEADS, WHOLE, WHOLE, ROWS], heads))",
        OPS,
    ),
    (
        "gradient-of-the-weight-counts-as-whole",
        "mla/parallel/sharding.py",
        "rules.append(_rule(arguments, [ROWS, ROWS, ROWS, Partial()], batch))",
        "rules.append(_rule(arguments, [ROWS, ROWS, ROWS, WHOLE], batch))",
        OPS,
    ),
    (
        "pools-of-pages-are-cut-with-the-batch",
        "mla/parallel/sharding.py",
        "return {first + index: ROWS for index in range(4) if index > 0 or is_dense}",
        "return {first + index: ROWS for index in range(4)}",
        OPS,
    ),
    (
        "odd-heads-are-cut",
        "mla/parallel/sharding.py",
        "return query.shape[2] % prod(size for size, cut in sizes if not cut.is_shard(0)) == 0",
        "return query.shape[2] >= prod(size for size, cut in sizes if not cut.is_shard(0))",
        (f"{SHARDING}::test_outputs_lie_as_their_inputs_do",),
    ),
    (
        "rows-of-half-the-heads-are-expanded",
        "mla/module.py",
        "if weight.shape[0] != H * width:",
        "if weight.shape[0] < 0:",
        ("tests/test_module_errors.py::test_weight_of_other_heads_is_refused",),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
