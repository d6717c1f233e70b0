from .data import Instance as Instance
from .data import locate as locate
from .data import read_instances as read_instances
from .formations import Formation as Formation
from .inventory import Inventory as Inventory
from .inventory import Sense as Sense
from .predictions import Candidate as Candidate
from .predictions import Prediction as Prediction
