"""SGLang servers as one engine: fleet, scheduler, what is sent and what of an answer is accepted.

In: SGLangConfig, requests. Out: SGLangEngine. `push/` moves weights, `gateway/` is SGLang's router in front, `cpu/` needs no GPU.
Imports neither Megatron-Core nor SGLang: servers run in an environment of their own. Whatever fails raises RolloutError, which
names the server and the cause, RouteError for routes that cannot be used, or ConfigError for settings.
"""
