"""Near fields: which tokens a query sees exactly. One file each."""

from farfield.near.anchors import Anchors
from farfield.near.blocks import Blocks
from farfield.near.conv import Conv
from farfield.near.dense import Dense
from farfield.near.dynamic_conv import DynamicConv
from farfield.near.global_queries import GlobalQueries
from farfield.near.partition import Partition
from farfield.near.window import Window

__all__ = ["Anchors", "Blocks", "Conv", "Dense", "DynamicConv", "GlobalQueries", "Partition", "Window"]
