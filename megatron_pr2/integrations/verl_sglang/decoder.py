"""SGLang's responses with their routes as tensors, which is how verl 0.9.1 reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch

from megatron_pr2.errors import RouteError
from megatron_pr2.rollout.sglang.routes import decode_ids


class RouteDecoder:
    """SGLang's tokenizer manager, in whose responses routes are tensors; everything else of it is passed through."""

    def __init__(self, manager: Any, num_layers: int, topk: int) -> None:
        """Args:
        manager: SGLang's TokenizerManager.
        num_layers: hidden layers of the model, dense ones included.
        topk: experts per token.
        """
        object.__setattr__(self, "_manager", manager)
        object.__setattr__(self, "_shape", (num_layers, topk))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._manager, name, value)

    async def generate_request(self, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """SGLang's responses, with `meta_info.routed_experts` as int32 [T - 1, hidden layers, K].

        Raises:
            RouteError: it is not base64 of whole rows.
        """
        async for response in self._manager.generate_request(request, *args, **kwargs):
            meta = response.get("meta_info") if isinstance(response, dict) else None
            if isinstance(meta, dict) and isinstance(encoded := meta.get("routed_experts"), str | bytes):
                layers, topk = self._shape
                where = f"request {getattr(request, 'rid', None)!r}"
                meta["routed_experts"] = torch.from_numpy(decode_ids(encoded, layers, topk, where))
            yield response


def model_dimensions(hf_config: Any) -> tuple[int, int]:
    """(hidden layers, experts per token) of a Hugging Face config, by which SGLang lays out its routes.

    Raises:
        RouteError: the model has no experts.
    """
    config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    topk = getattr(config, "num_experts_per_tok", None)
    if not topk:
        kind = getattr(config, "model_type", None)
        raise RouteError(
            f"enable_rollout_routing_replay=true, but model_type={kind!r} has no num_experts_per_tok: a model without experts "
            "has no routes; set it to false"
        )
    return int(config.num_hidden_layers), int(topk)
