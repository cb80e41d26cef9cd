"""One-line breaks of the code and the tests that must notice them; `make mutants` tries each.

``original`` is the whole line without its indentation and must occur once in its file, so change it
here when the code changes. Add a break with each new capability: the one that a reader would miss.
"""

from tools.mutants import Mutant

CONFIG = "tests/test_config.py"
ROPE = "tests/test_rope.py"
MODULE = "tests/test_module.py"
ABSORB = "tests/test_absorb.py"

MUTANTS: list[Mutant] = [
    Mutant(
        name="scale-forgets-the-rotated-width",
        file="mla/config.py",
        original="return float(self.qk_head_dim**-0.5 * m * m)",
        broken="return float(self.qk_nope_head_dim**-0.5 * m * m)",
        tests=(f"{CONFIG}::test_scale_of_published_models",),
    ),
    Mutant(
        name="rope-pairs-of-the-other-convention",
        file="mla/rope.py",
        original="first, second = x.view(*x.shape[:-1], R // 2, 2).unbind(-1)",
        broken="first, second = x.chunk(2, dim=-1)",
        tests=(f"{ROPE}::test_rotation_matches_the_oracle",),
    ),
    Mutant(
        name="rope-longrope-switches-a-position-late",
        file="mla/rope.py",
        original="is_long = (positions >= _trained_context(rope)).any()",
        broken="is_long = (positions > _trained_context(rope)).any()",
        tests=(f"{ROPE}::test_longrope_takes_the_long_frequencies_from_the_trained_context_on",),
    ),
    Mutant(
        name="norm-of-the-latent-is-left-out",
        file="mla/module.py",
        original="latent = self.kv_a_layernorm(latent)",
        broken="latent = latent * self.kv_a_layernorm.weight",
        tests=(f"{MODULE}::test_matches_the_oracle",),
    ),
    Mutant(
        name="mask-lets-a-query-see-the-whole-chunk",
        file="mla/kernels/eager/decode.py",
        original="ends = tuple(local_count(view, length - count + i + 1) for i in range(count))",
        broken="ends = tuple(local_count(view, length - i // count) for i in range(count))",
        tests=(f"{MODULE}::test_cached_steps_equal_one_pass",),
    ),
    Mutant(
        name="mask-ignores-left-padding-in-decode",
        file="mla/kernels/eager/decode.py",
        original="yield Run(b0, b, local_count(view, start), ends)",
        broken="yield Run(b0, b, 0, ends)",
        tests=(f"{MODULE}::test_left_padding_is_invisible",),
    ),
    Mutant(
        name="merge-forgets-the-sum-of-a-part",
        file="mla/kernels/eager/decode.py",
        original="weight = torch.exp(top - highest) * torch.stack([part.total for part in flat])",
        broken="weight = torch.exp(top - highest)",
        tests=(f"{MODULE}::test_cached_steps_equal_one_pass",),
    ),
    Mutant(
        name="absorb-takes-value-rows-from-the-front",
        file="mla/absorb.py",
        original="return KeyValueWeights(weight_HIC[:, :N], weight_HIC[:, N:])",
        broken="return KeyValueWeights(weight_HIC[:, :N], weight_HIC[:, :V])",
        tests=(f"{ABSORB}::test_parts_are_views_of_the_weight",),
    ),
]
