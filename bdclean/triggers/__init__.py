"""Triggers: one file each. They stamp uint8 images [n 3 h w] before normalisation, and draw their own controls."""
