"""torch.compile of the transformer with a rollout memory: nothing breaks the graph, and nothing is compiled late."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_forcing.memory import MemoryConfig
from tests.memory.conftest import CHUNK, Rollout
from tests.memory.test_fixed_places import CONFIGS, latents, same, steady

LAST_COMPILED, CHUNKS = 3, 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "window"])
@torch.no_grad()
def test_chunks_after_the_third_use_graphs_that_there_are(name: str) -> None:
    """The first chunk makes what is made once, and is not compiled; whole graphs only, bitwise equal to eager ones."""
    torch._dynamo.reset()
    run, config = Rollout(), CONFIGS[name]
    assert isinstance(config, MemoryConfig)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run.model, backend=counter, fullgraph=True)
    (memory, over), (eager_memory, eager_over) = steady(run, config), steady(run, config)
    text = run.model.encode_text(run.text)
    graphs = []
    for chunk in range(1, CHUNKS + 1):
        memory.begin_chunk(CHUNK)
        eager_memory.begin_chunk(CHUNK)
        for clean in (False, False, True):
            inputs = latents(chunk), torch.full((2,), 0.0 if clean else 500.0)
            expected = eager_over(*inputs, clean)
            if chunk == 1:
                found = over(*inputs, clean)
            else:
                policy = memory.clean_pass() if clean else memory.denoising_pass()
                found = compiled(*inputs, run.text, policy=policy, text_keys_values=text)
            assert same(found, expected, clean), (chunk, clean)
        graphs.append(counter.frame_count)
    assert 0 < graphs[LAST_COMPILED - 1] <= 6
    assert graphs[-1] == graphs[LAST_COMPILED - 1], graphs
    torch._dynamo.reset()
