from .data import Examples as Examples

__version__: str
