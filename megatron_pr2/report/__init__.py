"""What a person sees of a training run: metrics log, live display, pages of runs and of saved routes; only rank 0 uses them.

In: records, one per rollout step. Out: metrics.jsonl, TensorBoard, HTML, CSV, Markdown. May import routes, parallel and config.
The submodules are imported one by one, because each loads another library: TensorBoard, rich, matplotlib, jinja2.
"""
