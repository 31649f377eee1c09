"""The parts that model architectures are made of. Each takes its tensors from a WeightLoader as it is built."""
