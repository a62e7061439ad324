"""The reference trainer: data, rewards, losses, actor, checkpoints, launcher, checks before the start.

In: TrainConfig. Out: a trained model, metrics.jsonl, a report.
May import everything but plan, integrations and cli.
"""
