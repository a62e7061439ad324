"""How far routers have moved since the rollout: features kept of theta_old, what later passes are compared with.

In: logits of every pass. Out: drift metrics, the predictor's gradient, the numbers of a step.
May import prediction and below.
"""
