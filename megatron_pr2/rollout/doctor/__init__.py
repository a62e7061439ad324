"""`megatron-pr2 doctor`: checks of a running server, its routes and log-probs against Transformers."""
