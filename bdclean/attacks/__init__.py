"""Ways to put a backdoor into a network: for sample models, benchmarks, the re-injection test."""
