"""Where old log-probs come from: the sources of an asynchronous pipeline, and what each means for replay.

    recompute   a forward under theta_old, the weights when the rollout batch arrived (of the last push, in a synchronous loop)
    rollout     the engine's own, kept with every token that it sampled: no forward, and right for each token of a response that was
                sampled under several versions of the weights
    ewma        a forward under the moving average of the policy (proximal.py), before every mini-step

The replay rules, the same for every trainer (docs/off_policy.md has them as a table):
  1. Every forward over the rollout's tokens replays the same routes: a ratio of two policies that chose different experts measures
     the routing. `pr2.old_logprobs`, `pr2.replay` and `pr2.actor_update` all do.
  2. Features (h_old, p_old) and routes of the actor come from the snapshot, in `pr2.old_logprobs`; never from a moving average,
     whose routers nobody predicts. So its pass is a `pr2.replay`, which keeps nothing and learns nothing.
  3. A source without a forward under the snapshot still needs one where features or the actor's routes are needed
     (:func:`needs_snapshot_pass`); its log-probs are then not used.
  4. Routes that the actor records and log-probs of the rollout exclude each other: the engine sampled under routes of its own, and
     the recording pass has the log-probs that belong to the recorded routes anyway (:func:`check_source`).
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
    features = replay.learns or (replay.predicts and replay.hold_back)
    return source == "recompute" or replay.routes == "actor" or features
