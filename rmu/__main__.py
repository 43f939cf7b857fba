from rmu.cli import run

run()
