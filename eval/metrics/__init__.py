"""One metric a file; `sparse_forcing.eval.registry` finds every module of this package."""
