"""Ways to put a backdoor into a network: for sample models, benchmarks and the re-injection test, never for users' files."""
