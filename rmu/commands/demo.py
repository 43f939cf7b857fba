"""``rmu demo``."""

from rmu.demo.run import main as main
