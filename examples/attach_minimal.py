"""PR2 on a Megatron-Core model of your own, without a GPU: three rollout batches of two mini-steps, and their drift.

    python examples/attach_minimal.py

The rollout engine is the model itself here; docs/sglang.md has a real one. The lines that a pipeline adds are marked with (n).
"""

import tempfile

import torch

from megatron_pr2 import host

host.init(rank=0, world_size=1, init_method=f"file://{tempfile.mkdtemp()}/store")  # on GPUs: torchrun and your own set-up
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_pr2.attach import MicroBatch, PR2Config, ReplaySequence, attach  # noqa: E402  (1)

CONFIG = TransformerConfig(**host.config_overrides(), num_layers=2, hidden_size=32, num_attention_heads=4, moe_ffn_hidden_size=32,
    num_moe_experts=8, moe_router_topk=2, moe_grouped_gemm=False, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
    pipeline_dtype=torch.float32, params_dtype=torch.float32, moe_token_dispatcher_type="alltoall")  # fmt: skip
VOCABULARY, LENGTH, PROMPT, SEQUENCES = 64, 24, 8, 16


def forward_step(data_iterator, model):  # as in any Megatron pipeline
    tokens_BS = next(data_iterator)
    logits_BSV = model(tokens_BS, torch.arange(LENGTH).expand_as(tokens_BS), None)
    targets_BT = tokens_BS[:, PROMPT:]  # stands for a policy loss on the response
    return logits_BSV, lambda out: (torch.nn.functional.cross_entropy(out[:, PROMPT - 1 : -1].mT, targets_BT), {})


def run(items, *, forward_only):
    get_forward_backward_func()(forward_step_func=forward_step, data_iterator=iter(items), model=model, num_microbatches=len(items),
        seq_length=LENGTH, micro_batch_size=items[0].shape[0], forward_only=forward_only)  # fmt: skip


model = GPTModel(CONFIG, get_gpt_decoder_block_spec(CONFIG, use_transformer_engine=False), VOCABULARY, LENGTH)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
pr2 = attach(model, PR2Config.preset("pr2"), optimizer)  # (2)
for rollout in range(3):
    tokens_NS = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    batch = [MicroBatch.padded(range(i, i + 4), [LENGTH] * 4, LENGTH) for i in range(0, SEQUENCES, 4)]  # (3) who is in which row
    with pr2.merged_gates(), pr2.record(batch) as engine:  # W + W_p in the gates, as an engine would get it
        run(tokens_NS.split(4), forward_only=True)
    routes = pr2.recorded_tables(engine, dict.fromkeys(range(SEQUENCES), LENGTH))
    pr2.begin_rollout([ReplaySequence(i, LENGTH, PROMPT - 1, LENGTH - 1, routes[i]) for i in range(SEQUENCES)])  # (4)
    with pr2.old_logprobs(batch):  # (5)
        run(tokens_NS.split(4), forward_only=True)
    for half in (slice(0, 2), slice(2, 4)):
        with pr2.actor_update(batch[half]):  # (6)
            run(tokens_NS.split(4)[half], forward_only=False)
        optimizer.step()
        optimizer.zero_grad()
        pr2.step()  # (7)
    drift = {name: round(pr2.metrics()[f"pr2/{name}"], 4) for name in ("agreement", "lift", "hold_back/beta")}  # (8)
    print(f"rollout batch {rollout}: {drift}")
