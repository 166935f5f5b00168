"""For type checkers: the names of ``kasmina_core``."""

from kasmina_core import *  # noqa: F403  # the list is there
from kasmina_core import __version__ as __version__
