"""Which torch_npu fits which CANN: the wrong pair fails at import with an undefined symbol.

Needs only Python, so that a Dockerfile can run it before anything is installed:

    python megatron_replay/platform/cann.py --cann 9.1.0 --torch-npu 2.12.0 --python 3.11
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

#: The torch_npu releases made for each CANN, from the release notes of both. This project has run
#: none of them.
COMPATIBLE = {
    "9.1.0": ("2.7.1.post8", "2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0"),
    "9.0.0": ("2.7.1.post4", "2.8.0.post4", "2.9.0.post2"),
    "8.5.0": ("2.6.0.post5", "2.7.1.post2", "2.8.0.post2", "2.9.0"),
}
#: megatron-core 0.16.1 is the last with wheels for these, and CANN's images have them.
PYTHONS = ("3.10", "3.11")
#: Where CANN installs itself: since 8.5, and before.
HOMES = ("usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit/latest")


def why_not(cann: str, torch_npu: str, python: str) -> str | None:
    """Why these three do not fit each other, and what would; None if they do."""
    if python not in PYTHONS:
        return f"Python {python}, where megatron-core 0.16.1 needs {' or '.join(PYTHONS)}"
    release = re.match(r"\d+\.\d+\.\d+", cann)
    made_for = COMPATIBLE.get(release[0] if release else cann)
    if made_for is None:
        return f"CANN {cann}, where {', '.join(COMPATIBLE)} are known"
    if torch_npu.partition("+")[0] not in made_for:
        return f"torch_npu {torch_npu} on CANN {cann}, which takes {', '.join(made_for)}"
    return None


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
    """Check one triple; the exit code is 2 where it does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("--cann", "--torch-npu", "--python"):
        parser.add_argument(flag, required=True)
    options = parser.parse_args()
    reason = why_not(options.cann, options.torch_npu, options.python)
    if reason:
        print(f"error: {reason}", file=sys.stderr)
    return 2 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
