"""Block-sparse attention on a CPU.

Shape legend of every module here, beside that of problem.py: in a piece, n items of R rows and m list entries each,
L = m * T keys. Per-row tensors are stored [B * H * Nq, Tq, ...], lists [B * H * Nq, M].
"""
