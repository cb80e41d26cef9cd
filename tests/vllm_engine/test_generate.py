"""Generations of vLLM with our decode step, beside its own backend and beside transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import tiny_models
from tiny_models import draw_prompts, engine, expected_tokens, generate, layers_of, save_model

from mla.integrations.vllm import backend

# Around the 16 positions of a block; six requests for four places, which leave and come one by one.
PROMPTS = draw_prompts([1, 5, 15, 16, 17, 37])
COUNTS = [24, 30, 18, 20, 22, 12]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C = 512 and R = 64, the sizes that vLLM's own decode step has."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """B and L of every decode step that ours took."""
    found: list[tuple[int, int]] = []
    original = backend.mla_decode

    def decode(q_latent: Any, *arguments: Any, **options: Any) -> Any:
        found.append(tuple(q_latent.shape[:2]))
        return original(q_latent, *arguments, **options)

    monkeypatch.setattr(backend, "mla_decode", decode)
    return found


def test_tokens_are_those_of_its_own_backend_and_of_transformers(model, calls):
    with engine(model) as llm:
        assert {layer.attn_backend.get_name() for layer in layers_of(llm)} == {"CPU_MLA"}
        own = generate(llm, PROMPTS, COUNTS)
    assert not calls, "nobody asked for CUSTOM"
    with engine(model, attention_backend="CUSTOM") as llm:
        assert {layer.attn_backend for layer in layers_of(llm)} == {backend.MLABackend}
        ours = generate(llm, PROMPTS, COUNTS)
    assert {L for _, L in calls} == {1} and max(B for B, _ in calls) == 4
    assert ours == own
    assert ours == expected_tokens(model, PROMPTS, COUNTS)


def test_tokens_are_those_of_its_own_backend_with_all_of_its_kernels(model, calls):
    """With its own rotation, which transformers does not share; see `tiny_models`."""
    found = []
    for options in ({}, {"attention_backend": "CUSTOM"}):
        with engine(model, compilation_config={}, **options) as llm:
            found.append(generate(llm, PROMPTS, COUNTS))
    assert calls and found[0] == found[1]


@pytest.mark.parametrize(("C", "R"), [(256, 64), (448, 64)])
def test_sizes_that_its_own_backend_does_not_have(tmp_path, calls, C, R):
    folder = save_model(tmp_path, C=C, R=R, q_lora_rank=24, num_attention_heads=3, seed=C)
    with engine(folder, attention_backend="CUSTOM") as llm:
        assert generate(llm, PROMPTS, COUNTS) == expected_tokens(folder, PROMPTS, COUNTS)
    assert calls


SCRIPT = """
import json, sys
from tiny_models import engine, generate
if __name__ == "__main__":  # vLLM's processes import this file
    folder, prompts, counts = json.loads(sys.argv[1])
    with engine(folder, attention_config={"backend": "CUSTOM"}) as llm:
        print("tokens", json.dumps(generate(llm, prompts, counts)))
"""


def test_the_processes_of_vllm_find_the_plugin_by_themselves(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    here = Path(tiny_models.__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    result = subprocess.run(
        [sys.executable, script, json.dumps([str(model), PROMPTS, COUNTS])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,  # three processes import vLLM
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    tokens = next(line for line in lines if line.startswith("tokens "))
    assert json.loads(tokens.removeprefix("tokens ")) == expected_tokens(model, PROMPTS, COUNTS)
    said = [line for line in (result.stdout + result.stderr).splitlines() if "mla_decode" in line]
    assert said and all("MainProcess" not in line for line in said), said


def test_speculated_tokens_are_decoded_together(model, calls):
    """The last to start an engine in this process: it loads numba, whose objects vLLM stumbles over
    when the next starts (`register_triton_kernel_overrides` takes every ``vars`` for a dict)."""
    prompts = [ids * 3 for ids in draw_prompts([1, 4, 6, 12], seed=1)]
    counts = [40, 30, 40, 20]
    with engine(model, attention_backend="CUSTOM", speculative_config=NGRAM) as llm:
        assert generate(llm, prompts, counts) == expected_tokens(model, prompts, counts)
    assert max(L for _, L in calls) == 4
    assert {L for _, L in calls} >= {1, 4}
