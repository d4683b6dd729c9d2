"""Far fields: through what a query sees the rest. One file each."""

from farfield.far.by_head import ByHead
from farfield.far.channels import Channels
from farfield.far.expansion import Expansion
from farfield.far.landmarks import Landmarks
from farfield.far.linear import Linear
from farfield.far.multigrid import Multigrid
from farfield.far.pooled import Pooled
from farfield.far.projection import Projection
from farfield.far.pyramid import Pyramid
from farfield.far.relay import Relay
from farfield.far.spectrum import Spectrum

__all__ = [
    "ByHead",
    "Channels",
    "Expansion",
    "Landmarks",
    "Linear",
    "Multigrid",
    "Pooled",
    "Projection",
    "Pyramid",
    "Relay",
    "Spectrum",
]
