"""Perplexity over windows against the definition, with a toy model and tokenizer."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import randn

from mla.convert import compare_losses, token_losses, token_windows


class Bigrams:
    """A language model that looks at the last token only."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.table = randn(7, 7, seed=seed)

    def __call__(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def letters(text, add_special_tokens, verbose):
    """A tokenizer with one token a letter."""
    assert not add_special_tokens
    return {"input_ids": [ord(letter) % 7 for letter in text]}


def test_losses_and_their_comparison():
    windows = token_windows(letters, "the quick brown fox jumps", count=3, length=8)
    assert windows.flatten().tolist() == [ord(x) % 7 for x in "the quick brown fox jump"]
    seen = []
    losses = [
        token_losses(Bigrams(seed), windows, progress=lambda *steps: seen.append(steps))
        for seed in (0, 1)
    ]
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    expected = [-Bigrams(0).table.double().log_softmax(-1)[a, b] for a, b in windows[:, :2]]
    torch.testing.assert_close(losses[0][:, 0], torch.stack(expected))
    result = compare_losses(*losses)
    assert result.before == pytest.approx(math.exp(losses[0].mean()))
    assert result.after == pytest.approx(result.before * result.ratio)
    assert result.num_tokens == 21
    changes = (losses[1] - losses[0]).mean(1)
    assert result.ratio_error == pytest.approx(result.ratio * float(changes.std()) / math.sqrt(3))


def test_one_window_has_no_error_estimate():
    losses = torch.ones(1, 3)
    result = compare_losses(losses, losses)
    assert result.ratio == 1.0 and math.isnan(result.ratio_error)


def test_text_longer_than_expected_is_tokenised_further():
    def words(text, **options):
        return {"input_ids": [1] * len(text.split())}

    text = "extraordinarily " * 40
    assert token_windows(words, text, count=2, length=20).shape == (2, 20)


@pytest.mark.parametrize(
    ("count", "length", "message"),
    [
        (3, 9, "text has 25 tokens, expected at least 27 = 3 . 9"),
        (0, 9, "count and length have values 0 and 9"),
        (1, 1, "count and length have values 1 and 1"),
    ],
)
def test_bad_windows(count, length, message):
    with pytest.raises(ValueError, match=message):
        token_windows(letters, "the quick brown fox jumps", count=count, length=length)


def test_bad_losses():
    with pytest.raises(ValueError, match=r"windows has shape \(3,\), expected \[W, T\]"):
        token_losses(Bigrams(0), torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"after has shape \(2, 4\), expected \(2, 3\)"):
        compare_losses(torch.ones(2, 3), torch.ones(2, 4))
