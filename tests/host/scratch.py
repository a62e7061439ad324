import torch, torch.distributed as dist
from megatron_pr2 import host
def logits(path, layout, tokens, dtype=torch.float32, extra=None, packed=None, wrap=False):
    from megatron_pr2.bridge import load_model
    host.init(**layout)
    bridge, chunks = load_model(path, dtype=dtype, wrap_with_ddp=wrap, extra_config=extra)
    m = chunks[0]; m.eval()
    pos = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    with torch.no_grad():
        out = m(tokens, pos, None)
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
    return gather_from_tensor_model_parallel_region(out).clone()
