"""DeepSeekMoE: language models with fine-grained and shared experts.

After "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models"
(Dai et al., ACL 2024, arXiv 2401.06066).
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("deepseekmoe")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
