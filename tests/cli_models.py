"""Small folders of models with a tokenizer and text, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_models import draw_weights_
from torch import nn

WORDS = [f"w{index}" for index in range(60)]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def save_tokenizer(folder: Path, *, chat: bool = False) -> None:
    """One id for each of `WORDS`, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    if chat:
        fast.chat_template = "<s> {{ messages[0]['content'] }}"
    fast.save_pretrained(folder)


def tiny_llama(*, seed: int = 0) -> nn.Module:
    """A Llama of 4 query and 2 key-value heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    draw_weights_(model, seed)
    return model


def llama_folder(folder: Path) -> Path:
    """A saved `tiny_llama` with its tokenizer."""
    tiny_llama().save_pretrained(folder)
    save_tokenizer(folder, chat=True)
    return folder


def text_file(path: Path, *, num_words: int = 3000, seed: int = 0) -> Path:
    """Random words in articles, as `tools.data` writes them."""
    rng = torch.Generator().manual_seed(seed)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (num_words,), generator=rng).tolist()]
    half = num_words // 2
    path.write_text(" ".join(words[:half]) + "\n\f\n" + " ".join(words[half:]) + "\n")
    return path
