"""The options of compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option
from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Compilation"""

    compile: bool = option(
        False, help="compile the denoiser block by block with torch.compile: a slow first step, then faster ones"
    )
    compile_backend: Literal["inductor", "aot_eager", "eager"] = option(
        "inductor", help="what compiles with --compile; the other two are for finding faults, and not faster"
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "default", help="how long inductor searches for fast kernels"
    )
    compile_dynamic: Literal["auto", "true", "false"] | None = option(
        None,
        help="whether one graph serves all sizes of images (default: auto, from the second size on)",
    )
    compile_fullgraph: bool = option(False, help="stop where a block cannot be compiled as one graph")
    compile_cache_size_limit: int | None = option(
        None,
        minimum=1,
        zero_is_unset=True,
        help="the largest number of graphs for one kind of block (default: 8 for each of the denoiser's blocks)",
    )
    torch_compile: bool = option(False, help="the older name of --compile")
    dynamo_backend: Literal["inductor", "aot_eager", "eager", "no"] = option(
        "inductor", help="what compiles with --torch_compile"
    )

    def __post_init__(self) -> None:
        if self.torch_compile and self.dynamo_backend == "no":
            raise UserError("--dynamo_backend no with --torch_compile: give one of them")
        if self.compile and self.torch_compile and self.compile_backend != self.dynamo_backend:
            raise UserError(
                f"--compile_backend {self.compile_backend} and --dynamo_backend {self.dynamo_backend}: give one of them"
            )
        if self.is_asked_for and self.backend != "inductor" and self.compile_mode != "default":
            raise UserError(f"--compile_mode {self.compile_mode} is for the backend inductor, not for {self.backend}")

    @property
    def is_asked_for(self) -> bool:
        return self.compile or self.torch_compile

    @property
    def option(self) -> str:
        """The given option that turns compilation on, for messages."""
        return "compile" if self.compile else "torch_compile"

    @property
    def backend(self) -> str:
        return self.compile_backend if self.compile else self.dynamo_backend

    def idle(self) -> dict[str, str]:
        """Options without effect, each with the words that follow "has no effect"."""
        found = {}
        if not self.compile:
            found["compile_backend"] = " without --compile"
        if not self.torch_compile and self.dynamo_backend != "no":  # which GUIs write for a run that is not compiled
            found["dynamo_backend"] = " without --torch_compile"
        if not self.is_asked_for:
            for name in ("compile_mode", "compile_dynamic", "compile_fullgraph", "compile_cache_size_limit"):
                found[name] = " without --compile"
        return found
