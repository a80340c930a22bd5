"""Two processes with half a batch each against one with the whole: equal losses and, under DDP, equal gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import gradients, images, seeded, tiny_model
from torch.nn.parallel import DistributedDataParallel

from modeling_cjepa.configuration_cjepa import REGULARIZERS
from modeling_cjepa.losses_cjepa import block_vicreg_terms, gather, vicreg_terms

WORLD_SIZE, BATCH_SIZE = 2, 8
# readings of the regulariser, without and with an expander, whose batch norm shall see the global batch, too
CASES = [(reading, expander) for reading in REGULARIZERS for expander in (None, 8)]


def share(x, rank, world_size):
    """The rows of one process."""
    return x.chunk(world_size)[rank]


def weighted(terms):
    return 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]


def terms_and_gradients(rank=0, world_size=1):
    """VICReg's terms on this process's rows, and the gradient of those rows as DDP's averaging would leave it."""
    rows = torch.randn(BATCH_SIZE, 3, 5, generator=seeded()) + 1.0
    found = {}
    for name, function in {
        "pair": lambda x: vicreg_terms(gather(x[:, 0]), gather(x[:, 1])),
        "blocks": lambda x: block_vicreg_terms(gather(x)),
    }.items():
        x = share(rows, rank, world_size).clone().requires_grad_()
        terms = function(x)
        weighted(terms).backward()
        found[name] = {term: value.item() for term, value in terms.items()}, x.grad / world_size
    return found


def loss_and_gradients(reading, expander, rank=0, world_size=1):
    """The pre-training model's loss on this process's images, with given masks, and its gradients under DDP."""
    model = tiny_model(regularizer=reading, regularizer_weight=0.01, expander_hidden_size=expander)
    masks = model.sample_masks(BATCH_SIZE, generator=seeded())
    batch = [share(x, rank, world_size) for x in (images(BATCH_SIZE), *masks)]
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    output = wrapped(*batch)
    output.loss.backward()
    terms = {name: term.item() for name, term in output.loss_terms.items()}
    return output.loss.item(), terms, gradients(model)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    assert dist.get_world_size() == WORLD_SIZE
    found = {"terms": terms_and_gradients(rank, WORLD_SIZE)}
    found |= {case: loss_and_gradients(*case, rank, WORLD_SIZE) for case in CASES}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("name", ["pair", "blocks"])
def test_terms_are_those_of_the_global_batch(name, found):
    terms, gradient = terms_and_gradients()[name]
    assert gradient.abs().max() > 0.01
    for rank in range(WORLD_SIZE):
        theirs, of_rows = found[rank]["terms"][name]
        assert theirs == pytest.approx(terms, abs=1e-6, rel=1e-6)
        torch.testing.assert_close(of_rows, share(gradient, rank, WORLD_SIZE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_global_batch(case, found):
    reading, _ = case
    loss, terms, whole = loss_and_gradients(*case)
    assert sum(found[rank][case][0] for rank in range(WORLD_SIZE)) / WORLD_SIZE == pytest.approx(loss, abs=1e-6)
    for rank in range(WORLD_SIZE):
        _, theirs, of_rank = found[rank][case]
        for name in {"variance", "covariance"} | ({"invariance"} if reading != "context" else set()):
            assert theirs[name] == pytest.approx(terms[name], abs=1e-6, rel=1e-6), name
        assert of_rank.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(
                of_rank[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
