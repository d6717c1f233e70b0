from .data import Instance as Instance
from .data import locate as locate
from .data import read_instances as read_instances
from .disambiguator import Disambiguator as Disambiguator
from .disambiguator import Second as Second
from .disambiguator import choose_margin as choose_margin
from .formation import FormationPrediction as FormationPrediction
from .formation import FormationPredictor as FormationPredictor
from .formations import Formation as Formation
from .inventory import Inventory as Inventory
from .inventory import Sense as Sense
from .metrics import compare as compare
from .metrics import evaluate as evaluate
from .metrics import summary as summary
from .modeling import build as build
from .modeling import register as register
from .predictions import Candidate as Candidate
from .predictions import Prediction as Prediction
from .sources import Sources as Sources
from .tagger import TaggedToken as TaggedToken
from .tagger import Tagger as Tagger
from .training import train as train

__version__: str
