"""Where a router is going: W_p, learned or extrapolated from the optimizer, and how much of it is used.

In: features and logits of a pass, or the optimizer's state. Out: RoutePredictor, merged gates (arXiv 2606.00395, Eq. 9-11).
May import replay, routes and parallel; measures nothing.
"""
