"""Sums over calibration windows, against direct formulas in float64."""

import torch
from helpers import generator
from hypothesis import given
from hypothesis import strategies as st

from mla.convert import InputMoments, MomentSum, attention_received
from mla.convert.complexes import as_complex, as_real, mean_rotation, real_matrix


@given(
    G=st.integers(1, 3),
    per_group=st.integers(1, 3),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)
def test_attention_received_counts_probabilities(G, per_group, T, seed):
    rng = generator(seed)
    query = torch.randn(G * per_group, T, 4, generator=rng, dtype=torch.float64)
    key = torch.randn(G, T, 4, generator=rng, dtype=torch.float64)
    weights, distances = attention_received(query, key, 0.7)
    expected_weights, expected_distances = torch.zeros(T).double(), torch.zeros(T).double()
    for head in range(G * per_group):
        for q in range(T):
            p = (0.7 * query[head, q] @ key[head // per_group, : q + 1].T).softmax(-1)
            for k in range(q + 1):
                expected_weights[k] += p[k] ** 2
                if k > 0:  # the first key is attended to whatever its distance
                    expected_distances[q - k] += p[k]
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(distances, expected_distances)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 2**31 - 1))
def test_windows_add_up(lengths, seed):
    rng = generator(seed)
    total = MomentSum(5, max(lengths))
    inputs, weights = [], []
    for T in lengths:
        inputs.append(torch.randn(T, 5, generator=rng, dtype=torch.float64))
        weights.append(torch.rand(T, generator=rng, dtype=torch.float64))
        total.add(inputs[-1], weights[-1], torch.ones(T))
    moments = total.result()
    x = torch.cat([torch.cat(inputs), torch.ones(sum(lengths), 1)], dim=1).double()
    w = torch.cat(weights)
    torch.testing.assert_close(moments.queries, x.T @ x / len(x))
    torch.testing.assert_close(moments.keys, (x.T * w) @ x / w.sum())
    counts = [sum(n < T for T in lengths) for n in range(max(lengths))]
    assert moments.distances.tolist() == counts


def test_moments_of_a_second_moment_alone():
    mean = torch.tensor([1.0, 2.0])
    moments = InputMoments.from_second_moment(torch.eye(2) * 9, mean, context_length=3)
    assert moments.queries.tolist() == [[9, 0, 1], [0, 9, 2], [1, 2, 1]]
    assert torch.equal(moments.queries, moments.keys)
    torch.testing.assert_close(moments.distances, 1 / torch.tensor([8.0, 9.0, 10.0]).double())


@given(seed=st.integers(0, 2**31 - 1))
def test_complex_pairs_are_two_real_rows(seed):
    rng = generator(seed)
    rows = torch.randn(3, 6, 4, generator=rng, dtype=torch.float64)
    matrix = torch.randn(3, 5, 3, generator=rng, dtype=torch.complex128)
    assert torch.equal(as_real(as_complex(rows)), rows)
    product = as_real(matrix @ as_complex(rows))
    torch.testing.assert_close(real_matrix(matrix) @ rows, product)


def test_mean_rotation_weighs_distances():
    inv_freq = torch.tensor([0.0, 1.0])
    mean = mean_rotation(inv_freq, torch.tensor([1.0, 0.0, 3.0]))
    turned = torch.polar(torch.ones(1).double(), torch.tensor([2.0]).double())
    expected = torch.cat([torch.ones(1).to(turned), (1 + 3 * turned) / 4])
    torch.testing.assert_close(mean, expected)
