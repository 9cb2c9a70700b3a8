"""How encoders learn without labels: SimCLR, MoCo v2, BYOL, their views of an image, and a kNN as monitor."""
