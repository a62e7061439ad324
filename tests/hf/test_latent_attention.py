"""Multi-latent attention with q_lora_rank=None: queries are the checkpoint's, in every release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.bridge import load_model
from tests.helpers.distributed import pool
from tests.hf.test_bridge import reference_logits
from tests.host.models import make_checkpoint, tiny_config

HAS_THE_NORM = hasattr(MLASelfAttention, "_resolve_qk_norm_config")


def job(path: Path, tokens: torch.Tensor, plain: bool) -> tuple[Any, list[str]]:
    """(logits or the refusal, parameters of the queries) of a model that is built with plain queries or as Megatron-Core does."""
    host.init()
    with pytest.MonkeyPatch.context() as patch:
        if not plain:
            patch.setattr("megatron_pr2.hf.mbridge_models.use_plain_queries", lambda spec: None)
        try:
            _, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
        except ConfigError as error:
            return str(error), []
    names = [name for name, _ in chunks[0].named_parameters() if "linear_q_proj" in name]
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return chunks[0](tokens, positions, None), names


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "as Megatron-Core builds it"])
def test_queries_without_a_low_rank_have_no_norm(plain: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "deepseek", tiny_config("deepseek_v3", q_lora_rank=None))
    tokens = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    ((found, names),) = pool(1).run(job, path, tokens, plain)
    if not plain and HAS_THE_NORM:
        assert "linear_q_proj.layer_norm_weight: Megatron-Core puts a norm before the queries" in found
        return
    assert len(names) == 4
    assert all(name.endswith("linear_q_proj.weight") for name in names)
    torch.testing.assert_close(found, reference_logits(path, tokens), rtol=0, atol=1e-5)


def test_queries_with_a_low_rank_keep_theirs(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "deepseek", tiny_config("deepseek_v3"))
    tokens = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    ((found, _),) = pool(1).run(job, path, tokens, True)
    torch.testing.assert_close(found, reference_logits(path, tokens), rtol=0, atol=1e-5)
