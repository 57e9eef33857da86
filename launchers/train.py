"""`t2i train` as a script, for launchers that start files."""

from t2i.commands.train import main
from t2i.errors import run_command

if __name__ == "__main__":
    run_command(main)
