"""Detectors look for a backdoor without knowing its trigger. One file each; `bdclean.registry` knows their names."""
