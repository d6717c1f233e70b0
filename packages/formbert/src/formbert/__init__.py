"""FormBERT: Chinese word sense disambiguation with word-formation knowledge.

After "Leveraging Word-Formation Knowledge for Chinese Word Sense Disambiguation" (Zheng et al., Findings
of EMNLP 2021).
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("formbert")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
