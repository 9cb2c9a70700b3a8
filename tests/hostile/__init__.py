"""Files that lie, made by a script: `python tests/hostile/make.py FOLDER` writes them all."""
