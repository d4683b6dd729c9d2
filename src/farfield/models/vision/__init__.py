"""A hierarchical backbone for images, fields, video and volumes, with the heads that make a model of it.

`backbone.py` holds the stages, `heads.py` what reads them, `model.py` the two together, `config.py` every number that
decides the architecture and the named sizes.
"""

from farfield.models.vision.backbone import Backbone, Features
from farfield.models.vision.config import SIZES, TASKS, VisionConfig, preset
from farfield.models.vision.model import VisionModel

__all__ = ["SIZES", "TASKS", "Backbone", "Features", "VisionConfig", "VisionModel", "preset"]
