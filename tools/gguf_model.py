"""Dequantise a Llama-type GGUF file once into a folder that transformers loads in no time.

GGUF stores the rows of the query and key weights interleaved, (x0, x_{R/2}), (x1, x_{R/2+1}) ..;
transformers rotates halves, so the rows go back into half-split order here.
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from einops import rearrange
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_model(gguf_file: Path, folder: Path) -> None:
    """Write config, float32 weights and tokenizer of ``gguf_file`` into ``folder``."""
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    config = read_config(fields, is_tied="output.weight" not in names)
    config.save_pretrained(folder)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    GenerationConfig(**{name: getattr(config, name) for name in special}).save_pretrained(folder)

    weights: dict[str, Tensor] = {}
    for tensor in track(reader.tensors, description="dequantise"):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = hf_name(tensor.name)
        weights[name] = half_split_rows(name, torch.from_numpy(values.copy()), config.head_dim)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    print("data: reading the tokenizer", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)


def read_config(fields: dict[str, Any], *, is_tied: bool) -> LlamaConfig:
    """The transformers config of a Llama-type GGUF file's metadata."""
    assert fields["general.architecture"] == "llama", fields["general.architecture"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=is_tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def hf_name(gguf_name: str) -> str:
    """The state_dict name of a GGUF tensor; "blk.3.attn_q.weight" is layer 3's q_proj.weight."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    _, layer, kind, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def half_split_rows(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """Undo GGUF's row order of the rotated projections; other weights pass."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    rows = rearrange(weight, "(h r two) d -> (h two r) d", two=2, r=head_dim // 2)
    return rows.contiguous()
