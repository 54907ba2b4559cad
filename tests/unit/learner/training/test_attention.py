"""Packed attention against each sequence alone, under plain SDPA with an explicit mask."""

import pytest
import torch

from learner.training.attention import AttentionUnsupported, RowLayout, packed_attention

CPU = torch.device("cpu")
MODULE = torch.nn.Identity()


def states(num_tokens: int, *, heads: int = 4, groups: int = 2, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(1, heads, num_tokens, width)] + [(1, heads // groups, num_tokens, width)] * 2
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def alone(parts: list[torch.Tensor], lengths: list[int], window: int | None) -> torch.Tensor:
    """[T, H, D]: one sequence after the other."""
    outs, start = [], 0
    for length in lengths:
        query, key, value = (part[:, :, start : start + length] for part in parts)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        outs.append(out[0].transpose(0, 1))
        start += length
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "lengths", [[1], [5, 5, 5], [9, 8, 8, 3, 2, 1], [300, 290, 40, 39, 1], [700]], ids=str
)
def test_packed_sequences_attend_as_if_each_were_alone(lengths: list[int], window: int | None) -> None:
    parts = states(sum(lengths))
    out, _ = packed_attention(MODULE, *parts, None, sliding_window=window, row_layout=RowLayout(lengths, CPU))
    expected = alone(parts, lengths, window)
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    for got, want in zip(
        torch.autograd.grad((out[0] * weights).sum(), parts),
        torch.autograd.grad((expected * weights).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_short_and_long_sequences_are_not_padded_to_each_other() -> None:
    layout = RowLayout([400, 100, 99, 10, 10], CPU)
    assert [bucket.length for bucket in layout.buckets] == [400, 100, 10]
    assert sum(bucket.stop - bucket.start for bucket in layout.buckets) == 619


def test_many_equal_sequences_are_split_where_their_scores_would_leave_the_cache() -> None:
    layout = RowLayout([128] * 200, CPU)
    assert len(layout.buckets) > 1
    assert all(bucket.gather_NL is None for bucket in layout.buckets)


@pytest.mark.parametrize("feature", ["softcap", "s_aux"])
def test_a_feature_that_is_not_implemented_is_refused(feature: str) -> None:
    with pytest.raises(AttentionUnsupported, match=feature):
        packed_attention(MODULE, *states(3), None, row_layout=RowLayout([3], CPU), **{feature: 1.0})
