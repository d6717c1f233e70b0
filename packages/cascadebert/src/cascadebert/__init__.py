"""CascadeBERT: classification several times faster by a calibrated cascade of complete models.

Li, Lin, Chen, Ren, Li, Zhou, Sun: "CascadeBERT: Accelerating Inference of Pre-trained Language
Models via Calibrated Complete Models Cascade", Findings of EMNLP 2021.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("cascadebert")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
