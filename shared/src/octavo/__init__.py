"""The thin layer that Octavo's packages stand on; its modules are its public face.

`cli` and `console` (the command line), `runtime`, `errors`, `rundir` (runs), `data` (rows in),
`models` and `tiny` (models), `training`, `stats`, `report`.
"""

from importlib.metadata import version

__version__ = version("octavo")
