"""The host's attention against the textbook formula: causal, padded, packed, grouped heads, context parallel, windows, sinks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from tests.helpers.distributed import pool

# Megatron is imported here without the host, which otherwise keeps its import quiet.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Case = dict[str, torch.Tensor]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
EXTRAS = pytest.mark.parametrize("extra", [{}, {"window": 3}, {"sinks": SINKS}, {"window": 3, "sinks": SINKS}])


def _textbook(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """Causal attention of one sequence: [S, N, D], [S, G, D], [S, G, Dv] -> [S, N * Dv].

    Args:
        sinks: [N], a logit per head without a value.
        window: how many tokens before its own a query sees.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("snd,tnd->nst", query, key) / math.sqrt(query.shape[-1])
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    if window is not None:
        future = future | torch.ones_like(future).tril(-window - 1)
    exponentials = scores.masked_fill(future, float("-inf")).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / (total if sinks is None else total + sinks.exp()[:, None, None])
    return torch.einsum("nst,tnd->snd", weights, value).flatten(1)


def _inputs(lengths: tuple[int, ...], *, heads: int = 4, groups: int = 2, v_channels: int = 8) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [
        {
            "query": draw(length, heads, 8),
            "key": draw(length, groups, 8),
            "value": draw(length, groups, v_channels),
            "upstream": draw(length, heads * v_channels),
        }
        for length in lengths
    ]


def _expected(cases: list[Case], **extra: Any) -> list[tuple[torch.Tensor, ...]]:
    """Per sequence: output and gradients of query, key and value."""
    results = []
    for case in cases:
        leaves = [case[name].clone().requires_grad_() for name in ("query", "key", "value")]
        output = _textbook(*leaves, **extra)
        output.backward(case["upstream"])
        results.append((output.detach(), *(leaf.grad for leaf in leaves)))
    return results


def _attention(cp_group: Any = None, *, sinks: torch.Tensor | None = None, window: int | None = None, **changes: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_pr2.host.attention import HostAttention

    fields = {
        "window_size": None if window is None else (window, 0),
        "window_attn_skip_freq": None,
        "softmax_type": "vanilla" if sinks is None else "learnable",
        "num_attention_heads": 4,
        "params_dtype": torch.float64,
        "perform_initialization": False,
        "qk_clip": False,
        "log_max_attention_logit": False,
        "attention_dropout": 0.0,
        "context_parallel_size": 1 if cp_group is None else cp_group.size(),
    }
    config = SimpleNamespace(**(fields | changes))
    groups = SimpleNamespace(cp=cp_group, tp=SimpleNamespace(size=lambda: 1))
    attention = HostAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)  # type: ignore[arg-type]
    if sinks is not None:
        attention.softmax_offset.data.copy_(sinks)
    return attention


def _packed_params(lengths: tuple[int, ...], padded: tuple[int, ...] | None = None) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    spaced = None if padded is None else torch.tensor([0, *padded]).cumsum(0).int()
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, cu_seqlens_q_padded=spaced)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("v_channels", [8, 6])
def test_padded_batch(groups: int, v_channels: int) -> None:
    cases = _inputs((10, 10, 10), groups=groups, v_channels=v_channels)
    query, key, value = (torch.stack([case[name] for case in cases], dim=1) for name in ("query", "key", "value"))
    output = _attention()(query, key, value, None)
    for index, (expected, *_) in enumerate(_expected(cases)):
        torch.testing.assert_close(output[:, index], expected)


@EXTRAS
def test_left_padding_is_masked(extra: dict[str, Any]) -> None:
    (case,) = _inputs((9,))
    padding = 3
    names = ("query", "key", "value")
    query, key, value = (torch.cat((torch.ones(padding, *case[name].shape[1:]), case[name])) for name in names)
    forbidden = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    forbidden[..., :padding] = True
    output = _attention(**extra)(query[:, None], key[:, None], value[:, None], forbidden)
    torch.testing.assert_close(output[padding:, 0], _expected([case], **extra)[0][0])


@EXTRAS
def test_packed_sequences_do_not_see_each_other(extra: dict[str, Any]) -> None:
    lengths = (5, 1, 12)
    cases = _inputs(lengths)
    query, key, value = (torch.cat([case[name] for case in cases]) for name in ("query", "key", "value"))
    output = _attention(**extra)(query, key, value, None, packed_seq_params=_packed_params(lengths))
    torch.testing.assert_close(output, torch.cat([expected for expected, *_ in _expected(cases, **extra)]))


def test_sinks_learn() -> None:
    (case,) = _inputs((9,))
    sinks = SINKS.clone().requires_grad_()
    arguments = [case[name] for name in ("query", "key", "value")]
    _textbook(*arguments, sinks=sinks).backward(case["upstream"])
    attention = _attention(sinks=SINKS)
    attention(*(tensor[:, None] for tensor in arguments), None).backward(case["upstream"][:, None])
    assert sinks.grad is not None
    torch.testing.assert_close(attention.softmax_offset.grad, sinks.grad)


def test_off_by_one_is_a_sink_of_zero_and_no_parameter() -> None:
    (case,) = _inputs((9,))
    attention = _attention(softmax_type="off-by-one")
    assert not attention.state_dict()
    output = attention(case["query"][:, None], case["key"][:, None], case["value"][:, None], None)
    torch.testing.assert_close(output[:, 0], _expected([case], sinks=torch.zeros(4, dtype=torch.float64))[0][0])


def test_layers_without_a_window_see_everything() -> None:
    (case,) = _inputs((9,))
    attention = _attention(window=2, window_attn_skip_freq=[0, 1])
    output = attention(case["query"][:, None], case["key"][:, None], case["value"][:, None], None)
    torch.testing.assert_close(output[:, 0], _expected([case])[0][0])


def test_packed_padding_changes_no_token() -> None:
    lengths, padded = (5, 2), (8, 4)
    cases = _inputs(lengths)
    packed = []
    for name in ("query", "key", "value"):
        pieces = []
        for case, length, space in zip(cases, lengths, padded, strict=True):
            pieces += [case[name], torch.full((space - length, *case[name].shape[1:]), 50.0, dtype=torch.float64)]
        packed.append(torch.cat(pieces))
    output = _attention()(*packed, None, packed_seq_params=_packed_params(lengths, padded))
    for start, length, (expected, *_) in zip((0, 8), lengths, _expected(cases), strict=True):
        torch.testing.assert_close(output[start : start + length], expected)


def _context_parallel(cases: list[Case], packed: bool, extra: dict[str, Any]) -> list[tuple[torch.Tensor, ...]]:
    """This rank's share of outputs and gradients, per sequence."""
    from megatron.core import parallel_state

    from megatron_pr2.host.attention import zigzag_positions

    host.init(context=torch.distributed.get_world_size())
    group = parallel_state.get_context_parallel_group()
    attention = _attention(group, **extra)
    here = [zigzag_positions(len(case["query"]) // group.size(), group.size(), group.rank()) for case in cases]
    names = ("query", "key", "value", "upstream")
    local = {name: [case[name][at] for case, at in zip(cases, here, strict=True)] for name in names}
    join = torch.cat if packed else (lambda tensors: torch.stack(tensors, dim=1))
    leaves = [join(local[name]).requires_grad_() for name in ("query", "key", "value")]
    params = _packed_params(tuple(len(case["query"]) for case in cases)) if packed else None
    output = attention(*leaves, None, packed_seq_params=params)
    output.backward(join(local["upstream"]))
    tensors = (output.detach(), *(leaf.grad for leaf in leaves))
    if packed:
        return list(zip(*(tensor.split([len(at) for at in here]) for tensor in tensors), strict=True))
    return list(zip(*(tensor.unbind(1) for tensor in tensors), strict=True))


@pytest.mark.parametrize(
    ("world", "packed", "lengths", "extra"),
    [
        (2, False, (8, 8), {}),
        (2, False, (8, 8), {"window": 3, "sinks": SINKS}),
        (2, True, (8, 4, 16), {}),
        (2, True, (8, 4, 16), {"window": 3, "sinks": SINKS}),
        (4, True, (8, 24), {}),
    ],
)
def test_context_parallel_forward_and_backward(world: int, packed: bool, lengths: tuple[int, ...], extra: dict[str, Any]) -> None:
    from megatron_pr2.host.attention import zigzag_positions

    cases = _inputs(lengths)
    results = pool(world).run(_context_parallel, cases, packed, extra)
    for rank, local in enumerate(results):
        for length, mine, expected in zip(lengths, local, _expected(cases, **extra), strict=True):
            here = zigzag_positions(length // world, world, rank)
            for name, tensor, reference in zip(("output", "query", "key", "value"), mine, expected, strict=True):
                torch.testing.assert_close(tensor, reference[here], msg=f"rank {rank}: {name}")


def test_zigzag_holds_every_position_once() -> None:
    from megatron_pr2.host.attention import zigzag_positions

    assert zigzag_positions(4, 2, 0).tolist() == [0, 1, 6, 7]
    everyone = torch.cat([zigzag_positions(6, 4, rank) for rank in range(4)])
    assert sorted(everyone.tolist()) == list(range(24))
    with pytest.raises(ConfigError, match="pad sequences to a multiple of 4"):
        zigzag_positions(3, 2, 0)


def test_what_the_host_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="qk_clip"):
        _attention(qk_clip=True)
    (case,) = _inputs((6,))
    arguments = (case["query"], case["key"], case["value"], None)
    with pytest.raises(ConfigError, match="boundaries cover 5 tokens"):
        _attention()(*arguments, packed_seq_params=_packed_params((2, 3)))
    with pytest.raises(ConfigError, match="attention_bias"):
        _attention()(*arguments, attention_bias=torch.zeros(1))
