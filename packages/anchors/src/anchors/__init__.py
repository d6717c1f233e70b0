"""Label words are anchors: how in-context learning flows through a language model.

After "Label Words are Anchors: An Information Flow Perspective for Understanding In-Context Learning"
(Wang et al., EMNLP 2023, arXiv 2305.14160).
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("anchors")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
