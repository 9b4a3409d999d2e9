"""What a run says, without what differs from run to run: places, times, speeds, what a machine has left over."""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BAR = re.compile(
    r"(?P<name>.*?):? *\d+%\|[^|]*\| *(?P<done>\d+/\d+) \[(?P<clock>[^,\]]*),[^,\]]*(?:, (?P<more>.*))?\]"
)
_DROPPED = re.compile(
    r"CustomAdamW: compiled its CPU kernel"  # by the first run on a machine
    r"|\[[WE]\d{4} "  # torch's own, of the network and the processor
    r"|\*{20}|Setting OMP_NUM_THREADS|W\d{4} .*torch/distributed/run"  # torchrun's
)
_REPLACED = (
    (re.compile(r"\x1b\[[\d;]*m"), ""),
    (re.compile(r"\d{4}-\d\d-\d\d[ T_]\d\d:\d\d:\d\d([,.]\d+)?"), "<time>"),
    (re.compile(r"(?<!\d)20\d{12}(?!\d)"), "<time>"),
    (re.compile(r"(?<=/)\d{10}\.\d+(?=/)"), "<time>"),  # TensorBoard's folders
    (re.compile(r"\d[\d.]* [KMGT]?i?B (are|is) free"), "<room> are free"),
    (re.compile(r"\b\d[\d.]* (s|ms|seconds|minutes|hours)\b"), r"<time> \1"),
    (re.compile(r"events\.out\.tfevents\.[\w.-]+"), "events.out.tfevents.<time>"),
    (re.compile(r"(\.py):\d+: "), r"\1: "),  # a warning's line
)
_NUMBER = re.compile(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+")


class Places:
    """The folders of this machine, and what stands for them."""

    def __init__(self, work: Path) -> None:
        found = {
            str(work): "<work>",
            str(ROOT): "<checkout>",
            sysconfig.get_path("purelib"): "<packages>",
            sysconfig.get_path("stdlib"): "<python>",
            sys.prefix: "<environment>",
            str(Path.home()): "<home>",
            tempfile.gettempdir(): "<temp>",
        }
        self._found = sorted(found.items(), key=lambda item: -len(item[0]))

    def named(self, text: str) -> str:
        """One line or text, with names for places and times."""
        for place, name in self._found:
            text = text.replace(place, name)
        for pattern, instead in _REPLACED:
            text = pattern.sub(instead, text)
        return text

    def lines(self, text: str) -> list[str]:
        """The lines of a terminal: of each progress bar what it shows last."""
        found: list[str] = []
        bars: dict[str, str] = {}
        for piece in re.split(r"[\r\n]", text):
            line = piece.rstrip()
            if bar := _BAR.fullmatch(line):
                name = bar["name"]
                # one that appears only after a while is not always there
                if name in bars or bar["clock"].startswith("00:00<?"):
                    bars[name] = f"{name}: {bar['done']}" + (f", {bar['more']}" if bar["more"] else "")
            elif line and not _DROPPED.match(line):
                found.append(self.named(line))
        return found + list(bars.values())


def loose(text: str) -> str:
    """Without numbers that follow from the arithmetic."""
    return _NUMBER.sub("#", text)
