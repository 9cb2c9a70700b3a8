"""Triggers, one file each: they stamp uint8 images [n c h w] before normalisation and draw their controls."""
