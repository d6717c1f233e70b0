"""Fine-purifying: find and clean the poisonous dimensions of a fine-tuned model.

Zhang, Chen, Zhou, Meng, Zhou, Sun: "Diffusion Theory as a Scalpel: Detecting and Purifying Poisonous
Dimensions in Pre-trained Language Models Caused by Backdoor or Bias", Findings of ACL 2023.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("finepurify")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
