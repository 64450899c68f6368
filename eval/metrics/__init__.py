"""One metric a file, in folders by what they need; `sparse_forcing.eval.measuring.registry` finds every module here"""
