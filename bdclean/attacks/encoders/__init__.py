"""Attacks on encoders: by poisoning what they are pre-trained on, or by training a clean encoder on.

`kind` says which: "pre-training" takes labeled images and returns them with some of the target class stamped, labels as
they were; "encoder" takes a clean encoder, shadow images and images of the target class, and returns a poisoned one.
"""
