"""Triggers, one file each: they stamp uint8 images [n 3 h w] before normalisation and draw their controls."""
