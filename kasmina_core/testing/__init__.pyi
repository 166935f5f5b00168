"""The public names of the conformance kit, once: type checkers read this file, and so does the package when it is imported."""

from .blueprints import check_blueprint as check_blueprint
from .blueprints import parametrize_blueprints as parametrize_blueprints
from .documents import parametrize_examples as parametrize_examples
from .hosts import check_host as check_host
from .lives import LifeCase as LifeCase
from .lives import LifeCases as LifeCases
from .packs import PackReport as PackReport
from .packs import check_pack as check_pack
from .reports import HOST_CHECKS as HOST_CHECKS
from .reports import PACK_CHECKS as PACK_CHECKS
from .reports import HostReport as HostReport
from .seeds import SeedCases as SeedCases
