"""What a user may tell `--recommend` about the job: its subject, its difficulty, and the time there is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.config.fields import UNSET, BadValue, is_truth, read_bool
from library.errors import did_you_mean

SUBJECTS = ("style", "character", "concept")
DIFFICULTIES = ("easy", "normal", "hard")
BY_DATA = "data"  # the word of a plain --recommend: the data alone decides
_UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Wishes:
    """`subject`: one of SUBJECTS, or "". `budget`: seconds for the run; `step`: seconds a step. Both or neither."""

    subject: str = ""
    difficulty: str = "normal"
    budget: float | None = None
    step: float | None = None

    @property
    def most_steps(self) -> int | None:
        """The steps that fit into the time; None where none was given."""
        return None if self.budget is None or self.step is None else max(1, int(self.budget / self.step))


def read(word: str) -> object:
    """The words of --recommend, checked; "true" is the flag alone, "false" none. Raises BadValue."""
    if is_truth(word):
        return BY_DATA if read_bool(word) else UNSET
    of(word)
    return word


def of(word: str) -> Wishes:
    """The wishes in words such as "style,hard,2h,1.4s". Raises BadValue."""
    found: dict[str, str | float] = {}
    for part in filter(None, (part.strip().lower() for part in word.split(","))):
        if part == BY_DATA:
            continue
        name, value = _meaning(part)
        if name in found:
            raise BadValue(f"'{part}': the {name} is given twice")
        found[name] = value
    if ("time" in found) != ("time of a step" in found):
        raise BadValue(
            "a time such as 2h needs that of a step, such as 1.4s, and the other way round: --dry_run=measure times "
            "steps"
        )
    budget, step = found.get("time"), found.get("time of a step")
    return Wishes(
        subject=str(found.get("subject", "")),
        difficulty=str(found.get("difficulty", "normal")),
        budget=None if budget is None else float(budget),
        step=None if step is None else float(step),
    )


def _meaning(part: str) -> tuple[str, str | float]:
    """Which wish a word is, and its value. Hours and minutes are the run's, seconds those of a step."""
    if part in SUBJECTS:
        return "subject", part
    if part in DIFFICULTIES:
        return "difficulty", part
    time = re.fullmatch(r"(\d+\.?\d*|\.\d+)(h|min|s)", part)
    if time and float(time[1]) > 0:
        return "time of a step" if time[2] == "s" else "time", float(time[1]) * _UNITS[time[2]]
    known = (*SUBJECTS, *DIFFICULTIES, BY_DATA)
    near = did_you_mean(part, known) or (
        f": there are {', '.join(SUBJECTS)}; {', '.join(DIFFICULTIES)}; and the time with that of a step, such as "
        "2h,1.4s"
    )
    raise BadValue(f"'{part}' is not known here{near}")
