"""Where old log-probs come from, and what each source means for replay.

    recompute   a forward under theta_old, the weights when the rollout batch arrived (of the last push, in a synchronous loop)
    rollout     the engine's own, kept with every token that it sampled: no forward, and right for each token of a response that was
                sampled under several versions of the weights
    ewma        a forward under the moving average of the policy (proximal.py), before every mini-step

docs/off_policy.md has the replay rules. In short: every forward over the rollout's tokens replays the same routes, since a ratio of
two policies that chose different experts measures the routing; features and routes of the actor come from the snapshot, in
`pr2.old_logprobs`, also where its log-probs are not used; a pass under the moving average is a `pr2.replay`, which keeps nothing.
"""

from __future__ import annotations

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ConfigError

SOURCES = ("recompute", "rollout", "ewma")
# What corrects them for the engine's: megatron_pr2.rl.corrections.
KINDS = ("none", "tis", "mis")
LEVELS = ("token", "sequence")


def check_source(source: str, importance: str, replay: PR2Config) -> None:
    """Raises ConfigError for a source that contradicts the correction (one of KINDS) or the routes."""
    if source not in SOURCES:
        raise ConfigError(f"algorithm.old_logprobs={source!r}: expected one of {', '.join(SOURCES)}")
    if source == "rollout" and replay.routes == "actor":
        raise ConfigError(
            "algorithm.old_logprobs=rollout contradicts pr2.routes=actor (preset=r2): the engine's log-probs belong to other "
            "routes than those that the actor records and replays; set old_logprobs=recompute, or pr2.routes=engine (preset=r3)"
        )
    if source == "rollout" and importance != "none":
        raise ConfigError(
            f"algorithm.importance={importance} corrects old log-probs for the engine's, and with algorithm.old_logprobs=rollout "
            "they are the same; set importance=none, or old_logprobs=recompute"
        )
    if source == "ewma" and importance == "none":
        raise ConfigError(
            "algorithm.old_logprobs=ewma needs algorithm.importance=tis or mis: nothing was sampled from the moving average, and a "
            "ratio to it alone is off-policy without a correction"
        )


def needs_snapshot_pass(source: str, replay: PR2Config) -> bool:
    """Whether a forward under theta_old has to be run for a rollout batch (a `pr2.old_logprobs` session).

    It is where log-probs are recomputed, the actor records its routes, and features are kept of what a predictor learns from or is
    judged by. Without it there are no drift metrics, and `min_agreement` is not checked.
    """
    return source == "recompute" or replay.routes == "actor" or replay.keeps_inputs
