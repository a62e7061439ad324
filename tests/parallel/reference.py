"""The numbers of one process in the layout matrix, as a file: what releases of Megatron-Core are compared by.

python -m tests.parallel.reference FILE
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.helpers.distributed import close_pools, pool
from tests.host.models import make_checkpoint
from tests.parallel.case import Case
from tests.parallel.replay import run_case
from tests.parallel.test_matrix import model_config


def main(file: Path) -> None:
    """Writes {"policy": gradients by Hugging Face name, "predictor": of W_p by layer, "logprobs": {"old": [S]}}, all fp32."""
    with tempfile.TemporaryDirectory() as directory:
        (result,) = pool(1).run(run_case, make_checkpoint(Path(directory) / "model", model_config()), Case())
    close_pools()
    numbers = {
        "policy": result.gradients,
        "predictor": {str(layer): gradient for layer, (gradient, _) in result.predictor.items()},
        "logprobs": {"old": torch.tensor([result.logprobs[key] for key in sorted(result.logprobs)])},
    }
    torch.save(numbers, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
