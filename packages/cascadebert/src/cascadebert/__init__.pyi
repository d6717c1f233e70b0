from .cascade import Cascade as Cascade
from .cascade import Predictions as Predictions
from .config import DataConfig as DataConfig
from .config import TrainConfig as TrainConfig
from .cost import StageCost as StageCost
from .cost import speedup as speedup
from .cost import stage_cost as stage_cost
from .data import Examples as Examples
from .data import load_examples as load_examples
from .evaluate import compare as compare
from .metrics import dis as dis
from .policy import Policy as Policy
from .policy import fit_policy as fit_policy
from .policy import sweep as sweep
from .scores import log_odds as log_odds
from .train import train_cascade as train_cascade
from .words import generate_words as generate_words

__version__: str
