"""Answers that keep to a grammar: it is tried out, compiled beside the steps, and gives masks to the sampler."""
