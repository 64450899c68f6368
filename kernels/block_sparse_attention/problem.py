"""A problem of block-sparse attention, as every backend takes it, and what is refused before one sees it.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries per query block, P persistent entries (the first `num_persistent` of each list).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.kernels.values import reads_values, require_integers, require_range, require_tensors

OPERATION = "block_sparse_attention"


class Problem(NamedTuple):
    """What attends to what; tensors of any strides.

    query [B, H, Nq, Tq, D]; key_pool, value_pool [B, H, S, T, D]; block_index [B, H, Nq, M] int32; query_sizes [Nq] and
    key_sizes [B, H, S] int32 or None; scale on the scores; num_persistent P.
    """

    query: Tensor
    key_pool: Tensor
    value_pool: Tensor
    block_index: Tensor
    query_sizes: Tensor | None
    key_sizes: Tensor | None
    scale: float
    num_persistent: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that have gradients."""
        return self.query, self.key_pool, self.value_pool

    @property
    def empty(self) -> bool:
        """Whether there is nothing to attend from or to, whatever the lists say."""
        return not (self.query.numel() and self.block_index.numel() and self.key_pool.numel())

    def of_heads(self, group: tuple[slice, slice]) -> Problem:
        """The same of some samples and heads."""
        key_sizes = None if self.key_sizes is None else self.key_sizes[group]
        query, key_pool, value_pool, block_index = (x[group] for x in (*self.inputs, self.block_index))
        return self._replace(
            query=query, key_pool=key_pool, value_pool=value_pool, block_index=block_index, key_sizes=key_sizes
        )


def check_shapes(problem: Problem) -> None:
    """Refuse shapes, types and devices that do not fit; pools and lists are broadcast already."""

    def fail(what: str, tensor: Tensor, wanted: str) -> None:
        raise SparseForcingError(f"{OPERATION}: {what} is {list(tensor.shape)} {tensor.dtype}, expected {wanted}")

    query, key_pool, value_pool, block_index, query_sizes, key_sizes, _, num_persistent = problem
    if query.dim() != 5 or not query.is_floating_point() or query.dtype.itemsize < 2 or not query.shape[-1]:
        fail("query", query, "floating point [B, H, Nq, Tq, D] of 16 bits or more, D at least 1")
    B, H, Nq, _, D = query.shape
    for what, pool in (("key_pool", key_pool), ("value_pool", value_pool)):
        if pool.dim() != 5 or pool.shape[:2] != (B, H) or pool.shape[-1] != D or pool.dtype != query.dtype:
            fail(what, pool, f"{query.dtype} [{B}, {H}, S, T, {D}] to match query")
    if value_pool.shape != key_pool.shape:
        fail("value_pool", value_pool, f"the shape of key_pool {list(key_pool.shape)}")
    if block_index.dim() != 4 or block_index.shape[:3] != (B, H, Nq):
        fail("block_index", block_index, f"int32 [{B}, {H}, {Nq}, M]")
    require_integers(OPERATION, "block_index", block_index)
    if query_sizes is not None and (query_sizes.shape != (Nq,) or query_sizes.dtype != torch.int32):
        fail("query_sizes", query_sizes, f"int32 [{Nq}]")
    if key_sizes is not None and (key_sizes.shape != key_pool.shape[:3] or key_sizes.dtype != torch.int32):
        fail("key_sizes", key_sizes, f"int32 {list(key_pool.shape[:3])}")
    if not isinstance(num_persistent, (int, torch.SymInt)) or not 0 <= num_persistent <= block_index.shape[-1]:
        fail("block_index", block_index, f"at least num_persistent = {num_persistent} entries per row")
    for tensor in (key_pool, value_pool, block_index, query_sizes, key_sizes):
        if tensor is not None and tensor.device != query.device:
            raise SparseForcingError(f"{OPERATION}: inputs on {query.device} and {tensor.device}")


def check_outcome(problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
    """Refuse what is not the outcome of a problem, or no gradient of it: a backward would read beyond its end."""
    require_tensors(OPERATION, grad_out=grad_out, out=out, lse=lse)
    query = problem.query
    exact = torch.promote_types(query.dtype, torch.float32)
    for what, x, shape, dtype in (
        ("grad_out", grad_out, query.shape, query.dtype),
        ("out", out, query.shape, query.dtype),
        ("lse", lse, query.shape[:4], exact),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != query.device:
            raise SparseForcingError(
                f"{OPERATION}: {what} is {list(x.shape)} {x.dtype} on {x.device}, expected {list(shape)} {dtype} on "
                f"{query.device}"
            )


def check_values(problem: Problem) -> None:
    """Refuse lists and sizes that name what is not there, where values are read (kernels/values.py)."""
    index, key_pool, num_persistent = problem.block_index, problem.key_pool, problem.num_persistent
    slots, tokens = key_pool.shape[2:4]
    if reads_values(index) and index.numel():
        least, most = (int(value) for value in index.aminmax())
        if most >= slots:
            raise SparseForcingError(
                f"{OPERATION}: block_index lists slot {most} of a pool of {slots} slots, which are counted from 0"
            )
        if least < -1:
            raise SparseForcingError(f"{OPERATION}: block_index holds {least}; an unused entry is -1")
        if least < 0 and bool(((index[..., :-1] < 0) & (index[..., 1:] >= 0)).any()):
            raise SparseForcingError(
                f"{OPERATION}: block_index has a slot after an unused entry (-1); move unused entries to the row's end"
            )
        shared = index[..., :num_persistent]
        if num_persistent and not torch.equal(shared, shared[:, :, :1].expand_as(shared)):
            raise SparseForcingError(
                f"{OPERATION}: num_persistent is {num_persistent}, but the first {num_persistent} entries of "
                "block_index are not the same in all rows of a head"
            )
    rows = problem.query.shape[3]
    if problem.query_sizes is not None:
        require_range(OPERATION, "query_sizes", problem.query_sizes, 0, rows, "rows of a query block")
    if problem.key_sizes is not None:
        require_range(OPERATION, "key_sizes", problem.key_sizes, 0, tokens, "tokens of a slot")
