"""How long `train_network.py --help` takes, against `python -c "import torch"`, in turns.

python -m benchmarks.help_time [--pairs 20]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.common import header, interleaved, row

ROOT = Path(__file__).parent.parent


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    comparison = interleaved(lambda: run("train_network.py", "--help"), lambda: run("-c", "import torch"), pairs=pairs)
    print(header("--help, s", "import torch, s"))
    print(row("start-up", comparison))


if __name__ == "__main__":
    main()
