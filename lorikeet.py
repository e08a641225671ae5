"""The command line's door: `lorikeet serve | adapters | chat | doctor | version`.

Owns nothing but the way in. It puts the folder that it lies in first on the import path, because `adapters` is also the
import name of another project, and hands over to `server.cli`, whose commands import what they need when they run: that
keeps `lorikeet --help` under 0.3 s.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Run the command line on sys.argv; ends the process with the command's exit status."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from server.cli import app

    app()


if __name__ == "__main__":
    main()
