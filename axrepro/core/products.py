"""In which numbers the products of activations with weights are computed: a choice for the hardware, like remat."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from axrepro.errors import UserError, nearest

Format = Literal["exact", "int8", "fp8"]
Part = Literal["attention", "ffn", "experts"]


@dataclass(frozen=True, kw_only=True)
class Products:
    """The format, and the parts of a model that use it; embeddings, output heads and routers are always exact.

    Attributes:
      format: "exact" is the compute type, the others see `axrepro.nn.quantised`.
      parts: "attention" are its projections, "ffn" feed-forward layers, "experts" whatever lies inside experts.
    """

    format: Format = "exact"
    parts: tuple[Part, ...] = get_args(Part)

    def __post_init__(self):
        if self.format not in get_args(Format):
            raise UserError(f"unknown format of products {self.format!r}; {nearest(self.format, get_args(Format))}")
        for part in self.parts:
            if part not in get_args(Part):
                raise UserError(f"products.parts has an unknown part {part!r}; {nearest(part, get_args(Part))}")

    def of(self, part: Part | None) -> Format:
        """The format for a product of this part; None is exact."""
        return self.format if part in self.parts else "exact"

    def in_experts(self) -> "Products":
        """The same choice as seen from inside an expert, where every part counts as "experts"."""
        return replace(self, parts=get_args(Part) if "experts" in self.parts else ())
