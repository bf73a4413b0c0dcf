"""
Temporal Advantage Shaping: [TAS.w], [TAS.A] and the shapes of the ablation.

    python -m pytest tests/test_tas.py
"""

import math

import pytest
import torch

from tas import SHAPES, shape_advantages, tas_weights

# ---- helpers


def mask_of(lengths, T=None):
    """(B, T) bool, 1 on the first lengths[i] tokens of row i."""
    T = max(lengths) if T is None else T
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


def slow_weights(mask, shape, tas_lambda):
    """The equations, one token at a time."""
    rows = []
    for row in mask.tolist():
        L, w = sum(row), []
        for t, valid in enumerate(row):
            x = t / (L - 1) if L > 1 else 0.0
            bump = {
                "parabolic": (2 * x - 1) ** 2,
                "uniform": 0.0,
                "linear-up": x,
                "linear-down": 1 - x,
                "inverse": 1 - (2 * x - 1) ** 2,
            }[shape]
            w.append(1 + tas_lambda * bump if valid else 0.0)
        rows.append(w)
    return torch.tensor(rows)


# ---- numbers by hand


def test_five_tokens_by_hand():
    w = tas_weights(mask_of([5]), "parabolic", 1.0)
    assert w.tolist() == [[2.0, 1.25, 1.0, 1.25, 2.0]]
    assert w.dtype == torch.float32


def test_five_tokens_at_the_papers_lambda():
    w = tas_weights(mask_of([5]), "parabolic", 0.3)
    torch.testing.assert_close(w, torch.tensor([[1.3, 1.075, 1.0, 1.075, 1.3]]))


@pytest.mark.parametrize(
    "shape, first, middle, last",
    [
        ("parabolic", 1.3, 1.0, 1.3),
        ("uniform", 1.0, 1.0, 1.0),
        ("linear-up", 1.0, 1.15, 1.3),
        ("linear-down", 1.3, 1.15, 1.0),
        ("inverse", 1.0, 1.3, 1.0),
    ],
)
def test_ends_and_middle_of_each_shape(shape, first, middle, last):
    w = tas_weights(mask_of([7]), shape, 0.3)[0]
    assert [w[0].item(), w[3].item(), w[6].item()] == pytest.approx([first, middle, last])


def test_token_advantages_by_hand():
    a = shape_advantages(torch.tensor([2.0, -1.0]), mask_of([5, 3]), "parabolic", 1.0)
    assert a.tolist() == [[4.0, 2.5, 2.0, 2.5, 4.0], [-2.0, -1.0, -2.0, 0.0, 0.0]]


# ---- slow-loop oracle


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tas_lambda", [0.0, 0.3, 2.0])
def test_matches_the_loop(shape, tas_lambda):
    mask = mask_of([1, 2, 3, 8, 13, 0, 20], T=20)
    w = tas_weights(mask, shape, tas_lambda)
    torch.testing.assert_close(w, slow_weights(mask, shape, tas_lambda))


def test_shapes_are_distinct():
    rows = [tuple(tas_weights(mask_of([9]), shape, 0.3)[0].tolist()) for shape in SHAPES]
    assert len(set(rows)) == len(SHAPES)


# ---- invariances


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_does_not_change_a_row(shape):
    """The position is relative to the row's own length, never to the padded one."""
    tight = tas_weights(mask_of([6]), shape, 0.3)
    padded = tas_weights(mask_of([6, 50]), shape, 0.3)
    assert torch.equal(padded[:1, :6], tight)
    assert padded[0, 6:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_mask_dtype_does_not_matter(dtype):
    mask = mask_of([4, 2])
    w = tas_weights(mask.to(dtype), "parabolic", 0.3)
    assert torch.equal(w, tas_weights(mask, "parabolic", 0.3))


def test_parabolic_is_symmetric_and_linear_is_mirrored():
    mask = mask_of([11])
    w = tas_weights(mask, "parabolic", 0.3)
    torch.testing.assert_close(w, w.flip(1))
    up, down = tas_weights(mask, "linear-up", 0.3), tas_weights(mask, "linear-down", 0.3)
    torch.testing.assert_close(up, down.flip(1))
    # parabolic and its inverse add up to a flat 2 + lambda
    torch.testing.assert_close(w + tas_weights(mask, "inverse", 0.3), torch.full((1, 11), 2.3))


def test_mean_weight_of_a_long_row_is_one_plus_a_third_of_lambda():
    w = tas_weights(mask_of([4000]), "parabolic", 0.3)
    assert w.mean().item() == pytest.approx(1 + 0.3 / 3, abs=2e-4)


# ---- degenerate inputs


@pytest.mark.parametrize(
    "shape, weight",
    [("parabolic", 1.3), ("uniform", 1.0), ("linear-up", 1.0), ("linear-down", 1.3)]
    + [("inverse", 1.0)],
)
def test_one_token_counts_as_the_beginning(shape, weight):
    w = tas_weights(mask_of([1], T=3), shape, 0.3)
    assert w[0].tolist() == pytest.approx([weight, 0.0, 0.0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("equal_mean", [False, True])
def test_empty_row_is_zero_not_nan(shape, equal_mean):
    w = tas_weights(mask_of([0, 3]), shape, 0.3, equal_mean)
    assert w[0].tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(w).all()
    a = shape_advantages(torch.tensor([1.0, 1.0]), mask_of([0, 3]), shape, 0.3, equal_mean)
    assert a[0].tolist() == [0.0, 0.0, 0.0]


def test_no_rows_and_no_columns():
    assert tas_weights(torch.zeros(0, 4), "parabolic", 0.3).shape == (0, 4)
    assert tas_weights(torch.zeros(2, 0), "parabolic", 0.3).shape == (2, 0)


# ---- equal mean, sign, gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_mean_rows_average_one_over_their_valid_tokens(shape):
    lengths = [1, 2, 5, 64]
    w = tas_weights(mask_of(lengths), shape, 0.3, equal_mean=True)
    for row, length in zip(w, lengths):
        assert row.sum().item() / length == pytest.approx(1.0, abs=1e-6)
        assert row[length:].abs().sum() == 0


def test_equal_mean_keeps_the_shape():
    plain = tas_weights(mask_of([5]), "parabolic", 1.0)
    equal = tas_weights(mask_of([5]), "parabolic", 1.0, equal_mean=True)
    torch.testing.assert_close(equal, plain / 1.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_is_preserved(shape):
    advantages = torch.tensor([1.5, -0.7, 0.0])
    a = shape_advantages(advantages, mask_of([6, 6, 6]), shape, 0.3)
    assert torch.equal(a.sign(), advantages.sign()[:, None].expand(3, 6))


def test_lambda_zero_is_plain_grpo():
    advantages = torch.tensor([1.5, -0.7])
    for shape in SHAPES:
        a = shape_advantages(advantages, mask_of([3, 3]), shape, 0.0)
        assert torch.equal(a, advantages[:, None].expand(2, 3))


# ---- caller mistakes


def test_unknown_shape_is_named_and_the_others_listed():
    with pytest.raises(ValueError) as error:
        tas_weights(mask_of([3]), "cosine", 0.3)
    assert "cosine" in str(error.value)
    assert all(shape in str(error.value) for shape in SHAPES)


@pytest.mark.parametrize("tas_lambda", [-0.1, math.nan, math.inf])
def test_bad_lambda(tas_lambda):
    with pytest.raises(ValueError, match="tas_lambda"):
        tas_weights(mask_of([3]), "parabolic", tas_lambda)


def test_layout_mistakes_raise_instead_of_broadcasting():
    mask = mask_of([4, 4, 4, 4])  # B == T: the case that would broadcast silently
    with pytest.raises(AssertionError, match="completion_mask"):
        tas_weights(mask[0], "parabolic", 0.3)
    with pytest.raises(AssertionError, match="advantages"):
        shape_advantages(torch.ones(4, 4), mask, "parabolic", 0.3)
    with pytest.raises(AssertionError, match="3 advantages"):
        shape_advantages(torch.ones(3), mask, "parabolic", 0.3)
