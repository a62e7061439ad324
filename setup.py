"""Packaging of megatron-pr2; pinned environments are in requirements/."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

setup(
    name="megatron-pr2",
    version="0.1.0",
    description="Predictive Routing Replay (PR2): stable reinforcement learning of large MoE models on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_pr2", "megatron_pr2.*"]),
    package_data={"megatron_pr2": ["py.typed", "report/*.html.j2"]},
    install_requires=[
        "torch>=2.6",
        "numpy",
        "megatron-core>=0.16,<0.17",
        "mbridge>=0.15.1",
        "transformers>=5.0",
        "safetensors",
        "einops",
        "omegaconf>=2.3",
        "typer>=0.12",
        "rich>=13",
        "tensorboard",
        "matplotlib>=3.8",
        "jinja2",
        "httpx",
        "scipy",
        "pybase64",
    ],
    extras_require={
        "sglang": ["sglang>=0.5.19"],
        "router": ["sglang-router>=0.3.2,<0.4"],
        "verl": ["verl>=0.9.1,<0.10"],
        "te": ["transformer-engine[pytorch]>=2.6"],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy"],
    },
    entry_points={
        "console_scripts": ["megatron-pr2 = megatron_pr2.cli:app"],
        "sglang.srt.plugins": [
            "megatron_pr2_cpu = megatron_pr2.rollout.sglang_cpu.plugin:register",
            "megatron_pr2_routes = megatron_pr2.rollout.sglang_plugin:register",
        ],
    },
)
