"""Predictive routing replay in existing pipelines: each module here knows one of them and is imported by nobody else."""
