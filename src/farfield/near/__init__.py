"""Near fields: which tokens a query sees exactly. One file each."""

from farfield.near.blocks import Blocks
from farfield.near.conv import Conv
from farfield.near.dense import Dense
from farfield.near.partition import Partition
from farfield.near.window import Window

__all__ = ["Blocks", "Conv", "Dense", "Partition", "Window"]
