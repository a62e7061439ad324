"""verl's SGLang server with decoded routes, on the CPU: one request, its answer as JSON.

    SGLANG_PYTHON tests/verl/sglang_script.py REPOSITORY VERL_SITE_PACKAGES MODEL OUTPUT

verl and SGLang want different releases of Transformers. This runs in SGLang's environment, and finds there what verl needs besides
at the end of the path.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
REPOSITORY, PACKAGES, MODEL, OUTPUT = sys.argv[1:5]
sys.path.insert(0, REPOSITORY)
sys.path.append(PACKAGES)

from megatron_pr2.rollout.sglang.cpu import launch  # noqa: E402

# SGLang's processes are spawned, and import this module first.
launch._prepare_process()

OVERRIDES = (
    "model_engine=megatron", "rollout.name=sglang", "rollout.enable_rollout_routing_replay=true", "rollout.dtype=float32",
    "rollout.tensor_model_parallel_size=1", "rollout.prompt_length=32", "rollout.response_length=32", "rollout.load_format=auto",
    "rollout.max_num_seqs=8", "+rollout.engine_kwargs.sglang.device=cpu", "+rollout.engine_kwargs.sglang.enable_memory_saver=false",
    "+rollout.engine_kwargs.sglang.attention_backend=torch_native", "+rollout.engine_kwargs.sglang.sampling_backend=pytorch",
    "+rollout.engine_kwargs.sglang.max_total_tokens=2048", "+rollout.engine_kwargs.sglang.enable_weights_cpu_backup=false",
    "+rollout.engine_kwargs.sglang.disable_cuda_graph=true",
)  # fmt: skip


async def answer() -> dict[str, object]:
    """What verl's agent loops get for one prompt."""
    import ray
    from hydra import compose, initialize_config_module
    from verl.workers.rollout.replica import RolloutMode, RolloutReplicaRegistry

    from megatron_pr2.integrations.verl_sglang import register_rollout

    register_rollout()
    replica = RolloutReplicaRegistry.get("sglang")
    from megatron_pr2.integrations.verl_sglang.server import PR2SGLangHttpServer, PR2SGLangReplica

    assert replica is PR2SGLangReplica
    overrides = [o if o.startswith("model_engine") else o.replace("rollout.", "actor_rollout_ref.rollout.", 1) for o in OVERRIDES]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*overrides, f"actor_rollout_ref.model.path={MODEL}"]).actor_rollout_ref
    # Outside of Ray nobody says what this node is called.
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    server = PR2SGLangHttpServer(config.rollout, config.model, RolloutMode.STANDALONE, [], 0, 0, 1, "", 0)
    await server.launch_server()
    sampling = {"temperature": 1.0, "logprobs": True, "max_new_tokens": 12, "ignore_eos": True}
    output = await server.generate([5, 6, 7, 8], sampling, "request")
    return {
        "token_ids": list(output.token_ids),
        "log_probs": list(output.log_probs),
        "routed_experts": output.routed_experts.tolist(),
        "dtype": str(output.routed_experts.dtype),
    }


if __name__ == "__main__":
    import asyncio

    import psutil

    try:
        Path(OUTPUT).write_text(json.dumps(asyncio.run(answer())), encoding="utf-8")
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
