"""Math-Shepherd: label solution steps by rollouts, train process reward models, verify, reinforce.

After "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations"
(Wang et al., ACL 2024, arXiv 2312.08935).
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("mathshepherd")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
