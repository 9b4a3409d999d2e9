"""Parameter groups and state, as torch types them: the only place of the optimizers with values of any type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# An optimizer's own options stand in its groups, and what it remembers of a parameter in its state: tensors, numbers,
# tuples of them. Which ones there are, `check_group` and the optimizers of others know.
Group = dict[str, Any]
State = dict[str, Any]
ParameterGroups = list[Group]
Options = Mapping[str, Any]  # of a group, or some of them, to be read only
