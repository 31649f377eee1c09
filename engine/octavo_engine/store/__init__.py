"""Where models come from and where they lie on this machine. Torch-free; for the command line and the API process."""
