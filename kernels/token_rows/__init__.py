"""Row operations: what a transformer block does to the row of every token between its matrix products"""
