"""One metric a file; `sparse_forcing.eval.measuring.registry` finds every module of this package."""
