"""`t2i play` as a script, for launchers that start files."""

try:
    from t2i.commands.play import main
    from t2i.errors import run_command
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}. Run `make install`, then use .venv/bin/python.") from None

if __name__ == "__main__":
    run_command(main)
