"""bdclean: find backdoors in vision checkpoints and make cleansed drop-in replacements."""

__version__ = "0.1.0"
