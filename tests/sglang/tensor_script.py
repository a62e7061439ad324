"""Run by test_update.py: a whole SGLangEngine inside this process, fed by tensor; writes what it sampled."""

import pickle
import sys
from pathlib import Path

from safetensors.torch import load_file

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang import SGLangEngine
from tests.sglang.conftest import SHAPE, own_server
from tests.sglang.test_engine import make_requests

if __name__ == "__main__":
    model_path, gates_path, out = sys.argv[1:4]
    engine = SGLangEngine(own_server(model_path, Path(out) / "log", push="tensor"), SHAPE)
    engine.start()
    batches = [engine.generate(make_requests(8), SamplingParams(12), return_routes=True)]
    engine.update_weights(load_file(gates_path).items(), 1)
    batches.append(engine.generate(make_requests(8), SamplingParams(12), return_routes=True))
    refused = ""
    try:
        engine.update_weights([], 2)
    except RolloutError as error:
        refused = str(error)
    engine.restart()
    engine.update_weights(load_file(f"{model_path}/model.safetensors").items(), 3)
    batches.append(engine.generate(make_requests(8), SamplingParams(12), return_routes=True))
    engine.close()
    (Path(out) / "result.pickle").write_bytes(pickle.dumps(([batch.responses for batch in batches], refused)))
