"""Breaks of what shares a budget among layers, and of the layout of DeepSeek-V3; see mutants.py."""

from tools.mutants import Mutant

DEEPSEEK = "tests/test_convert_deepseek.py"
ALLOCATE = "tests/test_convert_allocate.py"
REFIT = "tests/test_convert_refit.py"
FOLDERS = "tests/test_convert_deepseek_folders.py"
FULL_RANK = f"{DEEPSEEK}::test_full_rank_gives_the_logits_and_tokens_of_the_original"
BUDGET = f"{DEEPSEEK}::test_a_budget_gives_the_logits_of_the_conversion"

MUTANTS: list[Mutant] = [
    Mutant(
        name="deepseek-lets-the-norm-see-the-latent-alone",
        file="mla/convert/deepseek.py",
        original="wide_bias[-1] = CONSTANT",
        broken="wide_bias[-1] = LARGEST",
        tests=(f"{DEEPSEEK}::test_the_norm_changes_nothing_beside_a_constant",),
    ),
    Mutant(
        name="deepseek-forgets-the-bias-in-the-bound-of-the-latent",
        file="mla/convert/deepseek.py",
        original="return float((square * weight.shape[1]).sqrt() + bias.norm())",
        broken="return float(square.sqrt() + bias.norm())",
        tests=(f"{DEEPSEEK}::test_no_input_takes_the_latent_beyond_its_range",),
    ),
    Mutant(
        name="deepseek-keeps-the-pairs-half-split",
        file="mla/convert/deepseek.py",
        original="pairs = torch.stack([first, second], dim=-2).flatten(-3, -2)",
        broken="pairs = rotated",
        tests=(f"{FULL_RANK}[dtype0-llama]",),
    ),
    Mutant(
        name="deepseek-forgets-the-scale-of-the-query-bias",
        file="mla/convert/deepseek.py",
        original="query_bias = interleave(by_head, R).flatten(0, 1) * scale",
        broken="query_bias = interleave(by_head, R).flatten(0, 1)",
        tests=(f"{FULL_RANK}[dtype0-qwen2]",),
    ),
    Mutant(
        name="deepseek-counts-the-constant-for-nothing",
        file="mla/convert/deepseek.py",
        original="sizes = [(R, C - 1) for R, C in pairs if R >= 2 and C >= 2]",
        broken="sizes = [(R, C) for R, C in pairs if R >= 2 and C >= 2]",
        tests=(f"{FOLDERS}::test_the_constant_counts",),
    ),
    Mutant(
        name="deepseek-writes-frequencies-for-factors",
        file="mla/convert/deepseek.py",
        original="factors = (1.0 / (standard.double() * wanted)).tolist()",
        broken="factors = (wanted / standard.double()).tolist()",
        tests=(f"{DEEPSEEK}::test_transformers_reads_the_frequencies_that_were_written",),
    ),
    Mutant(
        name="deepseek-orders-losses-of-a-frequency-from-the-smallest",
        file="mla/convert/deepseek.py",
        original="return by_frequency.sort(1, descending=True).values",
        broken="return by_frequency",
        tests=(f"{DEEPSEEK}::test_each_layer_gives_its_best_components_to_the_list",),
    ),
    Mutant(
        name="deepseek-overwrites-any-folder",
        file="mla/integrations/converted/deepseek.py",
        original='if not isinstance(values, dict) or values.get("format") != FORMAT:',
        broken='if isinstance(values, dict) and values.get("format") != FORMAT:',
        tests=(f"{FOLDERS}::test_overwrite_replaces_an_exported_model_only",),
    ),
    Mutant(
        name="allocate-lets-errors-be",
        file="mla/convert/allocate.py",
        original="row[units:] = spent[: room + 1 - units] + option.error",
        broken="row[units:] = spent[: room + 1 - units] + 1 / option.size",
        tests=(f"{ALLOCATE}::test_no_other_choice_within_the_budget_has_a_smaller_error",),
    ),
    Mutant(
        name="allocate-walks-one-way",
        file="mla/convert/allocate.py",
        original="near = (rope_dim, rope_dim - step, rope_dim + step)",
        broken="near = (rope_dim, rope_dim + step)",
        tests=(f"{ALLOCATE}::test_the_walk_ends_where_the_error_is_least",),
    ),
    Mutant(
        name="allocate-forgets-the-stream",
        file="mla/convert/allocate.py",
        original="errors.append((difference.square().sum(-1) / stream.float()).mean())",
        broken="errors.append(difference.square().sum(-1).mean())",
        tests=(f"{ALLOCATE}::test_the_error_is_that_of_the_layer_on_its_own_inputs",),
    ),
    Mutant(
        name="survey-overwrites-the-stream-it-reads",
        file="mla/integrations/converted/stream.py",
        original='path = self.folder / f"stream-{index % 2}.bin"',
        broken='path = self.folder / "stream-0.bin"',
        tests=(f"{ALLOCATE}::test_an_interrupted_survey_goes_on",),
    ),
    Mutant(
        name="survey-trusts-other-windows",
        file="mla/integrations/converted/calibrate.py",
        original="found.update(windows.cpu().numpy().tobytes())",
        broken="found.update(b'')",
        tests=(f"{ALLOCATE}::test_a_survey_of_something_else_is_begun_anew[windows]",),
    ),
    Mutant(
        name="stream-without-the-mask",
        file="mla/integrations/converted/stream.py",
        original="seen.append((hidden, kwargs))",
        broken='seen.append((hidden, kwargs | {"attention_mask": None}))',
        tests=(f"{ALLOCATE}::test_layers_see_what_they_see_in_the_whole_model[eager-llama]",),
    ),
    Mutant(
        name="refit-takes-what-does-worse",
        file="mla/convert/refit.py",
        original="if error < best:",
        broken="if error < best or candidate == RIDGES[0]:",
        tests=(f"{REFIT}::test_the_best_ridge_on_held_out_windows",),
    ),
    Mutant(
        name="refit-writes-into-the-original",
        file="mla/integrations/converted/refit.py",
        original="projection.weight.data = result.weight",
        broken="projection.weight.copy_(result.weight)",
        tests=(f"{REFIT}::test_layers_gain_and_the_original_keeps_every_bit[llama]",),
    ),
]
