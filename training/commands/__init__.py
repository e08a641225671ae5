"""The commands of the making: what `lorikeet.py` adds to the command line. Each imports what it needs when it runs."""
