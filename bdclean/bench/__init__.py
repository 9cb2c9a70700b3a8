"""Drivers of the tables: `python -m bdclean.bench NAME`, resumable cell by cell."""
