"""The CPU path: a C++ library that computes a whole step in one call, and what binds it.

native/ has the sources, variants.py how they are compiled, library.py the C interface, decoder.py the model. Where the
library was not built, models/decoder.py computes the same in torch.
"""
