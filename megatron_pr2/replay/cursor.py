"""Which micro-batch a model chunk is working on: one cursor for its forwards, one for recomputation (design decision 4).

Scope: one pass. A forward finds its micro-batch in one of two ways:

- by identity: `begin` and `end` around the forward, or a wrapped forward step that reads it from the batch;
- by order: without them, a chunk's n-th forward in the pass is the pass's n-th micro-batch, which is the order of every schedule
  of Megatron-Core (each chunk of an interleaved pipeline runs all of them in order). Hooks on the chunk see the forwards.

Forwards are counted, so that a schedule that runs another number of micro-batches than the pass has is an error, not a shift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_pr2.errors import ReplayError
from megatron_pr2.replay.micro_batch import BoundMicroBatch, MicroBatch
from megatron_pr2.replay.sites import RouterSite, unwrapped

Look = Callable[[torch.nn.Module, MicroBatch, tuple[Any, ...], Mapping[str, Any]], None]


class Cursors:
    """The current micro-batch of each model chunk."""

    def __init__(self, chunks: Sequence[torch.nn.Module], look: Look | None = None) -> None:
        """Args:
        look: sees each chunk and micro-batch with the positional and keyword arguments that it is called with.
        """
        self._look = look
        self._chunks = [unwrapped(chunk) for chunk in chunks]
        self._chunk_of = {id(chunk): index for index, chunk in enumerate(self._chunks)}
        self._pass: dict[MicroBatch, BoundMicroBatch] = {}
        self._order: list[BoundMicroBatch] = []
        self._forward: dict[int, BoundMicroBatch] = {}
        self._backward: dict[int, BoundMicroBatch] = {}
        self._in_order: Counter[int] = Counter()
        self._named: set[int] = set()
        self._hooks: list[RemovableHandle] = []
        self._closed = False

    def open(self, micro_batches: Mapping[Hashable, BoundMicroBatch]) -> None:
        """Starts the pass: from here on, forwards of the chunks are micro-batches of it."""
        self._order = list(micro_batches.values())
        self._pass = {bound.micro_batch: bound for bound in self._order}
        for index, chunk in enumerate(self._chunks):
            self._hooks.append(chunk.register_forward_pre_hook(self._before(index), with_kwargs=True))
            self._hooks.append(chunk.register_forward_hook(self._after(index)))

    def close(self) -> None:
        """Ends the pass, however it went."""
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._forward.clear()
        self._backward.clear()

    def begin(self, chunk: torch.nn.Module, micro_batch: MicroBatch) -> None:
        """See ReplaySession.begin."""
        bound = self._pass.get(micro_batch)
        if bound is None:
            raise ReplayError(
                f"micro-batch {micro_batch.key!r} is not part of this pass, or has other rows there; pass all of them when it is "
                "opened"
            )
        index = self._index(chunk)
        self._named.add(index)
        self._run(index, bound)

    def end(self, chunk: torch.nn.Module, micro_batch: MicroBatch, output: Any) -> None:
        """See ReplaySession.end."""
        self._ran(self._index(chunk), self._pass[micro_batch], output)

    def forward_step(self, function: Callable[..., Any], locate: Callable[[Any], MicroBatch]) -> Callable[..., Any]:
        """See ReplaySession.forward_step."""

        def wrapped(data_iterator: Iterator[Any], model: torch.nn.Module, *args: Any) -> Any:
            if data_iterator is None:
                # Megatron's tensor-parallel ranks and inner stages get their batch otherwise: by order.
                return function(None, model, *args)
            current: list[MicroBatch] = []

            def bind() -> Iterator[Any]:
                for item in data_iterator:
                    current[:] = [locate(item)]
                    self.begin(model, current[0])
                    yield item

            output, loss_func = function(bind(), model, *args)
            if not current:
                raise ReplayError("the forward step took nothing from its data iterator; call begin() and end() yourself")
            self.end(model, current[0], output)
            return output, loss_func

        return wrapped

    def current(self, site: RouterSite) -> tuple[BoundMicroBatch, bool]:
        """The micro-batch that this router is working on, and whether it is being recomputed.

        Raises:
            ReplayError: it is not known.
        """
        recomputing = torch._C._current_graph_task_id() != -1
        bound = (self._backward if recomputing else self._forward).get(site.chunk)
        if bound is None:
            raise ReplayError(
                f"layer {site.layer}: the model runs {'a recomputation' if recomputing else 'forward'} inside a replay session "
                "without a bound micro-batch; run the chunk that was given to attach(), not a part of it, or call session.begin()"
            )
        return bound, recomputing

    def _before(self, index: int) -> Callable[..., None]:
        def hook(chunk: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index not in self._forward:
                if index in self._named:
                    return  # where others were announced, what was not is refused by current()
                number = self._in_order[index]
                if number >= len(self._order):
                    raise ReplayError(
                        f"model chunk {index} runs more than the {len(self._order)} micro-batches of this pass; pass all of them "
                        "when it is opened, and run other forwards outside of it"
                    )
                self._run(index, self._order[number])
            bound = self._forward[index]
            bound.has_backward = torch.is_grad_enabled()
            bound.tokens_per_sample = _tokens_per_sample(args, kwargs)
            if self._look is not None:
                self._look(chunk, bound.micro_batch, args, kwargs)

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
            bound = self._forward.get(index)
            if index in self._named or bound is None:
                return  # whoever announced it says when it ends
            self._in_order[index] += 1
            self._ran(index, bound, output)

        return hook

    def _run(self, index: int, bound: BoundMicroBatch) -> None:
        if bound.slice is not None and bound.routes_TLK is None:
            bound.routes_TLK = bound.slice.ids_TLK()
        self._forward[index] = bound

    def _ran(self, index: int, bound: BoundMicroBatch, output: Any) -> None:
        self._forward.pop(index, None)
        recomputes = self._chunks[index].config.recompute_granularity is not None

        def reached_by_gradient(_: Tensor) -> None:
            if self._closed and recomputes:
                raise ReplayError(
                    f"micro-batch {bound.micro_batch.key!r}: its backward recomputes activations after the replay session has "
                    "ended, where nothing is replayed; run forward and backward inside one session"
                )
            self._backward[index] = bound

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(reached_by_gradient)

    def _index(self, chunk: torch.nn.Module) -> int:
        index = self._chunk_of.get(id(unwrapped(chunk)))
        if index is None:
            raise ReplayError(f"{type(chunk).__name__}: not one of the model chunks that PR2 was attached to")
        return index


def _tokens_per_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """What the PackedSeqParams among a chunk's arguments say (from Megatron-Core 0.19 on): see megatron_pr2.replay.session."""
    given = (getattr(each, "tokens_per_sample", None) for each in (*args, *kwargs.values()))
    return next((int(tokens) for tokens in given if tokens is not None), None)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model returned: one, or several in a tuple or mapping (fused losses return such)."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
