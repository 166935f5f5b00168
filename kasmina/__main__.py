"""``python -m kasmina`` is ``kasmina``."""

from kasmina_core.cli import main

if __name__ == "__main__":
    main(prog_name="kasmina")
