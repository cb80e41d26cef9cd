"""Breaks of the healing of converted models; see mutants.py."""

from tools.mutants import Mutant

HEAL = "tests/test_heal.py"
RESUME = "tests/test_heal_resume.py"
FOLDER = "mla/integrations/converted"
BITS = f"{HEAL}::test_attention_alone_is_trained_and_the_original_keeps_every_bit"
RESUMED = f"{RESUME}::test_a_resumed_healing_has_the_bits_of_an_uninterrupted_one"

MUTANTS: list[Mutant] = [
    Mutant(
        name="heal-trains-weights-that-the-original-has-too",
        file=f"{FOLDER}/heal_freeze.py",
        original="parameter.data = parameter.data.to(dtype, copy=True)",
        broken="parameter.data = parameter.data.to(dtype)",
        tests=(BITS,),
    ),
    Mutant(
        name="heal-trains-everything",
        file=f"{FOLDER}/heal_freeze.py",
        original="converted.eval().requires_grad_(False)",
        broken="converted.eval()",
        tests=(BITS,),
    ),
    Mutant(
        name="heal-leaves-a-dtype-of-its-own",
        file=f"{FOLDER}/heal_freeze.py",
        original="parameter.data = parameter.data.to(dtypes[parameter])",
        broken="parameter.data = parameter.data.float()",
        tests=(f"{HEAL}::test_dtypes_stay",),
    ),
    Mutant(
        name="heal-ends-with-the-last-weights",
        file=f"{FOLDER}/heal_loop.py",
        original="self._load(self.state.best)",
        broken="self._load(self._weights())",
        tests=(f"{HEAL}::test_the_best_weights_are_kept",),
    ),
    Mutant(
        name="heal-resumes-from-the-best-weights",
        file=f"{FOLDER}/heal_loop.py",
        original="self._load(self.state.weights)",
        broken="self._load(self.state.best)",
        tests=(RESUMED,),
    ),
    Mutant(
        name="heal-forgets-the-moments-of-the-optimizer",
        file=f"{FOLDER}/heal_loop.py",
        original="if state.optimizer is not None:",
        broken="if state.optimizer is not None and not state.losses:",
        tests=(RESUMED,),
    ),
    Mutant(
        name="heal-matches-again-what-was-matched",
        file=f"{FOLDER}/heal_loop.py",
        original="if index < len(state.layers):",
        broken="if index < 0:",
        tests=(f"{RESUMED}[match-2]",),
    ),
    Mutant(
        name="heal-reads-one-order-of-windows-again-and-again",
        file=f"{FOLDER}/heal_loop.py",
        original="rng = torch.Generator().manual_seed(seed + epoch)",
        broken="rng = torch.Generator().manual_seed(seed)",
        tests=(f"{RESUME}::test_every_window_is_read_once_before_any_twice",),
    ),
    Mutant(
        name="heal-takes-the-divergence-the-other-way-round",
        file=f"{FOLDER}/heal_measure.py",
        original='return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)',
        broken='return F.kl_div(wanted, found, reduction="none", log_target=True).sum(-1)',
        tests=(f"{HEAL}::test_predictions_come_closer_and_the_report_says_how_close",),
    ),
    Mutant(
        name="heal-matches-with-the-stream-before-attention",
        file=f"{FOLDER}/heal_match.py",
        original="weights.append((residual + y).float().square().sum(-1).reciprocal())",
        broken="weights.append(residual.float().square().sum(-1).reciprocal())",
        tests=(f"{HEAL}::test_layers_are_given_what_the_original_sees",),
    ),
    Mutant(
        name="heal-keeps-a-layer-that-got-worse",
        file=f"{FOLDER}/heal_match.py",
        original="if not after < before:  # NaN included",
        broken="if after < before:",
        tests=(f"{HEAL}::test_a_layer_that_got_worse_is_put_back",),
    ),
    Mutant(
        name="heal-resumes-the-healing-of-another-text",
        file=f"{FOLDER}/heal_state.py",
        original="if found.get(name) != value:",
        broken='if name != "windows" and found.get(name) != value:',
        tests=(f"{RESUME}::test_the_state_of_another_healing_is_refused",),
    ),
    Mutant(
        name="heal-believes-any-original",
        file=f"{FOLDER}/heal_freeze.py",
        original="if mine.data_ptr() != other.data_ptr() and not torch.equal(mine, other):",
        broken="if mine.data_ptr() == other.data_ptr() and not torch.equal(mine, other):",
        tests=(f"{HEAL}::test_what_does_not_fit_is_refused",),
    ),
    Mutant(
        name="heal-command-forgets-the-unfinished",
        file="mla/cli/heal.py",
        original="resume=options.resume and state.exists(),",
        broken="resume=False,",
        tests=(f"{RESUME}::test_command_heals_interrupts_and_resumes",),
    ),
]
