"""One-line breaks of the code and the tests that must notice them; `make mutants` tries each.

``original`` is the whole line without its indentation and must occur once in its file, so change it
here when the code changes. Add a break with each new capability: the one that a reader would miss.
"""

from mutants_baselines import MUTANTS as BREAKS_OF_BASELINES
from mutants_bench import MUTANTS as BREAKS_OF_BENCHMARKS
from mutants_context import MUTANTS as BREAKS_OF_CONTEXT
from mutants_convert import MUTANTS as BREAKS_OF_CONVERSION
from mutants_cpp import MUTANTS as BREAKS_OF_CPP
from mutants_files import MUTANTS as BREAKS_OF_FILES
from mutants_heal import MUTANTS as BREAKS_OF_HEALING
from mutants_kernels import MUTANTS as BREAKS_OF_KERNELS
from mutants_ops import MUTANTS as BREAKS_OF_OPS
from mutants_paged import MUTANTS as BREAKS_OF_PAGES
from mutants_parallel import MUTANTS as BREAKS_OF_PARALLEL
from mutants_plan import MUTANTS as BREAKS_OF_PLAN
from mutants_ray import MUTANTS as BREAKS_OF_RAY
from mutants_transformers import MUTANTS as BREAKS_OF_TRANSFORMERS
from mutants_vllm import MUTANTS as BREAKS_OF_VLLM

from tools.mutants import Mutant

CONFIG = "tests/test_config.py"
ROPE = "tests/test_rope.py"
MODULE = "tests/test_module.py"
ABSORB = "tests/test_absorb.py"
CONFIG_HOSTS = "tests/test_config_transformers.py"
ROPE_HOSTS = "tests/test_rope_transformers.py"
ADAPTERS = "tests/test_absorb_adapters.py"
CONVERT = "tests/test_convert.py"
CONVERT_STATISTICS = "tests/test_convert_statistics.py"
CHECKPOINT = "tests/test_checkpoint.py"
TRANSFORMERS = "tests/test_transformers"
CLI = "tests/test_cli.py"
CHECK = "tests/test_check.py"
DEMO = "tests/test_demo.py"
PLAN = "tests/test_plan.py"

MUTANTS: list[Mutant] = [
    *BREAKS_OF_OPS,
    *BREAKS_OF_KERNELS,
    *BREAKS_OF_TRANSFORMERS,
    *BREAKS_OF_FILES,
    *BREAKS_OF_PAGES,
    *BREAKS_OF_CPP,
    *BREAKS_OF_CONVERSION,
    *BREAKS_OF_HEALING,
    *BREAKS_OF_VLLM,
    *BREAKS_OF_PLAN,
    *BREAKS_OF_CONTEXT,
    *BREAKS_OF_PARALLEL,
    *BREAKS_OF_RAY,
    *BREAKS_OF_BASELINES,
    *BREAKS_OF_BENCHMARKS,
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
        original="weight = torch.exp(top - highest) * total",
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
    Mutant(
        name="scale-takes-mscale-without-scaling",
        file="mla/config.py",
        original='if self.scaling == "none" or not self.mscale_all_dim:',
        broken="if not self.mscale_all_dim:",
        tests=(f"{CONFIG}::test_mscale_without_scaling_leaves_the_scale_alone",),
    ),
    Mutant(
        name="from-hf-scales-the-latent-as-the-queries",
        file="mla/presets.py",
        original='scales = {"query_scale": (D / Q) ** 0.5, "latent_scale": (D / C) ** 0.5}',
        broken='scales = {"query_scale": (D / Q) ** 0.5, "latent_scale": (D / Q) ** 0.5}',
        tests=(f"{CONFIG_HOSTS}::test_from_hf_describes_what_transformers_builds[longcat_flash]",),
    ),
    Mutant(
        name="from-hf-ignores-rope-interleave",
        file="mla/presets.py",
        original='pairing = "half" if get("rope_interleave") is False else "interleaved"',
        broken='pairing = "interleaved"',
        tests=(f"{CONFIG_HOSTS}::test_rope_interleave_names_the_pairing",),
    ),
    Mutant(
        name="from-hf-takes-linear-attention-for-latent",
        file="mla/presets.py",
        original='if kinds is not None and kinds[layer_idx] != "full_attention":',
        broken="if kinds is not None and layer_idx >= len(kinds):",
        tests=(
            f"{CONFIG_HOSTS}::test_layer_with_linear_attention_is_refused_and_the_others_are_named",
        ),
    ),
    Mutant(
        name="rope-ramp-of-yarn-ends-at-the-last-pair",
        file="mla/rope.py",
        original="low, high = max(low, 0), min(high, R - 1)",
        broken="low, high = max(low, 0), min(high, R // 2 - 1)",
        tests=(f"{ROPE_HOSTS}::test_float32_angles_are_the_bits_of_transformers[yarn-wide]",),
    ),
    Mutant(
        name="rope-angles-in-the-dtype-of-the-result",
        file="mla/rope.py",
        original="angles = positions.unsqueeze(-1).to(compute_dtype) * inv_freq",
        broken="angles = positions.unsqueeze(-1).to(dtype) * inv_freq",
        tests=(f"{ROPE_HOSTS}::test_float32_angles_are_the_bits_of_transformers[default]",),
    ),
    Mutant(
        name="rope-keeps-a-fake-table",
        file="mla/rope.py",
        original="if torch.compiler.is_compiling() or type(positions) is not Tensor:",
        broken="if torch.compiler.is_compiling():",
        tests=(f"{ROPE}::test_fake_and_meta_tensors_pass_and_leave_nothing_behind",),
    ),
    Mutant(
        name="rope-query-scale-grows-between-contexts",
        file="mla/rope.py",
        original="turns = torch.floor(positions.to(compute_dtype) / _trained_context(rope))",
        broken="turns = positions.to(compute_dtype) / _trained_context(rope)",
        tests=(f"{ROPE}::test_position_scale_matches_the_formula",),
    ),
    Mutant(
        name="absorb-counts-a-merged-adapter-twice",
        file="mla/absorb.py",
        original="if module.merged:",
        broken="if module.merged and module.disable_adapters:",
        tests=(f"{ADAPTERS}::test_merged_adapter_is_counted_once",),
    ),
    Mutant(
        name="absorb-forgets-the-scaling-of-an-adapter",
        file="mla/absorb.py",
        original="weight = (weight + sign * module.scaling[name] * (up @ down)).to(weight.dtype)",
        broken="weight = (weight + sign * (up @ down)).to(weight.dtype)",
        tests=(f"{ADAPTERS}::test_adapter_is_honoured_in_every_state",),
    ),
    Mutant(
        name="absorb-ignores-dropout-of-an-adapter",
        file="mla/absorb.py",
        original="if module.training and dropout > 0.0 and is_applied_to_input:",
        broken="if module.training and dropout >= 1.0 and is_applied_to_input:",
        tests=(f"{ADAPTERS}::test_dropout_of_an_adapter_is_refused_in_training_alone",),
    ),
    Mutant(
        name="conversion-rotates-queries-the-other-way",
        file="mla/convert/rotate.py",
        original="return pairs_HJE * back_HJ.conj()[..., None]",
        broken="return pairs_HJE * back_HJ[..., None]",
        tests=(f"{CONVERT}::test_full_budget_is_exact",),
    ),
    Mutant(
        name="conversion-takes-distance-0-for-dropped-pairs",
        file="mla/convert/gqa.py",
        original="unrotated_query=as_real(as_complex(heads.query) * rotation[:, None]),",
        broken="unrotated_query=heads.query,",
        tests=(f"{CONVERT}::test_unrotated_scores_are_the_mean_over_distances",),
    ),
    Mutant(
        name="conversion-counts-both-parts-of-a-complex-score",
        file="mla/convert/rotate.py",
        original="energy=energy_lj.flatten(),",
        broken="energy=2 * energy_lj.flatten(),",
        tests=(f"{CONVERT}::test_reported_score_error_is_the_measured_one",),
    ),
    Mutant(
        name="conversion-keeps-pairs-that-hardly-turn",
        file="mla/convert/choose.py",
        original="loss = components.energy * spread[components.frequency]",
        broken="loss = components.energy",
        tests=(f"{CONVERT}::test_fast_pairs_keep_their_rotation",),
    ),
    Mutant(
        name="conversion-forgets-the-mean-of-the-values",
        file="mla/convert/gqa.py",
        original="output_bias = output_bias + weights.output_bias.to(output_bias)",
        broken="output_bias = weights.output_bias.to(output_bias)",
        tests=(f"{CONVERT}::test_mean_of_values_goes_to_the_output_bias",),
    ),
    Mutant(
        name="conversion-expands-in-the-wrong-metric",
        file="mla/convert/latent.py",
        original="value_up=value_weight.inverse_root @ taken[K:],",
        broken="value_up=value_weight.root @ taken[K:],",
        tests=(f"{CONVERT}::test_full_budget_is_exact",),
    ),
    Mutant(
        name="calibration-weighs-keys-by-attention-not-its-square",
        file="mla/convert/statistics.py",
        original="weights += probabilities.square().sum((0, 1))",
        broken="weights += probabilities.sum((0, 1))",
        tests=(f"{CONVERT_STATISTICS}::test_attention_received_counts_probabilities",),
    ),
    Mutant(
        name="checkpoint-overwrites-any-folder",
        file="mla/convert/checkpoint.py",
        original="_read_config(path)",
        broken="pass",
        tests=(f"{CHECKPOINT}::test_overwrite_replaces_a_converted_model_only",),
    ),
    Mutant(
        name="transformers-takes-a-mask-with-holes-for-a-run",
        file="mla/integrations/transformers/masks.py",
        original="elif not bool(is_run.all()):",
        broken="elif not bool(is_run.any()):",
        tests=(f"{TRANSFORMERS}_masks.py::test_rows_with_holes_stay_boolean",),
    ),
    Mutant(
        name="transformers-aligns-a-missing-mask-at-the-last-key",
        file="mla/integrations/transformers/masks.py",
        original="return KeyRuns(None, None, num_queries) if num_queries <= num_keys else None",
        broken="return KeyRuns(None, None, num_keys) if num_queries <= num_keys else None",
        tests=(f"{TRANSFORMERS}_attend.py::test_without_a_mask_sdpa_of_transformers_decides",),
    ),
    Mutant(
        name="transformers-leaves-out-a-bidirectional-mask",
        file="mla/integrations/transformers/masks.py",
        original="options = kwargs | never_skip",
        broken="options = kwargs",
        tests=(f"{TRANSFORMERS}_masks.py::test_other_patterns_stay_boolean",),
    ),
    Mutant(
        name="transformers-trains-through-the-decode-op",
        file="mla/integrations/transformers/attend.py",
        original="if not needs_grad and should_absorb(L, runs.num_keys, sizes):",
        broken="if should_absorb(L, runs.num_keys, sizes):",
        tests=(f"{TRANSFORMERS}_attend.py::test_gradients_equal_those_of_plain_attention",),
    ),
    Mutant(
        name="transformers-joins-rows-of-other-positions",
        file="mla/integrations/transformers/attend.py",
        original="and latent.storage_offset() + C == k_rope.storage_offset()",
        broken="and latent.storage_offset() != k_rope.storage_offset()",
        tests=(f"{TRANSFORMERS}_attend.py::test_rows_are_joined_only_where_they_lie_apart",),
    ),
    Mutant(
        name="transformers-copies-the-cache-in-compiled-steps",
        file="mla/integrations/transformers/attend.py",
        original="if base is not None and base is k_rope._base and _is_buffer(base, B, T, width):",
        broken="if base is k_rope and _is_buffer(base, B, T, width):",
        tests=(f"{TRANSFORMERS}_compile.py::test_generate_compiles_decoding_by_itself",),
    ),
    Mutant(
        name="transformers-overwrites-recorded-rows",
        file="mla/integrations/transformers/caches.py",
        original="if length <= capacity and not is_frozen and not self.is_recorded:",
        broken="if length <= capacity and not is_frozen:",
        tests=(f"{TRANSFORMERS}_caches.py::test_a_recorded_step_keeps_its_rows",),
    ),
    Mutant(
        name="transformers-moves-a-static-cache",
        file="mla/integrations/transformers/caches.py",
        original="self.rows.copy_(self.rows[beam_idx.to(self.rows.device)])",
        broken="self.rows = self.rows[beam_idx.to(self.rows.device)]",
        tests=(f"{TRANSFORMERS}_caches.py::test_a_static_layer_holds_what_transformers_holds",),
    ),
    Mutant(
        name="transformers-ignores-keywords",
        file="mla/integrations/transformers/dispatch.py",
        original="if value is None or value is False or name in HARMLESS:",
        broken='if name != "output_attentions":',
        tests=(
            f"{TRANSFORMERS}_replace.py::test_keywords_that_may_change_the_mathematics_are_refused",
        ),
    ),
    Mutant(
        name="transformers-reads-masks-it-does-not-know",
        file="mla/integrations/transformers/dispatch.py",
        original="if implementation not in MASKS:",
        broken="if implementation is None:",
        tests=(f"{TRANSFORMERS}_replace.py::test_masks_that_cannot_be_read_are_refused",),
    ),
    Mutant(
        name="transformers-writes-a-shared-config",
        file="mla/integrations/transformers/replace.py",
        original="result = copy.copy(config)",
        broken="result = config",
        tests=(f"{TRANSFORMERS}_replace.py::test_restoring_gives_back_exactly_the_stock_model",),
    ),
    Mutant(
        name="transformers-mixes-stock-and-replaced-layers",
        file="mla/integrations/transformers/replace.py",
        original="if reason is None and id(owner) in stock:",
        broken="if reason is None and id(layer) in stock:",
        tests=(f"{TRANSFORMERS}_inputs.py::test_a_quantised_layer_keeps_its_decoder_stock",),
    ),
    Mutant(
        name="check-passes-whatever-fails",
        file="mla/cli/check.py",
        original="return 1 if failed else 0",
        broken="return 0",
        tests=(f"{CHECK}::test_a_step_that_raises_or_gives_nan_is_a_failure",),
    ),
    Mutant(
        name="check-allows-ten-times-too-much",
        file="mla/cli/check_compare.py",
        original="return 2 * (float(loss.abs().max()) + rounding) + slack",
        broken="return 1e9 * (float(loss.abs().max()) + rounding) + slack",
        tests=(f"{CHECK}::test_wrong_pairing_is_named",),
    ),
    Mutant(
        name="check-takes-mscale-once",
        file="mla/cli/check_conventions.py",
        original="scale = m * m / math.sqrt(config.qk_nope_head_dim + R)",
        broken="scale = m / math.sqrt(config.qk_nope_head_dim + R)",
        tests=(f"{CHECK}::test_conventions_agree_with_the_package_on_presets",),
    ),
    Mutant(
        name="plan-forgets-the-absorbed-products",
        file="mla/plan/cost.py",
        original="fixed = query + D * (C + R) + H * C * (N + V) + H * V * D",
        broken="fixed = query + D * (C + R) + H * V * D",
        tests=(f"{PLAN}::test_multiply_adds_are_those_of_the_matrix_products",),
    ),
    Mutant(
        name="plan-absorbs-a-cold-prefill",
        file="mla/plan/cost.py",
        original="return L < T and L * (C * d + T * (2 * C - d)) < T * C * d",
        broken="return L * (C * d + T * (2 * C - d)) < T * C * d",
        tests=(f"{PLAN}::test_a_cold_prefill_never_absorbs_however_narrow_the_latent",),
    ),
    Mutant(
        name="demo-times-the-first-step-too",
        file="mla/cli/speed.py",
        original="rounds = {name: times[WARM_UP:] for name, times in rounds.items()}",
        broken="rounds = dict(rounds)",
        tests=(f"{DEMO}::test_demo_writes_report_plot_and_model",),
    ),
    Mutant(
        name="command-line-shows-tracebacks",
        file="mla/__main__.py",
        original="except (ValueError, OSError, ImportError) as error:",
        broken="except (OSError, ImportError) as error:",
        tests=(f"{CLI}::test_missing_model_and_text_are_one_line",),
    ),
    Mutant(
        name="convert-force-replaces-any-folder",
        file="mla/cli/convert.py",
        original='raise CommandError(f"{folder} holds no converted model and is left alone; '
        'choose another")',
        broken="return",
        tests=(f"{CLI}::test_force_replaces_a_converted_model_and_nothing_else",),
    ),
]
