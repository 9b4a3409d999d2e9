"""Takes the picture of a report for docs/monitoring.md, with Debian's Chromium.

`python -m docs.report_picture output/quickstart-report.html`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 1180, 1520


def take(report: Path) -> None:
    """The upper part of the page."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            [
                *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(
                    "--virtual-time-budget=10000",
                    f"--window-size={WIDTH},{HEIGHT}",
                    f"--user-data-dir={folder}/profile",
                ),
                *(f"--screenshot={shot}", report.resolve().as_uri()),
            ],
            check=True,
            capture_output=True,
        )
        # few colours: a quarter of the bytes, and no difference to be seen
        Image.open(shot).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]))
