"""One module a command of ``rmu``, each with ``main(argv)``; named like the command, with _ for -."""
