"""Ways to put a backdoor into a network: for sample models, benchmarks, the re-injection test.

`kind` says what an attack takes and gives: "poisoning" a labeled training set, in which stamped images get the target
class; see `encoders` for "pre-training" and "encoder".
"""
