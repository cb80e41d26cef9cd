"""One-line breaks of the plan and of the energy counters."""

from tools.mutants import Mutant

COMMUNICATION = "tests/test_plan_communication.py"
ROOFLINE = "tests/test_plan_roofline.py"
MEASURED = "tests/test_plan_measured.py"
ENERGY = "tests/test_energy.py"
BY_HAND = f"{COMMUNICATION}::test_deepseek_v3_by_hand"
GROUPS = f"{ROOFLINE}::test_deepseek_v3_groups_by_hand"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "plan-forgets-half-of-an-all-reduce",
        "mla/plan/communication.py",
        "messages = 2 * (num_devices - 1)",
        "messages = num_devices - 1",
        (BY_HAND, f"{COMMUNICATION}::test_ring_all_reduce_is_a_reduce_scatter_and_an_all_gather"),
    ),
    (
        "plan-forgets-the-log-sum-exp",
        "mla/plan/communication.py",
        "numbers = heads_per_device(config, tensor) * (width + 1)",
        "numbers = heads_per_device(config, tensor) * width",
        (BY_HAND,),
    ),
    (
        "plan-exchanges-latents-without-rotated-keys",
        "mla/plan/communication.py",
        "return ring_all_gather(batch * share * config.cache_width * dtype.itemsize, context)",
        "return ring_all_gather(batch * share * config.kv_lora_rank * dtype.itemsize, context)",
        (BY_HAND,),
    ),
    (
        "plan-shares-the-projections-onto-latents",
        "mla/plan/roofline.py",
        "weights = repeated + (absorbed_step(config).fixed - repeated) // group.tensor",
        "weights = absorbed_step(config).fixed // group.tensor",
        (GROUPS,),
    ),
    (
        "plan-keeps-a-wide-ring-inside-a-node",
        "mla/plan/roofline.py",
        "context_link = inside if group.size <= device.node else between",
        "context_link = inside if group.context <= device.node else between",
        (GROUPS,),
    ),
    (
        "plan-replicates-the-cache-over-context",
        "mla/plan/roofline.py",
        "tokens = load.batch * -(-load.context_length // group.context)",
        "tokens = load.batch * load.context_length",
        (f"{ROOFLINE}::test_cached_tokens_are_shared_and_projections_are_not",),
    ),
    (
        "plan-takes-a-split-that-does-not-fit",
        "mla/plan/splits.py",
        "if step.cache_bytes <= memory:",
        "if step.cache_bytes:",
        (f"{ROOFLINE}::test_a_cache_that_fits_nowhere_has_no_split",),
    ),
    (
        "plan-compares-calls-of-another-bound",
        "mla/plan/measured.py",
        "return self.H, self.codec, self.dtype, self.bound",
        'return self.H, self.codec, self.dtype, "memory"',
        (f"{MEASURED}::test_a_share_counts_where_the_same_limit_binds",),
    ),
    (
        "energy-counts-a-wrapped-counter-backwards",
        "benchmarks/energy.py",
        "total += last - first if last >= first else last - first + zone.range_uj + 1",
        "total += last - first",
        (f"{ENERGY}::test_a_counter_that_wraps_is_read_on",),
    ),
    (
        "energy-counts-cores-and-their-package",
        "benchmarks/energy.py",
        'if kind not in ("package", "dram"):',
        'if kind not in ("package", "dram", "core"):',
        (f"{ENERGY}::test_packages_and_their_memory_count_once",),
    ),
    (
        "energy-of-a-still-counter-is-nothing",
        "benchmarks/energy.py",
        "if joules > 0:",
        "if joules >= 0:",
        (f"{ENERGY}::test_a_counter_that_stands_still_gives_no_joules",),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
