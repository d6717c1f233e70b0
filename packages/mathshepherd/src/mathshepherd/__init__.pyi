from .config import Sampling as Sampling
from .generate import LocalGenerator as LocalGenerator
from .records import Problem as Problem
from .records import Solution as Solution
from .records import StepLabels as StepLabels
from .steps import StepFormat as StepFormat
