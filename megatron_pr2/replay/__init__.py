"""Routers that take recorded routes: the router, its places in a model, passes over micro-batches, checks of both.

In: a built model, sequences and routes. Out: ReplaySession, PredictiveTopKRouter.
May import routes and parallel; knows nothing of predictions.
"""
