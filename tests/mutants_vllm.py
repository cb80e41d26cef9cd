"""Breaks of the vLLM plugin."""

from tools.mutants import Mutant

PACKAGE = "mla/integrations/vllm"
PLUGIN = "tests/test_vllm_plugin.py"
STEP = f"{PLUGIN}::test_the_decode_step_matches_the_oracle"


def _break(name: str, file: str, original: str, broken: str, *tests: str) -> Mutant:
    return Mutant(f"vllm-{name}", f"{PACKAGE}/{file}", original, broken, tests)


MUTANTS: list[Mutant] = [
    _break(
        "is-taken-where-another-backend-is-asked",
        "choose.py",
        "if asked != AttentionBackendEnum.CUSTOM:",
        "if asked is None:",
        f"{PLUGIN}::test_custom_is_ours_and_others_are_left",
    ),
    _break(
        "takes-the-place-of-another-plugin",
        "__init__.py",
        "if backend is not None and not backend.is_overridden():",
        "if backend is not None:",
        f"{PLUGIN}::test_another_plugin_keeps_the_place_it_took",
    ),
    _break(
        "answers-for-gpus",
        "__init__.py",
        "if current_platform.is_cpu():",
        "if current_platform:",
        f"{PLUGIN}::test_on_other_platforms_only_custom_is_registered",
    ),
    _break(
        "puts-tokens-of-a-request-behind-each-other",
        "backend.py",
        "places = row * L + torch.arange(len(row)) - starts[row]",
        "places = torch.arange(len(row))",
        STEP,
    ),
    _break(
        "takes-padding-for-queries",
        "backend.py",
        "metadata.query_lengths = counts.to(dtype=torch.int32, device=seq_lens.device)",
        "metadata.query_lengths = None",
        STEP,
    ),
    _break(
        "promises-prefill-context-parallelism",
        "backend.py",
        "supports_pcp: bool = False",
        "supports_pcp: bool = True",
        f"{PLUGIN}::test_what_is_not_tested_is_not_said_to_be_there",
    ),
    _break(
        "takes-engines-that-are-not-tested",
        "backend.py",
        "decode_context_parallel_size=parallel.decode_context_parallel_size > 1,",
        "decode_context_parallel_size=False,",
        f"{PLUGIN}::test_engines_that_are_not_tested_are_refused",
    ),
    _break(
        "reads-a-copy-of-the-cache",
        "backend.py",
        "R = kv_c_and_k_pe_cache.shape[-1] - C",
        "R = kv_c_and_k_pe_cache.shape[-1] - C; kv_c_and_k_pe_cache = kv_c_and_k_pe_cache.clone()",
        f"{PLUGIN}::test_the_cache_is_read_in_place",
    ),
]
