"""``python -m kasmina_core.cli`` is ``kasmina``."""

from kasmina_core.cli import main

main(prog_name="kasmina")
