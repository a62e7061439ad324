"""Megatron-Bridge (NVIDIA's `megatron-bridge`, Python 3.12 on) as back end of :mod:`megatron_pr2.hf.bridge`."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.base import Chunks, owns_weights
from megatron_pr2.hf.files import TensorIndex
from megatron_pr2.hf.settings import bridge_config, check_fields, config_overrides
from megatron_pr2.hf.shape import ModelShape

logger = logging.getLogger(__name__)


class MegatronBridge:
    """:class:`megatron_pr2.hf.base.Bridge` on Megatron-Bridge's `AutoBridge`.

    Args:
        path, source: Hugging Face directory and its config.
        shape: None for dense models.
        extra: TransformerConfig fields that override the bridge's.

    Raises:
        ConfigError: Megatron-Bridge is not installed, or a model or a setting that it does not know or would build wrongly.
    """

    def __init__(
        self, path: Path, source: Any, shape: ModelShape | None, dtype: torch.dtype, extra: Mapping[str, Any]
    ) -> None:
        self.source_config, self.dtype = source, dtype
        config = bridge_config(source)
        try:
            with _quiet():
                self.inner = _auto_bridge_class().from_hf_pretrained(str(path))
                provider = self.inner.to_megatron_provider(load_weights=False)
        except ValueError as error:
            raise ConfigError(f"Megatron-Bridge: {error}") from error
        if shape is not None:
            _check_moe_layers(provider, source, shape)
        overrides = {**_settings(config, dtype), **config_overrides(config, shape), **extra}
        check_fields(type(provider), overrides)
        self.config = provider.apply_overrides_and_finalize(dtype, overrides)

    def build(self, *, wrap_with_ddp: bool, ddp_config: Mapping[str, Any]) -> Chunks:
        with _quiet():
            chunks: Chunks = self.config.provide_distributed_model(
                wrap_with_ddp=wrap_with_ddp,
                ddp_config=DistributedDataParallelConfig(**ddp_config),
                use_cpu_initialization=self.config.use_cpu_initialization,
            )
        return chunks

    def parameter_names(self, chunks: Chunks) -> set[str]:
        tasks = self._tasks(chunks)
        named = {task.param_name for task in tasks}
        # Without the wrappers (DistributedDataParallel, Float16Module).
        mine = {re.sub(r"^(module\.)+", "", name) for chunk in chunks for name, _ in chunk.named_parameters()}
        if self.config.share_embeddings_and_output_weights:  # the last pipeline stage has a copy of the embedding
            mine.discard("output_layer.weight")
        if unnamed := sorted(mine - named):
            raise ConfigError(
                f"Megatron-Bridge has no name for {len(unnamed)} parameters of this model, first {unnamed[:2]}; "
                "model.bridge=mbridge may have (docs/bridges.md)"
            )
        return {name for task in tasks for name in _hf_names(task.mapping)}

    def load_weights(self, chunks: Chunks, files: TensorIndex) -> None:
        """From the directory that this was made of; ConfigError if a tensor has another shape than the model's parameter."""
        try:
            with torch.no_grad(), _quiet():
                self.inner.load_hf_weights(chunks)
        except ValueError as error:
            raise ConfigError(f"{files.directory}: Megatron-Bridge cannot load it ({' '.join(str(error).split())})") from error

    def export_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        yield from self._export(chunks, self._tasks(chunks))

    def export_owned_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """Megatron-Bridge's export of this rank's own parameters, in pipeline and expert-parallel groups of this rank alone."""
        tasks, ranks = self._tasks(chunks), mpu.get_expert_model_parallel_world_size()
        grouped = [task.mapping for task in tasks if getattr(task.mapping, "is_grouped_export", False)]
        if ranks > 1 and grouped:
            raise ConfigError(
                f"{_hf_names(grouped[0])[0]} holds the experts of all ranks (expert_model_parallel_size={ranks}): no rank owns it; "
                "use expert_model_parallel_size=1, or the export of the whole model"
            )
        one_rank = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        alone = SimpleNamespace(pp=one_rank, ep=one_rank)
        for experts in (False, True):
            if not owns_weights(experts=experts):
                continue
            # Peers of a tensor-parallel group gather together, in the same order; its first rank yields.
            first = (mpu.get_expert_tensor_parallel_rank() if experts else mpu.get_tensor_model_parallel_rank()) == 0
            own = [task for task in tasks if task.megatron_module is not None and task.mapping.is_expert == experts]
            for task in own:
                task.mapping.set_process_groups_from_pg_collection(alone)
            for name, tensor in self._export(chunks, own):
                if first:
                    yield name, tensor

    def _tasks(self, chunks: Chunks) -> list[Any]:
        """Per parameter of all pipeline stages: its mapping and, on the stages that have it, its module. Collective over stages."""
        with _quiet():
            return [task for task in self.inner.get_conversion_tasks(chunks) if task is not None]

    def _export(self, chunks: Chunks, tasks: list[Any]) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for name, tensor in self.inner.export_hf_weights(
                chunks, show_progress=False, conversion_tasks=tasks, merge_adapter_weights=False
            ):
                yield name, tensor.detach()


def _hf_names(mapping: Any) -> list[str]:
    return [mapping.hf_param] if isinstance(mapping.hf_param, str) else list(mapping.hf_param.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron-Bridge prints (parameter counts, progress bars), and warns of its own use of deprecated names."""
    chatty = [logging.getLogger(name) for name in ("megatron.bridge", "transformers")]
    levels = [each.level for each in chatty]
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*has been deprecated.*")
        try:
            for each in chatty:
                each.setLevel(logging.CRITICAL)
            yield
        finally:
            for each, level in zip(chatty, levels, strict=True):
                each.setLevel(level)
    for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
        logger.debug("Megatron-Bridge: %s", line)


@functools.cache
def _auto_bridge_class() -> Any:
    # Before any stand-in for Transformer Engine, which it would take for the real one.
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401

    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), root.manager.disable
    stand_ins = host.transformer_engine_stand_ins() if host.is_enabled() else contextlib.nullcontext()
    # It logs every optional package that is not installed.
    logging.disable(logging.CRITICAL)
    try:
        with stand_ins, _quiet():
            from megatron.bridge import AutoBridge
    except ImportError as error:
        raise ConfigError(f"model.bridge=megatron-bridge: the package megatron-bridge cannot be imported ({error})") from error
    finally:
        logging.disable(disabled)
        # megatron.training, which it imports, sets up the application's logging.
        root.setLevel(level)
        root.handlers[:] = handlers
    return AutoBridge


def _settings(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of the current parallel state, what differs from pretraining, and what the library leaves out with Transformers 5."""
    stages, virtual = mpu.get_pipeline_model_parallel_world_size(), mpu.get_virtual_pipeline_model_parallel_world_size()
    tensor = mpu.get_tensor_model_parallel_world_size()
    settings = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": mpu.get_context_parallel_world_size(),
        "expert_model_parallel_size": mpu.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": mpu.get_expert_tensor_parallel_world_size(),
        "pipeline_dtype": dtype,
        "variable_seq_lengths": True,
        "batch_p2p_comm": False,
        "overlap_p2p_comm": virtual is not None and stages > 1,
        "autocast_dtype": dtype,
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": 0.0,
        # The multi-token prediction head takes no part in reinforcement learning.
        "mtp_num_layers": None,
    }
    if (share := getattr(config, "partial_rotary_factor", None)) is not None:
        settings["rotary_percent"] = share
    return settings


def _check_moe_layers(provider: Any, source: Any, shape: ModelShape) -> None:
    """Refuses where Megatron-Bridge ignores the model's rule of which layers are dense; it has no names for their parameters."""
    pattern = provider.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(index % pattern == 0) for index in range(provider.num_layers)]
    built = [index for index, is_moe in enumerate(pattern) if is_moe]
    if built != list(shape.moe_layers):
        raise ConfigError(
            f"model_type={source.model_type!r}, MoE layers {list(shape.moe_layers)}: Megatron-Bridge would build layers {built} "
            "as MoE; use model.bridge=mbridge"
        )
