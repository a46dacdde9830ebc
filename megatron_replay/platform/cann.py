"""Which torch_npu is made for which CANN: another one fails at import with an undefined symbol.

Needs only Python, so that a Dockerfile can run it before anything is installed:

    python megatron_replay/platform/cann.py --cann 9.1.0 --torch-npu 2.12.0 --python 3.11
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

#: The torch_npu releases made for each CANN, from 2.6 on, as in COMPATIBILITY.md of Ascend/pytorch
#: (August 2026). This project has run none of them.
COMPATIBLE = {
    "9.1.0": ("2.7.1.post8", "2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0"),
    "9.0.0": ("2.7.1.post4", "2.8.0.post4", "2.9.0.post2"),
    "8.5.0": ("2.6.0.post5", "2.7.1.post2", "2.8.0.post2", "2.9.0"),
    "8.3.RC1": ("2.6.0.post3", "2.7.1", "2.8.0"),
    "8.2.RC1": ("2.6.0",),
}
#: The first CANN whose image takes any numpy (Ascend/cann-container-image; that of 8.3 has 1.24.0).
#: With numpy 2 the first use of a device failed on 8.0 and 8.2 (vllm-ascend 472 and 2210).
NUMPY_2 = "9.0.0"
#: megatron-core 0.16.1 has wheels for these.
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: Where CANN installs itself: since 8.5, and before.
HOMES = ("usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit/latest")


def compare(
    cann: str, torch_npu: str, python: str
) -> tuple[Literal["ok", "warning", "error"], str]:
    """Whether the three fit each other, and the reason if not.

    An error where they are known not to: the table has both releases, apart from each other. A
    warning with the nearest known pair where the table lacks one of them.
    """
    if python not in PYTHONS:
        return "error", f"Python {python}, where megatron-core 0.16.1 needs {' or '.join(PYTHONS)}"
    release = re.match(r"\d+\.\d+\.(RC)?\d+", cann)
    cann, torch_npu = release[0] if release else cann, torch_npu.partition("+")[0]
    if _number(cann) < min(map(_number, COMPATIBLE)):
        return "error", f"CANN {cann}, for which no torch_npu from 2.6 on is made"
    made_for = COMPATIBLE.get(cann, ())
    if torch_npu in made_for:
        return "ok", ""
    others = [other for other, releases in COMPATIBLE.items() if torch_npu in releases]
    if made_for and others:
        reason = f"torch_npu {torch_npu} is made for CANN {others[0]}; CANN {cann} takes"
        return "error", f"{reason} {', '.join(made_for)}"
    pairs = [(known, fitting) for known, fits in COMPATIBLE.items() for fitting in fits]
    near = min(
        pairs,
        key=lambda pair: (
            abs(_number(pair[0]) - _number(cann)),
            abs(_number(pair[1]) - _number(torch_npu)),
        ),
    )
    reason = f"nothing is known of torch_npu {torch_npu} on CANN {cann}"
    return "warning", f"{reason}; the nearest known pair is torch_npu {near[1]} on CANN {near[0]}"


def _number(release: str) -> int:
    """2.9.0.post6 -> 2_009_500_006: for the order of releases and their distance."""
    parts = [int(part) for part in re.findall(r"\d+", release)]
    if "RC" not in release:  # 8.2.0 comes after 8.2.RC1
        parts[2:3] = [part + 500 for part in parts[2:3]]
    return sum(part * 1000 ** (3 - i) for i, part in enumerate(parts[:4]))


def runs_with_numpy(cann: str, numpy: str) -> bool:
    """Whether that CANN's Python modules are known to run with that numpy."""
    return int(numpy.partition(".")[0]) < 2 or _number(cann) >= _number(NUMPY_2)


def torch_for(torch_npu: str) -> str:
    """The torch release that a torch_npu release is built for: 2.9.0.post6 -> 2.9.0."""
    return re.sub(r"(\.post\d+|rc\d+|\+.*)+$", "", torch_npu)


def home(root: Path, environment: Mapping[str, str]) -> Path | None:
    """CANN's folder: the one that set_env.sh names, or else where CANN installs itself."""
    named = [environment.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    places = [root / str(place).lstrip("/") for place in (*named, *HOMES) if place]
    return next((place for place in places if place.is_dir()), None)


def version(home: Path) -> str | None:
    """The release in ``<arch>-linux/ascend_toolkit_install.info``; None if there is none."""
    for file in sorted(home.glob("*-linux/ascend_toolkit_install.info")):
        found = re.search(r"^version=(\S+)", file.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1]
    return None


def main() -> int:
    """Check one triple; the exit code is 2 where it is known not to fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("--cann", "--torch-npu", "--python"):
        parser.add_argument(flag, required=True)
    options = parser.parse_args()
    status, reason = compare(options.cann, options.torch_npu, options.python)
    if reason:
        print(f"{status}: {reason}", file=sys.stderr)
    return 2 if status == "error" else 0


if __name__ == "__main__":
    sys.exit(main())
