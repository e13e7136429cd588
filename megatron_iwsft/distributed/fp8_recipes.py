"""Transformer Engine's FP8 recipes and what each one needs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class RecipeNeeds:
    """One row of the table.

    capability   lowest CUDA compute capability
    generation   the GPUs that have it
    alignment    the rows of a matmul on each rank must be a multiple of it
    gathered     the same with sequence parallelism: only full blocks of rows are gathered in FP8
    overlapped   the same where Transformer Engine's userbuffers gather them; None: they do not support the recipe
    format       Megatron-Core's name. hybrid: gradients in E5M2, for one scale per tensor. e4m3: more precise, with a scale per block
    no_parameters  why parameters cannot be kept in it; None if they can
    """

    capability: tuple[int, int]
    generation: str
    alignment: int
    gathered: int
    overlapped: int | None
    format: Literal["hybrid", "e4m3"]
    no_parameters: str | None = None

    def rows(self, *, sequence_parallel: bool, overlap_tensor: bool = False) -> int:
        """What a rank's rows must be a multiple of."""
        if overlap_tensor:
            assert self.overlapped is not None, "the config's validators refuse it"
            return self.overlapped
        return self.gathered if sequence_parallel else self.alignment


FP8_RECIPES: dict[FP8Recipe, RecipeNeeds] = {
    "delayed": RecipeNeeds(
        *((8, 9), "Ada, Hopper or newer", 16, 16, 16, "hybrid"),
        no_parameters="weights would be rounded at scale 1 until the first update, and a reference's for the whole run",
    ),
    "tensorwise": RecipeNeeds((8, 9), "Ada, Hopper or newer", 16, 16, 16, "hybrid"),
    "blockwise": RecipeNeeds((9, 0), "Hopper or newer", 16, 128, None, "e4m3"),
    "mxfp8": RecipeNeeds(
        *((10, 0), "Blackwell", 32, 32, 128, "e4m3"),
        no_parameters="Transformer Engine cannot move such weights into Megatron-Core's buffers",
    ),
}
