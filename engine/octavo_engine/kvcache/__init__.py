"""Who owns which block of the paged KV cache. Bookkeeping only: the tensors live in the runner, no torch here."""
