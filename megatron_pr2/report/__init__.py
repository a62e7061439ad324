"""What a person sees of a training run: metrics log, live display and HTML report; only rank 0 uses them.

The submodules are imported one by one, because each pulls in another library: metrics_log (TensorBoard), display (rich),
html (matplotlib, jinja2).
"""
