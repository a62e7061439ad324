"""Starts the training ranks of one machine and says why one of them failed."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_pr2.config import read_yaml
from megatron_pr2.errors import ConfigError, PR2Error
from megatron_pr2.report.metrics_log import FILE_NAME, read_records
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.preflight import check, examples_model
from megatron_pr2.rl.rules import CLIP
from megatron_pr2.rl.task import training_problems, write_problems
from megatron_pr2.rl.tiny import TinyModelConfig
from megatron_pr2.routes.files import replacement

if TYPE_CHECKING:  # settings are checked before torch is imported
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logger = logging.getLogger(__name__)

# What may differ when a run is continued: how far it goes and where results are kept, not what it computes.
_MAY_CHANGE = (
    "steps", "checkpoint_every", "run", "rollout.restarts", "rollout.handshake", "rollout.urls", "rollout.engines",
    "rollout.router", "parallel.processes", "parallel.expert",
)  # fmt: skip


class TrainingFailed(PR2Error, RuntimeError):
    """A rank failed; the message is its error."""


def train(config: TrainConfig) -> Path:
    """The whole job on this machine: model and data if they are not given, the ranks, the report.

    A run directory that holds an unfinished run of the same configuration is continued; a finished one is moved aside.

    Returns:
        The run directory: config.yaml, environment.json, metrics.jsonl, tensorboard/, report.html, checkpoints/, final/ (Hugging
        Face format).

    Raises:
        ConfigError: contradicting settings, or the directory holds a run of another configuration.
        DataError: unusable data.
        TrainingFailed: a rank failed.
    """
    directory = Path(config.run)
    check(config)
    with _alone(directory):
        _move_finished(directory, config)
    with _alone(directory):
        _claim(directory, config)
        _require_gpus(config.parallel.processes)
        model_path = config.model.path or str(warm_start(config))
        data_path = config.data or str(write_problems(training_problems(config.seed), directory / "train.jsonl"))
        try:
            _run_ranks(config, model_path, data_path)
        finally:
            # Also of a run that was interrupted, if there is anything to see.
            if (directory / FILE_NAME).exists() and (directory / FILE_NAME).stat().st_size:
                from megatron_pr2.report.html import write_report

                write_report(directory)
    return directory


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Two runs in one directory, which is made if needed, would overwrite each other's settings and checkpoints."""
    lock = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = lock.open("w")
    except OSError as error:
        raise _unwritable(directory, error) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run={directory}: another process is training in it; choose another directory, or end it") from error
        except OSError:
            logger.debug("%s lies on a file system without locks", directory)
        if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise ConfigError(f"run={directory}: another process has just moved it aside; start again")
        yield


def _run_ranks(config: TrainConfig, model_path: str, data_path: str) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # TrainingFailed gives the reason and errors.log the details; torch's own report would hide the reason among its tables.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.parallel.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        elastic_launch(launch, _rank)(config, model_path, data_path)
    except ChildFailedError as error:
        raise TrainingFailed(_reason(error, Path(config.run) / "errors.log")) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


def _rank(config: TrainConfig, model_path: str, data_path: str) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def work() -> None:
        _silence_known_warnings()
        _enable_host()
        from megatron_pr2.rl import worker

        worker.run(config, model_path, data_path)

    work()


def _silence_known_warnings() -> None:
    """Hides what torch and Megatron-Core say of each other's names on every step and rank: nobody who runs a job can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")
    # Imported by Megatron-Core itself, from a model that is not in use.
    warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")
    for name, start in (
        # GPTModel is what the bridges build; HybridModel, its successor, is not in all releases.
        ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
        ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
    ):
        logging.getLogger(name).addFilter(partial(_says_other, start))


def _says_other(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def _enable_host() -> None:
    """Without a GPU Megatron-Core and Transformers need the host to be imported at all."""
    import torch

    from megatron_pr2 import host

    if not torch.cuda.is_available():
        host.enable()


def _move_finished(directory: Path, config: TrainConfig) -> None:
    """So that the same command runs again and nothing is lost."""
    if (directory / "final").exists() and len(read_records(directory)) >= config.steps:
        aside = (directory.with_name(f"{directory.name}.{n}") for n in itertools.count(1))
        moved = directory.rename(next(place for place in aside if not place.exists()))
        logger.warning("%s holds a finished run: moved it to %s", directory, moved)


def _claim(directory: Path, config: TrainConfig) -> None:
    """Writes the configuration into a new run directory, or checks that it is the one of the unfinished run found there."""
    file, settings = directory / "config.yaml", OmegaConf.structured(config)
    if file.exists() and (directory / FILE_NAME).exists():
        # A setting that a later release brought stands at its default, which leaves everything as it was; "auto" groups would not.
        found = OmegaConf.merge({"rollout": {"groups": 1}}, read_yaml(file))
        old, now = _flat(OmegaConf.structured(TrainConfig)) | _flat(found), _flat(settings)
        # What "auto" comes to depends on the servers, which may change.
        now["rollout.groups"] = config.horizons
        old["rollout.groups"] = _horizons(found, unknown=config.horizons)
        # Earlier releases wrote GRPO's bounds out, which are null's now.
        for each in (old, now):
            low, high = CLIP.get(each["algorithm.loss"], (None, None))
            for name, default in (("algorithm.clip_low", low), ("algorithm.clip_high", high)):
                each[name] = default if each[name] is None else each[name]
        if changed := sorted(key for key in {*old, *now} - {*_MAY_CHANGE} if old.get(key, ...) != now.get(key, ...)):
            raise ConfigError(
                f"{directory} holds a run with other settings ({', '.join(changed)}); choose another run=DIRECTORY, "
                "or remove that one to start over"
            )
    try:
        with replacement(file) as temporary:
            OmegaConf.save(settings, temporary)
    except OSError as error:
        raise _unwritable(directory, error) from error


def _horizons(settings: Any, unknown: list[float]) -> list[float]:
    """What each mini-step's responses are predicted for under a file's settings; `unknown` where these are of a later release."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), settings))
        return config.horizons if isinstance(config, TrainConfig) else unknown
    except (OmegaConfBaseException, ConfigError):
        return unknown


def _unwritable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run={directory} cannot be written to ({error}); choose another directory")


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    if not isinstance(settings, DictConfig):
        return {prefix: settings}
    names = [(f"{prefix}.{name!s}".removeprefix("."), value) for name, value in settings.items()]
    return {name: value for inner, node in names for name, value in _flat(node, inner).items()}


def _require_gpus(processes: int) -> None:
    """One for each process, where there are any."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < processes:
        raise ConfigError(f"parallel.processes={processes}: this machine has {gpus} GPUs; every process takes one")


def warm_start(config: TrainConfig) -> Path:
    """The policy of the examples: tiny, made here, warm-started on the arithmetic task, cached."""
    _enable_host()
    from megatron_pr2.rl.warmstart import WarmStartConfig, ensure_warm_start

    model = TinyModelConfig.of(config.model.sizes)
    return ensure_warm_start(examples_model(config), WarmStartConfig.of(config.model.warm_start, config.seed, model))


def _reason(error: ChildFailedError, log: Path) -> str:
    """The error of the first failed rank, in a line; every rank's traceback goes to `log`."""

    def told(message: Any) -> dict[str, Any]:  # a plain text where a rank was killed
        return message if isinstance(message, dict) else {"message": message}

    with log.open("a", encoding="utf-8") as file:
        for rank, failure in error.failures.items():
            said = told(failure.message)
            file.write(f"--- rank {rank}, exit code {failure.exitcode}, {failure.timestamp_isoformat()}\n")
            file.write(f"{said.get('extraInfo', {}).get('py_callstack') or said['message']}\n")
    rank, failure = error.get_first_failure()
    return f"rank {rank}: {told(failure.message)['message']} (tracebacks: {log})"
