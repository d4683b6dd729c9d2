"""Far fields: through what a query sees the rest. One file each."""

from farfield.far.channels import Channels
from farfield.far.landmarks import Landmarks
from farfield.far.linear import Linear
from farfield.far.projection import Projection
from farfield.far.pyramid import Pyramid

__all__ = ["Channels", "Landmarks", "Linear", "Projection", "Pyramid"]
