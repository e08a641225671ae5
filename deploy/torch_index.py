"""Print the pip options with which torch installs without CUDA's gigabytes, where no GPU could use them.

On Linux, PyPI's torch brings some 3 GB of CUDA libraries; PyTorch's own CPU index has the same version without them.
The options are printed only where they help and cannot hurt: no NVIDIA driver here, pip's own configuration names no
index or wheel folder (a mirror is respected as it is), and the CPU index answers within three seconds.

Usage: torch_index.py [INDEX]   INDEX overrides the decision: a URL to use, or "none".
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 3.0
OWN_CONFIGURATION = ("index-url", "extra-index-url", "find-links", "no-index")


def main(arguments: list[str]) -> int:
    wanted = arguments[0] if arguments else ""
    index = wanted if wanted else decide()
    if index and index != "none":
        sys.stdout.write(f"--extra-index-url {index}\n")
    return 0


def decide() -> str:
    """The CPU index, or "" where pip's own way is right."""
    is_helpful = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
    if not is_helpful or has_nvidia_driver() or pip_is_configured() or not answers(CPU_INDEX + "/torch/"):
        return ""
    return CPU_INDEX


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None


def pip_is_configured() -> bool:
    """Whether a file or the environment already tells pip where packages come from."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return any(f".{option}=" in line for line in listing.splitlines() for option in OWN_CONFIGURATION)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
