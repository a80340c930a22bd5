"""A compiled step is one graph without a break, and few of them serve masks of all lengths."""

import pytest
import torch
from tiny import images, seeded, tiny_model

UPPER = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = {
    "per_block": {},
    "shared_context": {"predictor_attention": "shared_context"},
    "mask_sets": {"num_mask_sets": 2},
    "stack": {"upper_levels": [UPPER], "num_target_blocks": 2, "min_context_patches": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_few_graphs_serve_masks_of_all_lengths(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, graphs = tiny_model(**KINDS[kind]), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled, generator, shapes = torch.compile(model, backend=count), seeded(), set()
    for _ in range(12):
        masks = model.sample_masks(4 * model.config.num_mask_sets, model.grid_sizes(images())[-1], generator)
        shapes.add((masks[0].shape[1], masks[1].shape[2]))
        loss = compiled(images(), *masks).loss
        torch.testing.assert_close(loss, model(images(), *masks).loss, atol=1e-6, rtol=1e-5)
        loss.backward()
    # the first lengths have a graph of their own; the next ones find out which of them vary
    assert len(graphs) <= 3 < len(shapes)
    assert not torch._dynamo.utils.counters["graph_break"]
