"""Megatron-Bridge (NVIDIA's `megatron-bridge`, Python 3.12 on) as back end of :mod:`megatron_pr2.hf.bridge`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.base import Chunks, is_multi_token_prediction, owns_weights
from megatron_pr2.hf.settings import bridge_config, config_overrides
from megatron_pr2.hf.shape import ModelShape

logger = logging.getLogger(__name__)


class MegatronBridge:
    """:class:`megatron_pr2.hf.base.Bridge` on Megatron-Bridge's `AutoBridge`.

    Args:
        path: Hugging Face directory.
        source: its config.
        shape: None for dense models.
        extra: TransformerConfig fields that override the bridge's.

    Raises:
        ConfigError: Megatron-Bridge is not installed, or a model or a setting that it does not know or would build wrongly.
    """

    label = "Megatron-Bridge"

    def __init__(
        self, path: Any, source: Any, shape: ModelShape | None, dtype: torch.dtype, extra: Mapping[str, Any]
    ) -> None:
        self.source_config, self.dtype = source, dtype
        config = bridge_config(source)
        try:
            with _quiet():
                self.inner = _auto_bridge_class().from_hf_pretrained(str(path))
                provider = self.inner.to_megatron_provider(load_weights=False)
        except ValueError as error:
            raise ConfigError(f"Megatron-Bridge: {error}") from error
        _check_moe_layers(provider, source, shape)
        overrides = {**_layout(dtype), **_settings(config, dtype), **config_overrides(config, shape), **extra}
        if host.is_enabled():
            overrides.update(host.config_overrides())
        if unknown := sorted(set(overrides) - {field.name for field in dataclasses.fields(provider)}):
            raise ConfigError(f"extra_config: {type(provider).__name__} has no fields {unknown}")
        self.config = provider.apply_overrides_and_finalize(dtype, overrides)

    def build(self, *, wrap_with_ddp: bool, ddp_config: Mapping[str, Any]) -> Chunks:
        """The model chunks."""
        settings = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **ddp_config}
        with _quiet():
            chunks: Chunks = self.config.provide_distributed_model(
                wrap_with_ddp=wrap_with_ddp,
                ddp_config=DistributedDataParallelConfig(**settings),
                use_cpu_initialization=self.config.use_cpu_initialization,
            )
        return chunks

    def parameter_names(self, chunks: Chunks) -> set[str]:
        """Names by Megatron-Bridge's own mapping, those of other pipeline stages among them."""
        tasks = [task for task in self._tasks(chunks) if task is not None]
        named = {task.param_name for task in tasks}
        mine = {_unwrapped(name) for chunk in chunks for name, _ in chunk.named_parameters()}
        if self.config.share_embeddings_and_output_weights:  # the last pipeline stage has a copy of the embedding
            mine.discard("output_layer.weight")
        if unnamed := sorted(mine - named):
            raise ConfigError(
                f"Megatron-Bridge has no name for {len(unnamed)} parameters of this model, first {unnamed[:2]}; "
                "model.bridge=mbridge may have (docs/bridges.md)"
            )
        return {name for task in tasks for name in _hf_names(task.mapping)}

    def is_extra_weight(self, name: str) -> bool:
        """Multi-token prediction layers are not built."""
        return is_multi_token_prediction(name, self.config.num_layers)

    def load_weights(self, chunks: Chunks, path: Any) -> None:
        """Megatron-Bridge's load from the directory that it was made of.

        Raises:
            ConfigError: a tensor has another shape than the model's parameter.
        """
        try:
            with torch.no_grad(), _quiet():
                self.inner.load_hf_weights(chunks)
        except ValueError as error:
            raise ConfigError(f"{path}: Megatron-Bridge cannot load it ({' '.join(str(error).split())})") from error

    def export_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """Megatron-Bridge's export."""
        yield from self._export(chunks, self._tasks(chunks))

    def export_owned_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """Megatron-Bridge's export of this rank's own parameters, in pipeline and expert-parallel groups of this rank alone.

        Raises:
            ConfigError: at the first step and on every rank, for a checkpoint whose experts are one tensor while ranks hold some
                of them each: no rank owns such a tensor.
        """
        tasks = [task for task in self._tasks(chunks) if task is not None]
        if mpu.get_expert_model_parallel_world_size() > 1:
            for task in tasks:
                if getattr(task.mapping, "is_grouped_export", False):
                    raise ConfigError(
                        f"{next(iter(_hf_names(task.mapping)))} holds the experts of all ranks "
                        f"(expert_model_parallel_size={mpu.get_expert_model_parallel_world_size()}): no rank owns it; "
                        "use expert_model_parallel_size=1, or the export of the whole model"
                    )
        alone = SimpleNamespace(pp=_OneRank(), ep=_OneRank())
        for experts in (False, True):
            # Peers of a tensor-parallel group gather together, in the same order; its first rank yields.
            first = (mpu.get_expert_tensor_parallel_rank() if experts else mpu.get_tensor_model_parallel_rank()) == 0
            if not owns_weights(experts=experts):
                continue
            own = [task for task in tasks if task.megatron_module is not None and task.mapping.is_expert == experts]
            for task in own:
                task.mapping.set_process_groups_from_pg_collection(alone)
            for name, tensor in self._export(chunks, own):
                if first:
                    yield name, tensor

    def _tasks(self, chunks: Chunks) -> list[Any]:
        """Per parameter of all pipeline stages: its mapping and, on the stages that have it, its module. Collective over stages."""
        with _quiet():
            return list(self.inner.get_conversion_tasks(chunks))

    def _export(self, chunks: Chunks, tasks: list[Any]) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for name, tensor in self.inner.export_hf_weights(
                chunks,
                show_progress=False,
                conversion_tasks=[task for task in tasks if task is not None],
                merge_adapter_weights=False,
            ):
                yield name, tensor.detach()


class _OneRank:
    """What mappings ask of a process group that has one member."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _unwrapped(name: str) -> str:
    """A parameter's name without the wrappers of its model (DistributedDataParallel, Float16Module)."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _hf_names(mapping: Any) -> list[str]:
    return [mapping.hf_param] if isinstance(mapping.hf_param, str) else list(mapping.hf_param.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron-Bridge prints (parameter counts, progress bars), and warns of how it uses its own and other libraries' names."""
    chatty = {name: logging.getLogger(name) for name in ("megatron.bridge", "transformers")}
    levels = {name: chatty[name].level for name in chatty}
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*has been deprecated.*")
        try:
            for each in chatty.values():
                each.setLevel(logging.CRITICAL)
            yield
        finally:
            for name, each in chatty.items():
                each.setLevel(levels[name])
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
    # It tells of every optional package that is not there.
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


def _layout(dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of the current parallel state, and how stages talk."""
    stages, virtual = mpu.get_pipeline_model_parallel_world_size(), mpu.get_virtual_pipeline_model_parallel_world_size()
    tensor = mpu.get_tensor_model_parallel_world_size()
    return {
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
    }


def _settings(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What differs from pretraining, and what Megatron-Bridge leaves out with Transformers 5."""
    settings: dict[str, Any] = {
        "autocast_dtype": dtype,
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0,
        # The multi-token prediction head takes no part in reinforcement learning.
        "mtp_num_layers": None,
    }
    if (share := getattr(config, "partial_rotary_factor", None)) is not None:
        settings["rotary_percent"] = share
    return settings


def _check_moe_layers(provider: Any, source: Any, shape: ModelShape | None) -> None:
    """Megatron-Bridge leaves out some models' rule of which layers are dense, and has no names for their parameters.

    Raises:
        ConfigError: it would build other layers as MoE than the config says.
    """
    if shape is None:
        return
    pattern = provider.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(index % pattern == 0) for index in range(provider.num_layers)]
    built = [index for index, is_moe in enumerate(pattern) if is_moe]
    if built != list(shape.moe_layers):
        raise ConfigError(
            f"model_type={source.model_type!r}, MoE layers {list(shape.moe_layers)}: Megatron-Bridge would build layers {built} "
            "as MoE; use model.bridge=mbridge"
        )
