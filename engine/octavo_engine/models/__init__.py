"""Model architectures: their hyperparameters (config.py, no torch) and their forward passes over shared layers."""
