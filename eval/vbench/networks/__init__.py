"""Networks that VBench's dimensions need, in plain torch, named so that the official weight files load unchanged."""
