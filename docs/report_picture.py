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


def take(page: Path, picture: Path = PICTURE, *, height: int = HEIGHT) -> None:
    """Write the upper part of a page, `height` pixels, as a picture."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            [
                *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(
                    "--virtual-time-budget=10000",
                    f"--window-size={WIDTH},{height}",
                    f"--user-data-dir={folder}/profile",
                ),
                *(f"--screenshot={shot}", page.resolve().as_uri()),
            ],
            check=True,
            capture_output=True,
        )
        # few colours: a quarter of the bytes, and no difference to be seen
        Image.open(shot).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]))
