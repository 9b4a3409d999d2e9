"""Takes the pictures of pages for the documents, with Debian's Chromium.

`python -m docs.report_picture output/quickstart-report.html` for docs/monitoring.md, and for docs/data-check.md
`python -m docs.report_picture output/flawed-data.html data-check.png 1450`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
WIDTH = 1180


def take(page: Path, name: str = "report.png", height: str = "1520") -> None:
    """Write the upper part of a page, `height` pixels, as a picture among those of the documents."""
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
        Image.open(shot).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), *sys.argv[2:])
