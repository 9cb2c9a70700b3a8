"""Ways to put a backdoor into a network: for sample models, benchmarks, the re-injection test.

`kind` says what an attack on a classifier takes and gives; see `encoders` for "pre-training" and "encoder".
* "poisoning": a labeled training set, in which stamped images get the target class. One that has `learn` learns its
  trigger first.
* "clean-label": a labeled training set, in which images of the target class are changed and no label is.
* "surrogate": the same, with the help of a classifier that was trained on the clean set.
* "training": it takes part in the training itself.
"""
